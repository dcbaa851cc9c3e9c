"""GET /metrics: what the server measures of itself."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from app.service import Served

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Served) -> Response:
    """Requests, queues, batches, caches, collections and memory, for Prometheus."""
    return Response(await service.store(service.metrics.text), media_type=CONTENT_TYPE_LATEST)
