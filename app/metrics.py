"""What the server measures of itself, in the words of Prometheus: GET /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.errors import REASONS
from models.errors import SemblanceError

if TYPE_CHECKING:
    from app.service import Service

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class BatchMeter(NamedTuple):
    """What a batcher tells. waited: seconds of one input in the queue. ran: inputs of a batch and its seconds."""

    waited: Callable[[float], None] = lambda seconds: None
    ran: Callable[[int, float], None] = lambda size, seconds: None


class Metrics:
    """One server's figures, in a registry of its own. Labels are names of routes, models and collections: what a client
    sends is none, so their number is bounded."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        seconds = partial(Histogram, registry=self.registry, buckets=_SECONDS)
        self.requests = seconds(
            "http_request_duration_seconds",
            "From a request's head to the end of its answer",
            ("method", "route", "status"),
        )
        self.in_flight = Gauge("http_requests_in_flight", "Requests under way", registry=self.registry)
        self.rejections = Counter(
            "semblance_rejections", "Problems answered, by their type", ("reason",), registry=self.registry
        )
        for kind in REASONS:  # what begins with the first refusals has risen by none, and alerts nobody
            self.rejections.labels(kind)
        self.decode = seconds("semblance_decode_seconds", "One picture, from bytes to what the model takes", ("model",))
        self.cache = Counter(
            "semblance_cache_requests",
            "Texts and label sets asked of the caches",
            ("model", "cache", "result"),
            registry=self.registry,
        )
        self.resent = Counter(
            "semblance_resent_calls",
            "Calls sent to another replica, for the first was lost (Ray Serve)",
            ("model",),
            registry=self.registry,
        )
        self.drawing = seconds("semblance_generation_step_seconds", "One step of all pictures being drawn", ("model",))
        self._waits = seconds("semblance_queue_wait_seconds", "An input's time in the queue", ("model", "kind"))
        self._inference = seconds("semblance_inference_seconds", "One forward of a batch", ("model", "kind"))
        self._sizes = Histogram(
            "semblance_batch_size", "Inputs of one batch", ("model", "kind"), registry=self.registry, buckets=_SIZES
        )

    def batches(self, model: str, kind: str) -> BatchMeter:
        """For the batcher of one model and kind of input."""
        sizes, inference = self._sizes.labels(model, kind), self._inference.labels(model, kind)

        def ran(size: int, seconds: float) -> None:
            sizes.observe(size)
            inference.observe(seconds)

        return BatchMeter(self._waits.labels(model, kind).observe, ran)

    def cached(self, model: str, cache: str, hits: int, misses: int) -> None:
        """Count what a cache had and had not."""
        self.cache.labels(model, cache, "hit").inc(hits)
        self.cache.labels(model, cache, "miss").inc(misses)

    def watch(self, service: Service) -> None:
        """Tell, from now on, what the service has whenever somebody asks."""
        self.registry.register(_State(service))

    def text(self) -> bytes:
        """Everything, in Prometheus's text format. Blocks for a look at each collection."""
        return generate_latest(self.registry)


class _State(Collector):
    """What is read when asked, for it is there anyway: queues, collections, memory."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        return []  # so that registering does not ask

    def collect(self) -> Iterator[Metric]:
        service = self._service
        yield GaugeMetricFamily("semblance_ready", "Whether requests are taken", float(service.ready))
        depth = GaugeMetricFamily("semblance_queue_depth", "Inputs admitted, not answered", labels=("model", "kind"))
        for (model, kind), count in service.queue_depths().items():
            depth.add_metric((model, kind), count)
        yield depth
        models = GaugeMetricFamily(
            "semblance_model_info", "A model that is served", labels=("model", "fingerprint", "backends")
        )
        for name, engine in service.engines.items():
            backends = sorted(set(engine.details.get("backends", {}).values()))
            models.add_metric((name, engine.fingerprint, ",".join(backends)), 1)
        yield models
        yield from self._collections()
        if torch.cuda.is_available():
            memory = torch.cuda.memory_allocated()
            yield GaugeMetricFamily("semblance_gpu_memory_bytes", "Held by tensors on the GPU", memory)

    def _collections(self) -> Iterator[Metric]:
        label = ("collection",)
        items = GaugeMetricFamily("semblance_collection_items", "Items of a collection", labels=label)
        indexed = GaugeMetricFamily(
            "semblance_collection_indexed_items", "Those that its graph or codes cover", labels=label
        )
        ages = GaugeMetricFamily(
            "semblance_index_age_seconds", "Since its graph or codes were kept on the disk", labels=label
        )
        collections = self._service.collections
        for name in collections.names():
            try:
                count, covered, kept = collections.coverage(name)
            except SemblanceError:  # deleted since, or the database is away: the other figures are wanted all the more
                continue
            items.add_metric((name,), count)
            indexed.add_metric((name,), covered)
            if kept is not None:
                ages.add_metric((name,), max(0.0, time.time() - kept))
        yield from (items, indexed, ages)
