"""What one step costs the engine host's Python: CPU time of every stage at so many decoding rows, without a model.

    python bench/host.py [--rows 256] [--context 512] [--workers 4]

A null Runner answers each step at once; batcher, dispatch with its metrics, the wire's split and protobuf are the real
ones. Step loop and gRPC share one interpreter lock, so all stages of a step must fit beside its launches into the time
of a step. Times are this thread's CPU time, median and fastest tenth of the steps. bench/gateway.py measures the HTTP
worker's side per token, bench/targets.py --backend simulated all of it together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from machine import machine

from tgi_gateway.backend import ModelInfo
from tgi_gateway.host.dispatch import Dispatch
from tgi_gateway.telemetry.metrics import DIRECTORY_VARIABLE, HostMetrics, Metrics
from tgi_gateway.testing.manual import ManualBackend
from tgi_gateway.types import NO_LOGPROB, Request, SamplingParams, StepEvents, StopRules
from tgi_gateway.wire import engine_pb2 as pb
from tgi_gateway.wire.channel import WORKER_SHIFT
from tgi_gateway.wire.codec import decode_step, encode_step
from tgi_gateway.wire.server import split_by_worker
from tgi_model_server.batcher import Batcher, BatchLimits, Step
from tgi_model_server.plan import StepResult
from tgi_model_server.plan_wire import PlanDecoder, PlanEncoder

VOCABULARY = 32_000
PAGE_SIZE = 16
STEPS = 300
"""Measured ones, after as many as two pages of tokens."""


class NoSlots:
    """Per-sequence state of nobody."""

    def admit(self, slot: int, request: Request, output_ids: Sequence[int], constraint: object = None) -> None:
        pass

    def release(self, slot: int) -> None:
        pass


class Stages:
    """CPU seconds by stage."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def time(self, stage: str, call: Callable[..., Any], *arguments: Any) -> Any:
        began_s = time.thread_time()
        result = call(*arguments)
        self.times.setdefault(stage, []).append(time.thread_time() - began_s)
        return result

    def table(self) -> dict[str, dict[str, float]]:
        """Microseconds."""
        found = {}
        for stage, times in self.times.items():
            ordered = sorted(times)
            found[stage] = {"median": ordered[len(ordered) // 2] * 1e6, "p10": ordered[len(ordered) // 10] * 1e6}
        return found


def requests(rows: int, context: int, workers: int) -> list[Request]:
    """Of all workers in turn."""
    rng = random.Random(0)
    sampling = SamplingParams()
    stop = StopRules(STEPS + 10 * PAGE_SIZE, ignore_eos=True)
    return [
        Request(row | (row % workers) << WORKER_SHIFT, tuple(rng.choices(range(VOCABULARY), k=context)), sampling, stop)
        for row in range(rows)
    ]


def batcher_steps(stages: Stages, asked: Sequence[Request], context: int) -> list[StepEvents]:
    """Steady decode at depth 2; the events of every step."""
    rows, length = len(asked), context + STEPS + 10 * PAGE_SIZE
    pages = rows * (-(-length // PAGE_SIZE) + 1) + 1
    batcher = Batcher(BatchLimits(PAGE_SIZE, pages, rows, 8192, length, length, VOCABULARY), NoSlots(), ())
    for request in asked:
        batcher.add(request, 0.0)
    encoder, decoder = PlanEncoder(), PlanDecoder()
    in_flight: list[Step] = []
    steps: list[StepEvents] = []
    unmeasured, settling = Stages(), 2 * PAGE_SIZE
    while len(steps) < STEPS:
        now = unmeasured if settling else stages
        step = now.time("batcher: plan", batcher.plan)
        assert step is not None
        body = now.time("ranks: encode plan", encoder.encode, step.plan)
        now.time("ranks: decode plan, on each other rank", decoder.decode, body)
        in_flight.append(step)
        if len(in_flight) < 2:
            continue
        done = in_flight.pop(0)
        count = len(done.sampled)
        now.time("batcher: complete", batcher.complete, done, StepResult([7] * count, [NO_LOGPROB] * count))
        events = batcher.take_events()
        if not settling:
            steps.append(events)
        elif len(events.request_ids) == rows:
            settling -= 1
    return steps


async def host_steps(stages: Stages, asked: Sequence[Request], steps: Sequence[StepEvents]) -> None:
    longest = max(len(request.input_ids) + request.stop.max_new_tokens for request in asked)
    tokens = longest * len(asked)
    info = ModelInfo("null", longest, longest + 1, tokens, 8192, len(asked), 32_000, ())
    engine = ManualBackend(info)
    dispatch = Dispatch(engine, max_concurrent_requests=len(asked))
    told: list[StepEvents] = []
    await dispatch.start(told.append)
    dispatch.observe(HostMetrics(Metrics(), max_batch_total_tokens=tokens, capacity=dispatch.capacity))
    for request in asked:
        dispatch.submit(request)
    for events in steps:
        stages.time("dispatch and metrics", engine.emit, events)
        parts = stages.time("wire: split by worker", split_by_worker, told.pop())
        messages = stages.time("wire: encode", encode_all, list(parts.values()), dispatch)
        stages.time("HTTP workers, all together: decode", decode_all, messages)
    await dispatch.stop(0.0)


def encode_all(parts: Sequence[StepEvents], dispatch: Dispatch) -> list[bytes]:
    return [pb.FromHost(step=encode_step(part, dispatch.capacity())).SerializeToString() for part in parts]


def decode_all(messages: Sequence[bytes]) -> list[StepEvents]:
    return [decode_step(pb.FromHost.FromString(message).step) for message in messages]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--context", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--workers", type=int, default=4, help="HTTP workers")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    stages, asked = Stages(), requests(options.rows, options.context, options.workers)
    steps = batcher_steps(stages, asked, options.context)
    with tempfile.TemporaryDirectory() as shared:
        os.environ[DIRECTORY_VARIABLE] = shared  # as the launcher sets it
        asyncio.run(host_steps(stages, asked, steps))
    table = stages.table()
    print(
        f"{options.rows} rows, {options.workers} HTTP workers\n\n{'CPU time of one step':44}{'median us':>10}{'p10':>8}"
    )
    for stage, times in table.items():
        print(f"{stage:44}{times['median']:>10.0f}{times['p10']:>8.0f}")
    host = [times for stage, times in table.items() if stage.startswith(("batcher", "dispatch", "wire"))]
    print(f"{'engine host, together':44}{sum(t['median'] for t in host):>10.0f}{sum(t['p10'] for t in host):>8.0f}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "stages_us": table}, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
