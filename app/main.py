"""The web application: routes found in `app/routes`, middlewares, errors, life and death."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline

from app import errors, page, routes
from app.collections import Collections
from app.engine import Engine, RemoteEngine
from app.generator import RemoteGenerator
from app.keys import Keyring
from app.middleware import OPEN_PATHS, BodyLimit, Envelope, Gate, Head, Presence
from app.service import Service
from app.settings import Settings
from models.dalle import DALLETransformer

DESCRIPTION = "Embeddings of pictures and texts, zero-shot labels, and search over collections of your own."


def create_app(
    settings: Settings,
    engines: Mapping[str, Engine | RemoteEngine],
    collections: Collections,
    generators: Mapping[str, DALLETransformer | RemoteGenerator] | None = None,
    keys: Keyring | None = None,
) -> FastAPI:
    """The ASGI application over loaded models (by name) and open collections, which the caller closes.

    keys: whom it lets in; None: those whom the settings do.
    """
    keys = keys or Keyring(given=settings.plain_keys)
    service = Service(settings, engines, collections, generators or {}, keys)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPIOffline(
        title="Semblance",
        description=DESCRIPTION,
        version="0.1.0",
        lifespan=lifespan,
        static_url=f"{page.DOCS}/static",
        favicon_url=f"{page.MOUNT}/icon.svg",
        telemetry=dict.fromkeys(("tracing", "metrics", "logs", "auto_configure"), False),  # app/tracing.py has ours
        docs_url=page.DOCS,
        redoc_url=None,
    )
    app.state.service = service
    errors.install(app)
    for router in find_routers():
        app.include_router(router, responses=errors.problem_responses())
    page.install(app)
    # The last one added is the outermost.
    app.add_middleware(Head)
    app.add_middleware(Presence)
    app.add_middleware(BodyLimit, limit=settings.max_body)
    app.add_middleware(Gate, service=service)
    app.add_middleware(Envelope, metrics=service.metrics, ending=lambda: service.state == "draining")
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def find_routers() -> list[APIRouter]:
    """The `router` of every module in `app/routes`, in the order of their names: the folder is the API."""
    names = sorted(module.name for module in pkgutil.iter_modules(routes.__path__))
    return [importlib.import_module(f"{routes.__name__}.{name}").router for name in names]


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the models of our own bodies among its components."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(_hoisted(document["paths"]))
        problem = errors.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(problem.pop("$defs"))
        schemas["Problem"] = problem
        # Once, and not at every operation.
        document["components"]["responses"] = {str(code): told for code, told in errors.problem_responses().items()}
        for operation in (each for methods in document["paths"].values() for each in methods.values()):
            for code in operation["responses"].keys() & document["components"]["responses"].keys():
                operation["responses"][code] = {"$ref": f"#/components/responses/{code}"}
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}, {}]  # a server without keys asks for none
        for path in OPEN_PATHS & document["paths"].keys():
            for operation in document["paths"][path].values():
                operation["security"] = []
        app.openapi_schema = document
    return app.openapi_schema


def _hoisted(node: Any) -> dict[str, Any]:
    """Takes every `$defs` out of a document and gives their entries."""
    found: dict[str, Any] = {}
    if isinstance(node, dict):
        found.update(node.pop("$defs", {}))
        for child in list(node.values()):
            found.update(_hoisted(child))
    elif isinstance(node, list):
        for child in node:
            found.update(_hoisted(child))
    return found
