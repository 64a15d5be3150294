"""Prometheus metrics under TGI's names, and a few that TGI lacks.

Several processes serve one port: with PROMETHEUS_MULTIPROC_DIR set, each keeps its values in files there (`files`) and
any HTTP worker tells the sum of all. `prometheus_client` reads the variable when it is imported, so it has to be in
the environment before a process starts.

Observations are tallied in plain lists and reach the registry once per scrape, or twice a second under several
processes: a registry's own observe() would cost more than the rest of a token's way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString

from tgi_gateway.api.generation import Generation
from tgi_gateway.backend import Capacity
from tgi_gateway.host.dispatch import HostStats, StepReport
from tgi_gateway.telemetry import files

log = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FLUSH_S = 0.5
_SAMPLE_CAPACITY_S = 0.5
FAILURES = ("overloaded", "validation", "template", "incomplete", "dropped", "generation")
MAX_KEYS = 256
"""API keys with counters of their own."""

DURATIONS: tuple[float, ...] = tuple(0.0001 * 1.5**k for k in range(1, 36))
"""Upper bounds in seconds, 0.15 ms to 146 s."""
BATCH_SIZES: tuple[float, ...] = tuple(float(size) for size in range(1, 1025))
SKIPPED: tuple[float, ...] = tuple(float(count) for count in range(17))


def linear(limit: int) -> tuple[float, ...]:
    """Hundred equal buckets up to `limit`."""
    return tuple(round(limit / 100 * step, 6) for step in range(1, 101))


class Tally:
    """Observations on their way to a histogram. Not thread-safe: its owner holds a lock."""

    __slots__ = ("_bounds", "_counts", "_histogram", "_sum")

    def __init__(self, histogram: Histogram, bounds: Sequence[float]) -> None:
        self._histogram = histogram
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def extend(self, values: Iterable[float]) -> None:
        counts, bounds = self._counts, self._bounds
        total = 0.0
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        self._sum += total

    def flush(self) -> None:
        if not any(self._counts):
            return
        for index, count in enumerate(self._counts):
            if count:
                # observe() takes one value at a time and searches its bucket from the first on.
                self._histogram._buckets[index].inc(count)
                self._counts[index] = 0
        self._histogram._sum.inc(self._sum)
        self._sum = 0.0


class Metrics:
    """The registry of one process. Metrics are made by `RequestMetrics` and `HostMetrics`, once each."""

    def __init__(self, place: str = "") -> None:
        """`place`: whose files it writes where several processes share a folder; "": its own, by process id."""
        self._directory = os.environ.get(DIRECTORY_VARIABLE)
        if self._directory and place:
            files.use(place)
        self._registry = None if self._directory else CollectorRegistry()
        self._flushes: list[Callable[[], None]] = []

    @property
    def shared(self) -> bool:
        """Whether several processes' values are told together."""
        return self._directory is not None

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry, multiprocess_mode="livemostrecent")

    def histogram(self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, text, labels, registry=self._registry, buckets=bounds)

    def tally(self, name: str, text: str, bounds: Sequence[float]) -> Tally:
        return Tally(self.histogram(name, text, bounds), bounds)

    def on_render(self, flush: Callable[[], None]) -> None:
        self._flushes.append(flush)

    def render(self) -> bytes:
        """All metrics of all processes in the text format; from any thread."""
        for flush in self._flushes:
            flush()
        registry = self._registry
        if registry is None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, self._directory)  # type: ignore[no-untyped-call]
        return b"".join(_exposition(metric) for metric in sorted(registry.collect(), key=lambda metric: metric.name))


def _exposition(metric: Metric) -> bytes:
    """One metric as text. `prometheus_client` would add ``_total`` to counters, whose names are TGI's here."""
    name = metric.name
    lines = [f"# HELP {name} {metric.documentation}", f"# TYPE {name} {metric.type}"]
    for sample in metric.samples:
        if sample.name.endswith("_created"):
            continue
        sample_name = name if metric.type == "counter" else sample.name
        labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in sorted(sample.labels.items()))
        braces = f"{{{labels}}}" if labels else ""
        lines.append(f"{sample_name}{braces} {floatToGoString(sample.value)}")  # type: ignore[no-untyped-call]
    return ("\n".join(lines) + "\n").encode()


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


