"""GET /healthz and /readyz: alive, and fit to take requests."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from app.service import Served
from models.errors import BusyError

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process is alive; touches no model."""
    return Health()


@router.get("/readyz")
async def readyz(service: Served) -> Health:
    """Whether models are loaded and requests are taken."""
    if not service.ready:
        raise BusyError(f"the server is {service.state}; try again shortly", retry_after=5)
    return Health()
