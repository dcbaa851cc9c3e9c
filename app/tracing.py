"""Spans of OpenTelemetry: a request, and what it waited for. They go to a collector if the environment names one.

Like the log, spans hold no path, no query and no message of an error, for these are what was asked. FastAPI's own, and
those of opentelemetry-instrumentation-asgi, hold path and query, so a request's is begun in app/middleware.py.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from models.errors import SemblanceError

# OpenTelemetry's own names; its SDK reads the rest of them (headers, sampler, service name) by itself.
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_TRACER = trace.get_tracer("semblance")
_PROPAGATOR = TraceContextTextMapPropagator()


def configure() -> None:
    """Send spans to where OTEL_EXPORTER_OTLP_ENDPOINT says, as protobuf over HTTP; without it there are none.

    Raises:
        SemblanceError: it is set, and what sends them is not installed.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SemblanceError(
            f"{_ENDPOINTS[0]} is set, but what sends traces is not installed:"
            " pip install 'semblance[tracing]', or unset it"
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME", "semblance")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))  # sends what is left at exit
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def sent_by(traceparent: str) -> Context:
    """The context that a request's header names (W3C Trace Context); an empty one, if it names none."""
    return _PROPAGATOR.extract({"traceparent": traceparent}, Context())


def span(
    name: str,
    context: Context | None = None,
    kind: trace.SpanKind = trace.SpanKind.INTERNAL,
    **attributes: str | int,
) -> AbstractContextManager[trace.Span]:
    """A span of the request that is being answered, or of the `context` given, while it is entered."""
    return _TRACER.start_as_current_span(
        name, context, kind, attributes, record_exception=False, set_status_on_exception=False
    )


def begin(name: str, **attributes: str | int) -> trace.Span:
    """As `span`, but to be ended by whoever began it: what a generator does ends where the generator is closed."""
    return _TRACER.start_span(name, attributes=attributes)