class RequestMetrics:
    """What an HTTP worker counts. From any thread; reaches other processes within `FLUSH_S` in a running event loop."""

    def __init__(
        self, metrics: Metrics, *, max_input_tokens: int, max_total_tokens: int, restarted: bool = False
    ) -> None:
        """`restarted`: another process was this worker before."""
        self._metrics = metrics
        self._lock = threading.Lock()
        self._flush_due = False
        self._count = metrics.counter("tgi_request_count", "Requests to a generating route")
        self._success = metrics.counter("tgi_request_success", "Finished generations")
        self._failure = metrics.counter("tgi_request_failure", "Requests that ended without their answer", ["err"])
        for err in FAILURES:
            self._failure.labels(err)  # told as 0 before the first, so that a rate sees it
        restarts = metrics.counter("tgi_http_worker_restarts", "Times that an HTTP worker was started again")
        if restarted:
            restarts.inc()
        self._prompt_tokens = metrics.counter("tgi_prompt_tokens", "Prompt tokens of finished generations")
        self._cached_tokens = metrics.counter(
            "tgi_prefix_cache_hit_tokens", "Prompt tokens of finished generations that came from the prefix cache"
        )
        self._engine_up = metrics.gauge("tgi_engine_up", "1 while this server has an engine, 0 while it has none")
        self._engine_up.set(1)
        by_key = ["key"]
        self._key_requests = metrics.counter("tgi_key_requests", "Finished generations by API key", by_key)
        self._key_prompt = metrics.counter("tgi_key_prompt_tokens", "Their prompt tokens", by_key)
        self._key_generated = metrics.counter("tgi_key_generated_tokens", "Their generated tokens", by_key)
        self._key_failures = metrics.counter("tgi_key_failures", "Requests without their answer by API key", by_key)
        self._keys: set[str] = set()
        self._tallies: list[Tally] = []
        self._duration = self._tally("duration", "From arrival to the last token, in seconds", DURATIONS)
        self._validation = self._tally("validation_duration", "From arrival to the queue, in seconds", DURATIONS)
        self._queue = self._tally("queue_duration", "From the queue to the first step, in seconds", DURATIONS)
        self._inference = self._tally("inference_duration", "From the first step to the end, in seconds", DURATIONS)
        self._per_token = self._tally(
            "mean_time_per_token_duration", "Inference duration by generated tokens, in seconds", DURATIONS
        )
        self._first_token = self._tally(
            "first_token_duration", "From arrival to the first token, in seconds", DURATIONS
        )
        self._inter_token = self._tally(
            "inter_token_duration", "Between two tokens of a generation, in seconds", DURATIONS
        )
        self._generated = self._tally("generated_tokens", "Tokens per generation", linear(max_total_tokens))
        self._input_length = self._tally("input_length", "Prompt tokens per generation", linear(max_input_tokens))
        self._max_new_tokens = self._tally(
            "max_new_tokens", "Tokens that a generation may have", linear(max_total_tokens)
        )
        metrics.on_render(self.flush)

    def _tally(self, name: str, text: str, bounds: Sequence[float]) -> Tally:
        tally = self._metrics.tally(f"tgi_request_{name}", text, bounds)
        self._tallies.append(tally)
        return tally

    def count(self) -> None:
        self._count.inc()

    def failure(self, err: str, tenant: str = "") -> None:
        """`err`: one of `FAILURES`."""
        self._failure.labels(err).inc()
        if tenant:
            self._key_failures.labels(self._key(tenant)).inc()

    def engine(self, *, up: bool) -> None:
        self._engine_up.set(up)

    def _key(self, tenant: str) -> str:
        """The label of an API key; from `MAX_KEYS` on they share one, so that a scrape stays small."""
        if tenant not in self._keys and len(self._keys) >= MAX_KEYS:
            return "other"
        self._keys.add(tenant)
        return tenant

    def success(self, generation: Generation, arrived_at: float) -> None:
        """A generation has ended well; `arrived_at` is its request's time.perf_counter()."""
        request, finished = generation.request, generation.finished
        total_s = generation.ended_at - arrived_at
        validation_s = generation.started_at - arrived_at
        self._success.inc()
        self._prompt_tokens.inc(len(request.input_ids))
        if request.tenant:
            key = self._key(request.tenant)
            self._key_requests.labels(key).inc()
            self._key_prompt.labels(key).inc(len(request.input_ids))
            self._key_generated.labels(key).inc(generation.generated_tokens)
        if finished is not None and finished.usage.cached_tokens:
            self._cached_tokens.inc(finished.usage.cached_tokens)
        with self._lock:
            self._duration.add(total_s)
            self._validation.add(validation_s)
            if finished is not None:  # a stop string ends a generation before the engine knows
                inference_s = max(total_s - validation_s - finished.queue_s, 0.0)
                self._queue.add(finished.queue_s)
                self._inference.add(inference_s)
                self._per_token.add(inference_s / max(generation.generated_tokens, 1))
            self._generated.add(generation.generated_tokens)
            self._input_length.add(len(request.input_ids))
            self._max_new_tokens.add(request.stop.max_new_tokens)
            if generation.generated_tokens:
                self._first_token.add(generation.first_token_at - arrived_at)
        self.inter_token(generation.gaps_s)

    def inter_token(self, gaps_s: Sequence[float]) -> None:
        """Seconds between the tokens of one generation; 0.0 between tokens that came together."""
        with self._lock:
            self._inter_token.extend(gaps_s)
        self._flush_soon()

    def exposition(self) -> tuple[bytes, str]:
        """(what /metrics answers, its content type); from any thread."""
        return self._metrics.render(), CONTENT_TYPE

    def flush(self) -> None:
        """Hand the tallies to the registry."""
        with self._lock:
            self._flush_due = False
            for tally in self._tallies:
                tally.flush()

    def _flush_soon(self) -> None:
        if self._flush_due or not self._metrics.shared:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        self._flush_due = True
        loop.call_later(FLUSH_S, self.flush)


