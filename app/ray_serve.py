"""The same application on a cluster of Ray: a router without models, and replicas of each model wherever there is room.

The router answers requests as `semblance serve` does (`create_app`), holds the collections and remembers texts; what a
model is needed for goes to a replica of it (app/replicas.py). Ray is imported where it is used: nothing else needs it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs, tracing
from app.address import url_of
from app.commandline import settings_of
from app.demo import fill_demo
from app.keys import Keyring, keys_to_serve
from app.loading import find_models, generates, in_order
from app.main import create_app
from app.replicas import QUEUE_WAIT, Encoder, EngineOfReplicas, Generator, GeneratorOfReplicas
from app.settings import Settings
from app.stores import open_collections
from models.errors import CheckpointError, DataError, InputError

log = logging.getLogger("semblance")

NAME = "semblance"  # of the application among others on the cluster
_GPU_SHARE = 0.25  # of a replica, where the cluster has GPUs and nothing else is said
_ROUTER_REQUESTS = 10_000  # at once; what a model has no room for its own queue refuses, with 503


@dataclass(frozen=True)
class Plan:
    """Of one model: replicas at least and at most, and the share of a GPU that each takes."""

    least: int = 1
    most: int = 1
    gpus: float = _GPU_SHARE


class QueueWait:
    """How many replicas a model gets, by the seconds that inputs wait in its replicas' queues: more in proportion (at
    most twice as many at a time) where they wait longer than `target`, one less where it is under a quarter of it."""

    def __init__(self, target: float) -> None:
        self.target = target

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Ray's AutoscalingContext -> replicas, and no state of our own; Ray adds its delays and bounds."""
        current = context.current_num_replicas
        waits = list(((context.aggregated_metrics or {}).get(QUEUE_WAIT) or {}).values())
        if not waits:
            return context.target_num_replicas, {}
        beside = sum(waits) / len(waits) / self.target
        wanted: float = current * min(beside, 2.0) if beside > 1 else current - (beside < 0.25)
        return max(context.capacity_adjusted_min_replicas, min(context.capacity_adjusted_max_replicas, wanted)), {}


def plans_of(models: Sequence[str], replicas: Sequence[str], gpus: Sequence[str]) -> dict[str, Plan]:
    """What `--replicas [NAME=]N[-M]` and `--gpus [NAME=]SHARE` say of each model; what names one goes before what names
    none. Raises InputError."""
    found = dict.fromkeys(models, Plan())

    def apply(option: str, given: str, change: Callable[[Plan, str], Plan]) -> None:
        name, equals, value = given.rpartition("=")
        if equals and name not in found:
            raise InputError(f"--{option} {given}: no model {name!r}; there are: {', '.join(models)}")
        for each in [name] if equals else models:
            try:
                found[each] = change(found[each], value)
            except ValueError:
                raise InputError(f"--{option} {given}: it is a number, as in clip=2, or for replicas 2-8") from None

    for given in sorted(replicas, key=lambda each: "=" in each):
        apply("replicas", given, _with_replicas)
    for given in sorted(gpus, key=lambda each: "=" in each):
        apply("gpus", given, lambda plan, value: replace(plan, gpus=float(value)))
    return found


def _with_replicas(plan: Plan, value: str) -> Plan:
    least, dash, most = value.partition("-")
    plan = replace(plan, least=int(least), most=int(most if dash else least))
    if not 1 <= plan.least <= plan.most:
        raise ValueError(value)
    return plan


class Router:
    """What answers HTTP: the application of `semblance serve`, whose models are elsewhere."""

    def __init__(self, settings: Settings, encoders: Mapping[str, Any], generators: Mapping[str, Any]) -> None:
        logs.configure(settings.log)
        tracing.configure()
        self._settings, self._encoders, self._generators = settings, encoders, generators
        self._collections = open_collections(settings, note=url_of(settings.host, settings.port))

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray asks for once, when this is made."""
        settings = self._settings
        described = await asyncio.gather(*(handle.describe.remote() for handle in self._encoders.values()))
        models = await asyncio.gather(*(handle.describe.remote() for handle in self._generators.values()))
        engines = {name: EngineOfReplicas(self._encoders[name], each) for name, each in in_order(described).items()}
        drawing = {
            name: GeneratorOfReplicas(handle, model)
            for (name, handle), model in zip(self._generators.items(), models, strict=True)
        }
        if settings.demo:
            await fill_demo(settings, engines, self._collections)
        keys = Keyring(settings.store, settings.plain_keys)
        app = create_app(settings, engines, self._collections, drawing, keys)
        app.add_middleware(_OneRequestId)
        return app

    def __del__(self) -> None:
        self._collections.close()


class _OneRequestId:
    """Leaves X-Request-ID to Ray's proxy, which adds the one that it has sent us to whatever we answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self.app(scope, receive, without)


