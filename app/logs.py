"""What the process writes about itself: lines for a reader at a terminal, JSON for what collects them.

A line of a request has its id, its route, its status and its time, and the name of its key. What was asked stands in no
line: neither addresses with their queries, nor texts, pictures or keys.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import orjson
import structlog

Style = Literal["auto", "text", "json"]


def configure(style: Style = "auto") -> None:
    """Send the log to stderr. auto: text where that is a terminal, else JSON."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if style == "json" or (style == "auto" and not sys.stderr.isatty()):
        last: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_json)]
    else:
        plain = structlog.dev.plain_traceback  # the pretty one shows the values of variables, which are what was asked
        last = [structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    )
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "faiss.loader"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _json(event: dict[str, Any], **options: Any) -> str:
    return orjson.dumps(event, default=str).decode()
