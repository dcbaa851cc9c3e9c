"""GET /: the page, as files that a browser reads as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parent / "static"
MOUNT, DOCS = "/static", "/docs"
# Nobody's secret, and what a browser shows before anything can ask for a key.
OPEN_PATHS = frozenset({"/", DOCS, "/openapi.json"})
OPEN_FOLDERS = (f"{MOUNT}/", f"{DOCS}/static/")
# Nothing inline, nothing from elsewhere, and no page of others may show this one in a frame. data: and blob: are the
# reader's own pictures and those that were fetched with a key.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}


class _Files(StaticFiles):
    """With the headers above; a browser asks each time whether a file changed, so a new version is whole at once."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(HEADERS)
        return response


def install(app: FastAPI) -> None:
    """Serve the page and its parts."""
    files = _Files(directory=FOLDER)
    app.mount(MOUNT, files)

    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    app.add_route("/", page, include_in_schema=False)
