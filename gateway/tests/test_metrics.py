"""Metrics under TGI's names: what is counted, how it is told, and that several processes add up."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from tgi_gateway.api.generation import Generation
from tgi_gateway.backend import Capacity
from tgi_gateway.host.dispatch import HostObserver, HostStats, StepReport
from tgi_gateway.telemetry import files
from tgi_gateway.telemetry.metrics import (
    DURATIONS,
    HostMetrics,
    Metrics,
    RequestMetrics,
    Tally,
    linear,
)
from tgi_gateway.testing.echo import EchoBackend
from tgi_gateway.types import Finished, Request, SamplingParams, StopRules, Usage

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Words:
    def push(self, token_id: int) -> str:
        return f"{token_id} "

    def flush(self) -> str:
        return ""


def parsed(text: bytes) -> Values:
    """By name and labels. The library's parser adds ``_total`` to the names of counters; Prometheus does not."""
    return {
        (sample.name.removesuffix("_total"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def request_metrics() -> tuple[Metrics, RequestMetrics]:
    metrics = Metrics()
    return metrics, RequestMetrics(metrics, max_input_tokens=1000, max_total_tokens=2000)


def host_metrics(metrics: Metrics, capacity: Capacity | None = None) -> HostMetrics:
    fixed = capacity or Capacity(8, 3, 4000, 1000, preemptions=2)
    return HostMetrics(metrics, max_batch_total_tokens=4000, capacity=lambda: fixed)


def generation(times: list[float], prompt: int = 10, queue_s: float = 0.25, cached: int = 0) -> Generation:
    """Started at 1.0, tokens at `times`, ended with the last."""
    request = Request(1, tuple(range(prompt)), SamplingParams(), StopRules(max_new_tokens=50))
    made = Generation(EchoBackend(), request, Words(), None, {}, lambda _: None)
    made.started_at = 1.0
    for now in times:
        made.push(7, 0.0, (), now)
    made.finish(Finished(1, "length", Usage(prompt, len(times), cached), queue_s), times[-1] if times else 1.0)
    return made


def test_a_generation_is_told_under_tgis_names() -> None:
    metrics, requests = request_metrics()
    requests.count()
    requests.success(generation([2.0, 2.5, 3.0, 4.0], cached=4), arrived_at=0.5)
    told = parsed(metrics.render())
    for name, value in {
        "tgi_request_count": 1,
        "tgi_request_success": 1,
        "tgi_request_duration_sum": 3.5,
        "tgi_request_duration_count": 1,
        "tgi_request_validation_duration_sum": 0.5,
        "tgi_request_queue_duration_sum": 0.25,
        "tgi_request_inference_duration_sum": 2.75,
        "tgi_request_mean_time_per_token_duration_sum": 2.75 / 4,
        "tgi_request_first_token_duration_sum": 1.5,
        "tgi_request_inter_token_duration_sum": 2.0,
        "tgi_request_inter_token_duration_count": 3,
        "tgi_request_generated_tokens_sum": 4,
        "tgi_request_input_length_sum": 10,
        "tgi_request_max_new_tokens_sum": 50,
        "tgi_prompt_tokens": 10,
        "tgi_prefix_cache_hit_tokens": 4,
    }.items():
        assert told[name, ()] == pytest.approx(value), name


def test_tokens_that_come_together_have_no_gap() -> None:
    metrics, requests = request_metrics()
    requests.success(generation([2.0, 2.0, 2.0, 3.0, 4.0, 4.0]), arrived_at=1.0)
    told = parsed(metrics.render())
    assert told["tgi_request_inter_token_duration_count", ()] == 5
    assert told["tgi_request_inter_token_duration_bucket", (("le", repr(DURATIONS[0])),)] == 3


def test_tokens_beyond_the_first_of_a_step_count_as_skipped() -> None:
    metrics = Metrics()
    host = host_metrics(metrics)
    host.stepped(StepReport(0.1, 1, 3, HostStats(0, 4, 9)))
    host.stepped(StepReport(0.1, 0, 6, HostStats(0, 3, 15), tokens_per_request=(3, 1, 2)))
    told = parsed(metrics.render())
    assert told["tgi_request_skipped_tokens_count", ()] == 7
    assert told["tgi_request_skipped_tokens_sum", ()] == 3
    assert told["tgi_request_skipped_tokens_bucket", (("le", "0.0"),)] == 5


def test_an_engine_that_cannot_tell_its_capacity_harms_no_step() -> None:
    def fails() -> Capacity:
        raise RuntimeError("engine is gone")

    metrics = Metrics()
    host = HostMetrics(metrics, max_batch_total_tokens=10, capacity=fails)
    host.stepped(StepReport(0.1, 0, 1, HostStats(0, 0, 0)))
    assert parsed(metrics.render())["tgi_generated_tokens", ()] == 1


def test_a_generation_without_tokens_has_no_first_token_time() -> None:
    metrics, requests = request_metrics()
    requests.success(generation([]), arrived_at=0.0)
    told = parsed(metrics.render())
    assert told["tgi_request_success", ()] == 1
    assert told["tgi_request_first_token_duration_count", ()] == 0


def test_failures_are_told_by_kind() -> None:
    metrics, requests = request_metrics()
    for err in ("overloaded", "validation", "validation"):
        requests.failure(err)
    told = parsed(metrics.render())
    assert told["tgi_request_failure", (("err", "validation"),)] == 2
    assert told["tgi_request_failure", (("err", "overloaded"),)] == 1


def test_buckets_are_tgis() -> None:
    assert len(DURATIONS) == 35
    assert DURATIONS[0] == pytest.approx(0.00015)
    assert DURATIONS[-1] == pytest.approx(0.0001 * 1.5**35)
    assert linear(1000) == tuple(float(10 * step) for step in range(1, 101))
    metrics, _ = request_metrics()
    host_metrics(metrics)
    text = metrics.render().decode()
    assert 'tgi_request_input_length_bucket{le="1000.0"}' in text
    assert 'tgi_request_max_new_tokens_bucket{le="2000.0"}' in text
    assert 'tgi_batch_next_size_bucket{le="1024.0"}' in text


def test_counters_are_told_without_total_and_with_their_type() -> None:
    metrics, requests = request_metrics()
    requests.count()
    text, media_type = requests.exposition()
    assert b"# TYPE tgi_request_count counter\ntgi_request_count 1.0\n" in text
    assert b"_total " not in text
    assert b"_created" not in text
    assert media_type.startswith("text/plain; version=0.0.4")
    assert text == metrics.render()


def test_label_values_are_escaped() -> None:
    metrics, requests = request_metrics()
    requests.failure('a"b\\c\nd')
    assert b'err="a\\"b\\\\c\\nd"' in metrics.render()


@given(values=st.lists(st.floats(0, 300) | st.sampled_from(DURATIONS), max_size=60), cut=st.integers(0, 60))
def test_a_tally_gives_what_the_library_observes(values: list[float], cut: int) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = Tally(Histogram("h", "h", registry=ours, buckets=DURATIONS), DURATIONS)
    tally.extend(values[:cut])
    tally.flush()
    for value in values[cut:]:
        tally.add(value)
    tally.flush()
    tally.flush()
    histogram = Histogram("h", "h", registry=theirs, buckets=DURATIONS)
    for value in values:
        histogram.observe(value)
    for (mine,), (other,) in [(list(ours.collect()), list(theirs.collect()))]:
        for left, right in zip(mine.samples, other.samples, strict=True):
            if not left.name.endswith("_created"):
                assert (left.name, left.labels) == (right.name, right.labels)
                assert left.value == pytest.approx(right.value)


def test_the_host_tells_queue_batch_and_steps() -> None:
    metrics = Metrics()
    host: HostObserver = host_metrics(metrics)
    host.queued(HostStats(5, 0, 0))
    assert parsed(metrics.render())["tgi_queue_size", ()] == 5
    host.admitted(3, HostStats(2, 3, 300), 0.001)
    host.admitted(1, HostStats(2, 4, 310), 0.002)
    host.stepped(StepReport(0.5, prefills=3, decodes=0, stats=HostStats(2, 3, 303)))
    host.stepped(StepReport(0.25, prefills=0, decodes=3, stats=HostStats(2, 3, 306)))
    host.stepped(StepReport(0.25, prefills=0, decodes=2, stats=HostStats(2, 2, 208, 900, 77), failures=1))
    told = parsed(metrics.render())
    prefill, decode = (("method", "prefill"),), (("method", "decode"),)
    for key, value in {
        ("tgi_queue_size", ()): 2,
        ("tgi_batch_current_size", ()): 2,
        ("tgi_batch_total_tokens", ()): 208,
        ("tgi_batch_current_max_tokens", ()): 900,
        ("tgi_queue_prompt_tokens", ()): 77,
        ("tgi_batch_concat", (("reason", "chunking"),)): 1,
        ("tgi_batch_concat_duration_sum", decode): 0.002,
        ("tgi_batch_decode_duration_count", decode): 1,
        ("tgi_batch_filter_duration_count", prefill): 1,
        ("tgi_batch_max_total_tokens", ()): 4000,
        ("tgi_batch_next_size_sum", ()): 4,
        ("tgi_batch_next_size_count", ()): 2,
        ("tgi_batch_inference_count", prefill): 1,
        ("tgi_batch_inference_count", decode): 2,
        ("tgi_batch_inference_success", decode): 1,
        ("tgi_batch_inference_failure", decode): 1,
        ("tgi_batch_inference_duration_sum", prefill): 0.5,
        ("tgi_batch_inference_duration_sum", decode): 0.25,
        ("tgi_batch_forward_duration_count", decode): 1,
        ("tgi_generated_tokens", ()): 8,
        ("tgi_kv_cache_used_tokens", ()): 3000,
        ("tgi_kv_cache_capacity_tokens", ()): 4000,
        ("tgi_preemptions", ()): 2,
    }.items():
        assert told[key] == value, key


def test_preemptions_are_counted_once_however_often_the_engine_tells_them() -> None:
    metrics, told = Metrics(), [0]
    host = HostMetrics(metrics, max_batch_total_tokens=10, capacity=lambda: Capacity(1, 1, 10, 10, preemptions=told[0]))
    for told[0] in (1, 4, 4):
        host.stepped(StepReport(0.1, 0, 1, HostStats(0, 0, 0)))
        metrics.render()
    assert parsed(metrics.render())["tgi_preemptions", ()] == 4


def test_both_kinds_share_one_registry() -> None:
    metrics, requests = request_metrics()
    host_metrics(metrics)
    names = {name for name, _ in parsed(requests.exposition()[0])}
    assert {"tgi_request_count", "tgi_queue_size"} <= names


async def test_observations_from_many_threads_are_all_counted() -> None:
    metrics, requests = request_metrics()

    def work(seed: int) -> None:
        gaps = [random.Random(seed).random() for _ in range(50)]
        for _ in range(20):
            requests.inter_token(gaps)
            metrics.render()

    await asyncio.gather(*(asyncio.to_thread(work, seed) for seed in range(4)))
    assert parsed(metrics.render())["tgi_request_inter_token_duration_count", ()] == 4 * 20 * 50


# Several processes. The library decides at import, so each part is a process of its own, as in production.

WORKER = """
import asyncio, sys
from tgi_gateway.telemetry.metrics import MAX_KEYS, Metrics, RequestMetrics
requests = RequestMetrics(Metrics(sys.argv[1]), max_input_tokens=1000, max_total_tokens=2000)
requests.count()
requests.failure("dropped")
for number in range(MAX_KEYS + 10):
    requests.failure("validation", f"{number:016x}")
async def serve():
    requests.inter_token([0.5, 1.5])
    await asyncio.sleep(0.6)  # flushed by its own timer, not by a scrape
asyncio.run(serve())
"""
HOST = """
import sys
from tgi_gateway.backend import Capacity
from tgi_gateway.host.dispatch import HostStats, StepReport
from tgi_gateway.telemetry.metrics import HostMetrics, Metrics
host = HostMetrics(
    Metrics("engine"), max_batch_total_tokens=10, capacity=lambda: Capacity(4, 4, 10, 8), restarted="again" in sys.argv
)
host.queued(HostStats(int(sys.argv[1]), 0, 0))
host.stepped(StepReport(0.5, 1, 0, HostStats(int(sys.argv[1]), 0, 0)))
"""
RENDER = """
import sys
from tgi_gateway.telemetry.metrics import Metrics
sys.stdout.buffer.write(Metrics().render())
"""


def run(folder: Path, code: str, *arguments: str) -> bytes:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, check=True)
    return done.stdout


def test_several_processes_are_told_as_one(tmp_path: Path) -> None:
    places = ("engine", "http-0", "http-1")
    for place in places:
        files.reserve(tmp_path, place)
    reserved = {path: path.stat().st_size for path in tmp_path.iterdir()}
    run(tmp_path, WORKER, "http-0")
    run(tmp_path, WORKER, "http-1")
    run(tmp_path, HOST, "7")
    told = parsed(run(tmp_path, RENDER))
    assert told["tgi_request_count", ()] == 2
    assert told["tgi_request_failure", (("err", "dropped"),)] == 2
    assert told["tgi_key_failures", (("key", "other"),)] == 20
    assert told["tgi_request_inter_token_duration_sum", ()] == 4.0
    assert told["tgi_request_inter_token_duration_bucket", (("le", "+Inf"),)] == 4
    assert told["tgi_queue_size", ()] == 7

    files.forget(tmp_path, "engine")
    told = parsed(run(tmp_path, RENDER))
    assert ("tgi_queue_size", ()) not in told, "a dead process has no queue"
    assert told["tgi_generated_tokens", ()] == 1, "what it counted stays counted"

    run(tmp_path, HOST, "3", "again")
    told = parsed(run(tmp_path, RENDER))
    assert told["tgi_queue_size", ()] == 3
    assert told["tgi_engine_restarts", ()] == 1
    assert told["tgi_batch_inference_count", (("method", "prefill"),)] == 2, "the next process goes on counting"

    assert {path: path.stat().st_size for path in tmp_path.iterdir()} == reserved, "all fits what was reserved"
