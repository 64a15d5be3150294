"""Traces, as a real collector gets them."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import httpx
import pytest
from launched import WAIT_S, serving
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as wire
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(TraceServiceServicer):
    """Keeps what is exported to it."""

    def __init__(self) -> None:
        self.port = 0
        self._lock = threading.Lock()
        self._spans: list[tuple[str, str, Span]] = []

    def Export(self, request: wire.ExportTraceServiceRequest, _context: object) -> wire.ExportTraceServiceResponse:
        with self._lock:
            for each in request.resource_spans:
                facts = {fact.key: fact.value.string_value for fact in each.resource.attributes}
                for scope in each.scope_spans:
                    self._spans += [(facts["service.name"], facts["process.name"], span) for span in scope.spans]
        return wire.ExportTraceServiceResponse()

    def wait_for(self, count: int) -> list[tuple[str, str, Span]]:
        deadline = time.monotonic() + WAIT_S
        while True:
            with self._lock:
                if len(self._spans) >= count:
                    return list(self._spans)
            assert time.monotonic() < deadline, [span.name for *_, span in self._spans]
            time.sleep(0.05)


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector
    server.stop(None)


def test_a_request_is_one_trace_over_gateway_and_engine(byte_model: Path, collector: Collector) -> None:
    arguments = ("--otlp-endpoint", f"http://127.0.0.1:{collector.port}", "--otlp-service-name", "llm")
    with serving(byte_model, *arguments, "--echo-step-ms", "10") as gateway:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        body = {"inputs": "abc", "parameters": {"max_new_tokens": 5}}
        assert httpx.post(f"{gateway.url}/generate", json=body, headers=headers).status_code == 200
        headers["traceparent"] = "nonsense"
        assert httpx.post(f"{gateway.url}/generate", json={"inputs": ""}, headers=headers).status_code == 422
        httpx.get(f"{gateway.url}/health")
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.end() == 0
    told = collector.wait_for(6)
    assert {service for service, *_ in told} == {"llm"}
    spans = {span.name: (process, span) for _, process, span in told if span.trace_id.hex() == TRACE}
    assert {name: process for name, (process, _) in spans.items()} == {
        "POST /generate": "http-0",
        "validate": "http-0",
        "queue": "engine",
        "prefill": "engine",
        "decode": "engine",
    }
    root = spans["POST /generate"][1]
    assert root.parent_span_id.hex() == PARENT
    facts = {fact.key: fact.value for fact in root.attributes}
    assert facts["request_id"].string_value == "mine"
    assert facts["generated_tokens"].int_value == 5
    assert facts["http.response.status_code"].int_value == 200
    assert facts["total_time"].string_value.endswith("s")
    order = [spans[name][1] for name in ("validate", "queue", "prefill", "decode")]
    assert all(span.parent_span_id == root.span_id for span in order)
    slack_ns = 5_000_000  # two clocks are read one after the other
    for before, after in itertools.pairwise(order):
        assert before.start_time_unix_nano <= before.end_time_unix_nano <= after.start_time_unix_nano + slack_ns
    assert order[-1].end_time_unix_nano <= root.end_time_unix_nano + slack_ns
    (refused,) = [span for *_, span in told if span.trace_id.hex() != TRACE]
    assert refused.status.code == 2
    assert refused.parent_span_id == b""


def test_a_collector_that_is_away_costs_no_request_anything(byte_model: Path) -> None:
    with serving(byte_model, "--otlp-endpoint", "http://127.0.0.1:9") as gateway:
        body = {"inputs": "abc", "parameters": {"max_new_tokens": 5}}
        for _ in range(5):
            assert httpx.post(f"{gateway.url}/generate", json=body, timeout=WAIT_S).status_code == 200
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.end() == 0
        assert gateway.left_behind() == []
