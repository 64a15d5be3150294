"""A real step loop turned by hand: what a step takes, the host's part of it, and what the device must do at least."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from limits import Ceilings, synchronize

from tgi_gateway.errors import StartError
from tgi_gateway.types import Request, SamplingParams, StepEvents, StopRules
from tgi_model_server.batcher import BatchLimits
from tgi_model_server.engine import Engine
from tgi_model_server.loop import StepLoop
from tgi_model_server.models.config import ModelConfig

PARTS = ("plan", "launch", "read", "emit")
TRACE_CONTEXT = 512
SETTLING_STEPS = 8
MOST_SECONDS = 60.0
"""For one measurement."""


class TimedRunner:
    """The engine as a Runner that adds up the time in which the loop starts and awaits steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.admit, self.release = engine.admit, engine.release
        self.page_size, self.num_pages = engine.page_size, engine.num_pages
        self.max_sequences, self.pipeline_depth = engine.max_sequences, engine.pipeline_depth

    def run(self, plan: Any) -> Any:
        output = self.timed("launch", self.engine.run)(plan)
        return _TimedOutput(self.timed("read", output.wait))

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*arguments: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.spent[part] += time.perf_counter() - began_s

        return timing


@dataclass(frozen=True, slots=True)
class _TimedOutput:
    wait: Callable[[], Any]