def application(settings: Settings, plans: Mapping[str, Plan], wait: float, node: str = "") -> Any:
    """The application for `ray.serve.run`, on the cluster that Ray is connected to. wait: seconds that inputs may wait
    in a queue until there are more replicas. node: address of the host with the data folder; none: any host."""
    import ray  # type: ignore[import-not-found,unused-ignore]
    from ray import serve

    threads = settings.threads or 1
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    own = settings.model_copy(update={"threads": threads, "text_cache": 0, "api_keys": (), "database": None})
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    encoders: dict[str, Any] = {}
    generators: dict[str, Any] = {}
    for name, reference in find_models(settings).items():
        plan, draws = plans[name], generates(reference)
        size = settings.generate_queue if draws else settings.queue_size
        scaled: dict[str, Any] = {"num_replicas": plan.least}
        if plan.least < plan.most:
            scaled = {"autoscaling_config": _scaling(settings, plan, draws, wait)}
        deployed = serve.deployment(
            name=f"{'generator' if draws else 'encoder'}-{name}",
            ray_actor_options={"num_cpus": threads, "num_gpus": plan.gpus if has_gpus else 0},
            max_ongoing_requests=size,
            max_queued_requests=size,
            graceful_shutdown_timeout_s=settings.drain_seconds,
            logging_config=quiet,
            **scaled,
        )
        into, kind = (generators, Generator) if draws else (encoders, Encoder)
        place = Path(reference).absolute()  # replicas have other working folders
        into[name] = deployed(kind).bind(name, str(place) if place.exists() else reference, own)
    router = serve.deployment(
        name="router",
        num_replicas=1,  # its host has the keys, and the collections unless they are in a database
        ray_actor_options={"num_cpus": 0, "resources": {f"node:{node}": 0.001} if node else {}},
        max_ongoing_requests=_ROUTER_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        logging_config=quiet,
    )
    return router(serve.ingress()(Router)).bind(settings, encoders, generators)


def _scaling(settings: Settings, plan: Plan, draws: bool, wait: float) -> dict[str, Any]:
    """Encoders by the wait in their queues. Generators by the requests under way: beyond the lanes, of which a guided
    picture takes two, whatever comes waits."""
    bounds = {"min_replicas": plan.least, "max_replicas": plan.most, "upscale_delay_s": 10, "downscale_delay_s": 300}
    if draws:
        return bounds | {"target_ongoing_requests": settings.generate_lanes / 2}
    return bounds | {"policy": {"policy_function": "app.ray_serve:QueueWait", "policy_kwargs": {"target": wait}}}


def run(options: argparse.Namespace) -> int:
    """`semblance ray-serve`: deploy, and take it down at a signal. Raises InputError, CheckpointError and DataError."""
    try:
        import ray  # type: ignore[import-not-found,unused-ignore]
        from ray import serve  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise DataError("semblance ray-serve needs Ray: pip install 'semblance[ray]'") from None
    settings = settings_of(options)
    keys_to_serve(settings)
    models = find_models(settings)
    if not models:
        raise CheckpointError(f"no model to serve in {settings.checkpoints}: give --checkpoints or --model")
    plans = plans_of(list(models), options.replicas or [], options.gpus or [])
    logs.configure(settings.log)
    settings = settings.model_copy(update={"store": settings.store.absolute()})
    # "local", for without an address Ray would join whatever cluster is or was on this host.
    own = {} if options.address else {"include_dashboard": False}
    ray.init(address=options.address or "local", log_to_driver=False, **own)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.host, "port": settings.port, "keep_alive_timeout_s": 75},
        )
        node = ray.util.get_node_ip_address()
        serve.run(application(settings, plans, options.wait_ms / 1000, node), name=NAME)
        log.info("%s ready on %s", ", ".join(models), url_of(settings.host, settings.port))
        threading.Event().wait()
    finally:
        serve.delete(NAME)
        ray.shutdown()
    return 0
