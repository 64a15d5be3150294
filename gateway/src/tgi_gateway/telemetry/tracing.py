"""Traces over OTLP: one span per HTTP request, and below it validate, queue, prefill and decode.

The HTTP worker makes the request's span, a child of the `traceparent` that came with it (W3C Trace Context), and
`validate`; the request carries its context to the engine host, which makes the other three. Spans are made from times
that are taken anyway, when they are over: nothing is done per token. Without ``--otlp-endpoint`` OpenTelemetry is never
imported.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tgi_gateway.errors import PluginError
from tgi_gateway.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

FLUSH_MS = 2000
"""For the last spans of a process that ends."""
_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc")

Attribute = str | int | float | bool


def check(settings: Settings) -> None:
    """Raise `PluginError` if traces are wanted and what exports them is not installed."""
    if settings.otlp_endpoint is not None and not all(map(_found, _NEEDED)):
        raise PluginError(
            '--otlp-endpoint needs OpenTelemetry, which is not installed: pip install "tgi-gateway[otel]"'
        )


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


class Tracing:
    """Spans of one process, sent by a thread of their own. Times are time.perf_counter() seconds."""

    def __init__(self, endpoint: str, service_name: str, process: str) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": service_name, "process.name": process})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tgi_gateway")
        self._propagator = TraceContextTextMapPropagator()

    @staticmethod
    def of(settings: Settings, process: str) -> Tracing | None:
        """As the settings say; None: no traces are wanted."""
        if settings.otlp_endpoint is None:
            return None
        return Tracing(settings.otlp_endpoint, settings.otlp_service_name, process)

    def begin(self, name: str, traceparent: str, attributes: Mapping[str, Attribute]) -> RequestSpan:
        """The span of an HTTP request that begins now, below what `traceparent` names, if it is valid."""
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            name, self._context(traceparent), kind=SpanKind.SERVER, attributes=dict(attributes)
        )
        carrier: dict[str, str] = {}
        from opentelemetry.trace import set_span_in_context

        self._propagator.inject(carrier, set_span_in_context(span))
        return RequestSpan(span, carrier.get("traceparent", ""))

    def add(
        self, name: str, traceparent: str, began: float, ended: float, attributes: Mapping[str, Attribute] | None = None
    ) -> None:
        """A span that is over, below what `traceparent` names."""
        now, wall_ns = time.perf_counter(), time.time_ns()
        span = self._tracer.start_span(
            name,
            self._context(traceparent),
            attributes=dict(attributes or {}),
            start_time=wall_ns - int((now - began) * 1e9),
        )
        span.end(wall_ns - int((now - ended) * 1e9))

    def flush(self) -> None:
        """Send what waits, within `FLUSH_MS`. Blocks."""
        self._provider.force_flush(FLUSH_MS)

    def _context(self, traceparent: str) -> Context:
        return self._propagator.extract({"traceparent": traceparent})


class RequestSpan:
    """The open span of an HTTP request."""

    def __init__(self, span: Span, traceparent: str) -> None:
        self._span = span
        self.traceparent = traceparent
        """Names it to others."""

    def set(self, **attributes: Attribute) -> None:
        self._span.set_attributes(attributes)

    def fail(self, error_type: str, text: str) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("error.type", error_type)
        self._span.set_status(StatusCode.ERROR, text)

    def end(self, status: int) -> None:
        """`status`: of the HTTP response; 0: there was none."""
        if status:
            self._span.set_attribute("http.response.status_code", status)
        self._span.end()