@dataclass
class Drive:
    """A step loop that is turned by hand, with the time of every part."""

    runner: TimedRunner
    loop: StepLoop
    generated: int = 0
    failed: list[str] = field(default_factory=list)

    @staticmethod
    def of(engine: Engine, limits: BatchLimits) -> Drive:
        runner = TimedRunner(engine)
        drive = Drive(runner, StepLoop(runner, limits, engine.eos_token_ids, lambda events: drive.take(events)))
        batcher: Any = drive.loop.batcher
        batcher.plan = runner.timed("plan", batcher.plan)
        batcher.complete = runner.timed("emit", batcher.complete)
        batcher.take_events = runner.timed("emit", batcher.take_events)
        return drive

    def take(self, events: StepEvents) -> None:
        self.generated += len(events.token_ids)
        self.failed += [failed.message for failed in events.failed]

    def submit(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> None:
        for number, prompt in enumerate(prompts):
            self.loop.submit(Request(number, prompt, SamplingParams(), StopRules(new_tokens, ignore_eos=True)))

    def turn(self) -> None:
        """One step. Raises `StartError` if it broke."""
        if not self.loop.turn() or self.failed:
            raise StartError(f"a step broke: {self.loop.failure or self.failed[0]}")

    def empty(self) -> None:
        for sequence in list(self.loop.batcher):
            self.loop.cancel(sequence.request.request_id)
        while self.loop.has_work():
            self.loop.turn()


@dataclass(frozen=True)
class Work:
    """What a step of this model must do at least."""

    config: ModelConfig
    weight_bytes: int
    """Of one weight."""
    kv_bytes: int
    """Of one token, keys and values of all layers."""

    def decode_s(self, rows: int, context: int, ceilings: Ceilings) -> float:
        """Every weight and every row's KV read once; the products, if they take longer than the weights' reading."""
        weights = self._weights + self.config.vocab_size * self.config.hidden_size
        products_s = 2 * weights * rows / ceilings.flops_per_s
        return (
            max(weights * self.weight_bytes / ceilings.bytes_per_s, products_s)
            + rows * context * self.kv_bytes / ceilings.bytes_per_s
        )

    def prefill_s(self, tokens: int, context: int, ceilings: Ceilings) -> float:
        """Products of `tokens` new tokens behind `context` older ones; attention's half above the diagonal is none."""
        config = self.config
        pairs = tokens * (context + tokens / 2)
        attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
        return max(
            (2 * self._weights * tokens + attention) / ceilings.flops_per_s,
            self._weights * self.weight_bytes / ceilings.bytes_per_s,
        )

    @property
    def _weights(self) -> int:
        """Without vocabularies."""
        config = self.config
        vocabularies = 1 if config.tie_word_embeddings else 2
        return config.num_parameters - vocabularies * config.vocab_size * config.hidden_size


@dataclass
class Bench:
    """Measurements of one engine."""

    engine: Engine
    limits: BatchLimits
    device: torch.device
    ceilings: Ceilings
    work: Work
    steps: int
    rng: random.Random

    def decode(self, rows: int, context: int) -> dict[str, Any]:
        """The mean step of `rows` sequences that have about `context` tokens each."""
        drive, steps = self._decoding(rows, context, self.steps), self.steps
        drive.runner.spent = dict.fromkeys(PARTS, 0.0)
        times: list[float] = []
        synchronize(self.device)
        began_s = at_s = time.perf_counter()
        while len(times) < steps and at_s - began_s < MOST_SECONDS:
            drive.turn()
            now_s = time.perf_counter()
            times.append(now_s - at_s)
            at_s = now_s
        step_s = (at_s - began_s) / len(times)
        spent = {part: value / len(times) for part, value in drive.runner.spent.items()}
        drive.empty()
        limit_s = self.work.decode_s(rows, context + SETTLING_STEPS + steps // 2, self.ceilings)
        return {
            "rows": rows,
            "context": context,
            "step_ms": step_s * 1e3,
            "longest_ms": max(times) * 1e3,
            "tokens_per_s": rows / step_s,
            "limit_ms": limit_s * 1e3,
            "of_limit": limit_s / step_s,
            "host_us": {part: value * 1e6 for part, value in spent.items()},
        }

    def prefill(self, chunk: int, length: int) -> list[dict[str, Any]]:
        """One prompt of `length` tokens in chunks: its first, middle and last one."""
        drive = Drive.of(self.engine, dataclasses.replace(self.limits, max_step_tokens=chunk, prefix_caching=False))
        found: list[dict[str, Any]] = []
        times: dict[int, list[float]] = {}
        # The first prompt meets every shape for the first time.
        for _ in range(3):
            drive.submit([self._prompt(length)], 1)
            synchronize(self.device)
            at_s, ends = time.perf_counter(), []
            while drive.loop.has_work():
                completed = drive.loop.batcher.stats.steps
                drive.turn()
                synchronize(self.device)
                now_s = time.perf_counter()
                if drive.loop.batcher.stats.steps > completed:
                    ends.append(now_s - at_s)
                at_s = now_s
            for number, took_s in enumerate(ends):
                times.setdefault(number, []).append(took_s)
        count = -(-length // chunk)
        for number in sorted({0, (count - 1) // 2, max(count - 2, 0)}):
            context = number * chunk
            tokens = min(chunk, length - context)
            took_s = min(times[number])
            limit_s = self.work.prefill_s(tokens, context, self.ceilings)
            found.append(
                {
                    "chunk": tokens,
                    "context": context,
                    "step_ms": took_s * 1e3,
                    "tokens_per_s": tokens / took_s,
                    "limit_ms": limit_s * 1e3,
                    "of_limit": limit_s / took_s,
                }
            )
        return found

    def trace(self, rows: int, path: Path) -> dict[str, Any]:
        """A profiler trace of steady decode, written to `path`; busy time is what any kernel or copy covers."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type != "cpu":
            name = {"cuda": "CUDA", "xpu": "XPU"}.get(self.device.type, "PrivateUse1")
            activities.append(getattr(torch.profiler.ProfilerActivity, name))
        steps = min(self.steps, 50)
        drive = self._decoding(rows, TRACE_CONTEXT, steps)
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            for _ in range(steps):
                drive.turn()
            synchronize(self.device)
        drive.empty()
        profiler.export_chrome_trace(str(path))
        busy = busy_share(path)
        return {"rows": rows, "steps": steps, "busy_share": busy, "file": str(path)}

    def _decoding(self, rows: int, context: int, steps: int) -> Drive:
        """A loop whose `rows` sequences have been prefilled, and decode `steps` times at least."""
        drive = Drive.of(self.engine, self.limits)
        drive.submit([self._prompt(context) for _ in range(rows)], SETTLING_STEPS + 2 * steps + rows)
        batcher = drive.loop.batcher
        while True:
            before = batcher.stats.prefill_tokens
            drive.turn()
            if batcher.running == rows and not batcher.waiting and batcher.stats.prefill_tokens == before:
                break
        for _ in range(SETTLING_STEPS):
            drive.turn()
        return drive

    def _prompt(self, tokens: int) -> tuple[int, ...]:
        return tuple(self.rng.choices(range(self.engine.vocab_size), k=tokens))

    def fits(self, rows: int, context: int) -> str | None:
        """Why such a step is impossible here."""
        tokens = context + SETTLING_STEPS + 2 * self.steps + rows
        pages = rows * -(-tokens // self.limits.page_size)
        if rows > self.limits.max_sequences:
            return f"at most {self.limits.max_sequences} rows"
        if tokens > self.limits.max_total_tokens:
            return f"at most {self.limits.max_total_tokens} tokens per sequence"
        if pages >= self.limits.num_pages:
            return f"{pages} pages are needed, {self.limits.num_pages - 1} are there"
        return None


def busy_share(path: Path) -> float | None:
    """Part of the time from the first to the last device activity in a chrome trace that some activity covers."""
    events = json.loads(path.read_text("utf-8"))["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds
    )
    if not spans:
        return None
    covered, end = 0.0, spans[0][0]
    for begin, stop in spans:
        if stop > end:
            covered += stop - max(begin, end)
            end = stop
    return float(covered / (end - spans[0][0]))