class HostMetrics:
    """What the engine host counts; `host.dispatch.HostObserver`."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        max_batch_total_tokens: int,
        capacity: Callable[[], Capacity],
        restarted: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`capacity` is the engine's; it is asked at most twice a second. `restarted`: another engine was before it."""
        self._metrics = metrics
        self._lock = threading.Lock()
        self._clock = clock
        self._capacity = capacity
        self._flushed_at = self._sampled_at = -1e9
        self._before = Capacity(0, 0, 0, 0)
        self._stats = HostStats(0, 0, 0)
        self._queue_size = metrics.gauge("tgi_queue_size", "Requests that wait for the engine")
        self._queue_tokens = metrics.gauge("tgi_queue_prompt_tokens", "Prompt tokens of the requests that wait")
        self._batch_size = metrics.gauge("tgi_batch_current_size", "Requests in the engine")
        self._batch_tokens = metrics.gauge("tgi_batch_total_tokens", "Tokens of the requests in the engine")
        self._batch_max_tokens = metrics.gauge(
            "tgi_batch_current_max_tokens", "Tokens that the requests in the engine will have at most"
        )
        maximum = metrics.gauge(
            "tgi_batch_max_total_tokens", "Tokens that the requests in the engine may have together"
        )
        maximum.set(max_batch_total_tokens)
        self._kv_used = metrics.gauge("tgi_kv_cache_used_tokens", "Tokens in the KV cache that running requests hold")
        self._kv_total = metrics.gauge("tgi_kv_cache_capacity_tokens", "Tokens that the KV cache can hold")
        self._preemptions = metrics.counter("tgi_preemptions", "Sequences that lost their KV pages and started anew")
        self._drafted = metrics.counter("tgi_speculation_drafted_tokens", "Tokens that speculation has guessed")
        self._accepted = metrics.counter("tgi_speculation_accepted_tokens", "Guessed tokens that were right")
        restarts = metrics.counter("tgi_engine_restarts", "Times that the engine was started again")
        if restarted:
            restarts.inc()
        self._concats = metrics.counter(
            "tgi_batch_concat", "Times that requests joined those in the engine", ["reason"]
        ).labels("chunking")
        self._concat_duration = Tally(
            metrics.histogram("tgi_batch_concat_duration", "Seconds to hand them over", DURATIONS, ["method"]).labels(
                "decode"
            ),
            DURATIONS,
        )
        self._generated = metrics.counter("tgi_generated_tokens", "Tokens that the engine has generated")
        self._next_size = metrics.tally("tgi_batch_next_size", "Requests that entered the engine together", BATCH_SIZES)
        self._skipped = metrics.tally(
            "tgi_request_skipped_tokens", "Tokens beyond the first that a step gave a request", SKIPPED
        )
        by_method = ["method"]
        counts = metrics.counter("tgi_batch_inference_count", "Steps of the engine", by_method)
        successes = metrics.counter("tgi_batch_inference_success", "Steps without a failed request", by_method)
        failures = metrics.counter("tgi_batch_inference_failure", "Steps in which requests failed", by_method)
        durations = metrics.histogram("tgi_batch_inference_duration", "Seconds per step", DURATIONS, by_method)
        forwards = metrics.histogram(
            "tgi_batch_forward_duration",
            "Seconds per step as the host sees it; the engine's own work between two steps runs beside the model",
            DURATIONS,
            by_method,
        )
        decodes = metrics.histogram(
            "tgi_batch_decode_duration", "Seconds per step to see whose the tokens are", DURATIONS, by_method
        )
        filters = metrics.histogram(
            "tgi_batch_filter_duration", "Seconds per step to hand tokens and endings on", DURATIONS, by_method
        )
        self._methods = {
            method: _Method(
                counts.labels(method),
                successes.labels(method),
                failures.labels(method),
                *(Tally(each.labels(method), DURATIONS) for each in (durations, forwards, decodes, filters)),
            )
            for method in ("prefill", "decode")
        }
        self._pending_tokens = 0
        metrics.on_render(self.flush)
        self.flush()

    def queued(self, stats: HostStats) -> None:
        with self._lock:
            self._stats = stats
            self._set_gauges()

    def admitted(self, requests: int, stats: HostStats, took_s: float) -> None:
        with self._lock:
            self._stats = stats
            self._next_size.add(requests)
            if stats.running > requests:
                self._concats.inc()
                self._concat_duration.add(took_s)
            self._set_gauges()

    def stepped(self, report: StepReport) -> None:
        now = self._clock()
        with self._lock:
            self._stats = report.stats
            self._methods["prefill" if report.prefills else "decode"].add(report)
            tokens = report.prefills + report.decodes
            self._pending_tokens += tokens
            if report.tokens_per_request:
                self._skipped.extend(got - 1 for got in report.tokens_per_request)
            else:
                self._skipped.add(0, tokens)
            # An idle engine has no later step that would bring the last values out.
            if self._metrics.shared and (now - self._flushed_at >= FLUSH_S or not report.stats.running):
                self._flush(now)

    def flush(self) -> None:
        """Hand everything to the registry."""
        with self._lock:
            self._flush(self._clock())

    def _flush(self, now: float) -> None:
        self._flushed_at = now
        self._set_gauges()
        self._generated.inc(self._pending_tokens)
        self._pending_tokens = 0
        for tally in (self._next_size, self._skipped, self._concat_duration):
            tally.flush()
        for method in self._methods.values():
            method.flush()
        if now - self._sampled_at >= _SAMPLE_CAPACITY_S or not self._stats.running:
            self._sampled_at = now
            self._sample_capacity()

    def _set_gauges(self) -> None:
        self._queue_size.set(self._stats.queue_size)
        self._batch_size.set(self._stats.running)
        self._queue_tokens.set(self._stats.queue_tokens)
        self._batch_tokens.set(self._stats.batch_tokens)
        self._batch_max_tokens.set(self._stats.batch_max_tokens)

    def _sample_capacity(self) -> None:
        try:
            capacity = self._capacity()
        except Exception:  # an observer must not raise; the host reports the same when it admits
            log.debug("the engine could not tell its capacity", exc_info=True)
            return
        self._kv_total.set(capacity.total_kv_tokens)
        self._kv_used.set(capacity.total_kv_tokens - capacity.free_kv_tokens)
        before, self._before = self._before, capacity
        for counter, now, then in (
            (self._preemptions, capacity.preemptions, before.preemptions),
            (self._drafted, capacity.drafted_tokens, before.drafted_tokens),
            (self._accepted, capacity.accepted_tokens, before.accepted_tokens),
        ):
            counter.inc(max(now - then, 0))


class _Method:
    """Steps that brought first tokens, or those that did not."""

    __slots__ = ("_counts", "_durations", "_failed", "_pending")

    def __init__(self, count: Counter, success: Counter, failure: Counter, *durations: Tally) -> None:
        self._counts = (count, success, failure)
        self._durations = durations
        self._pending = self._failed = 0

    def add(self, report: StepReport) -> None:
        self._pending += 1
        if report.failures:
            self._failed += 1
        else:
            seconds = (report.duration_s, report.duration_s, report.handling_s, report.telling_s)
            for tally, value in zip(self._durations, seconds, strict=True):
                tally.add(value)

    def flush(self) -> None:
        if self._pending:
            for counter, steps in zip(
                self._counts, (self._pending, self._pending - self._failed, self._failed), strict=True
            ):
                counter.inc(steps)
            self._pending = self._failed = 0
            for tally in self._durations:
                tally.flush()
