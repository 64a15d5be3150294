"""SteppedBackend: the Backend of every engine that runs in steps. A Runner, a step loop around it, and its life.

No torch: what computes the steps is the Runner's affair.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tgi_gateway.backend import Backend, Capabilities, Capacity, Emit, ModelInfo, refuse_unsupported
from tgi_gateway.errors import GatewayError, ModelError, SettingsError, StartError, Unhealthy
from tgi_gateway.telemetry import logs
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StepEvents, StopRules
from tgi_model_server.batcher import BatchLimits
from tgi_model_server.loop import StepLoop
from tgi_model_server.runner import Runner
from tgi_model_server.sampling.compiler import GrammarCompiler, Outcome
from tgi_model_server.sampling.grammar import Constraint, Vocabulary

log = logging.getLogger(__name__)

PROBE_ID = (1 << 64) - 1
"""Request id of the generation that `health` makes."""
PROBE_TIMEOUT_S = 30.0
STALL_S = 120.0
"""A busy engine that finished no step for so long is not healthy."""
LOSS_POLL_S = 0.2
WARM_UP_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine whose model is in memory."""

    runner: Runner
    limits: BatchLimits
    info: ModelInfo
    vocabulary: Callable[[], Vocabulary]
    """The tokens as grammars want them. Called once, in a thread of its own; its error refuses grammars alone."""
    close: Callable[[], None]
    """Give the memory back. Called when no step runs any more."""
    watch: Callable[[Callable[[str], None]], None] | None = None
    """Is given what to call, with the reason, when the engine is found lost outside of a step."""


class SteppedBackend(Backend, ABC):
    """`load` is what an engine has to bring."""

    def __init__(self, capabilities: Capabilities) -> None:
        self._capabilities = capabilities
        self._loaded: Loaded | None = None
        self._loop: StepLoop | None = None
        self._compiler: GrammarCompiler | None = None
        self._probe: _Probe | None = None
        self._probing = asyncio.Lock()
        self._stopping = asyncio.Lock()

    @abstractmethod
    def load(self) -> Loaded:
        """Read the model and make room for its keys and values. Called once, in a thread. Raises `StartError`.

        What it raises otherwise is told as a `StartError`; it leaves nothing behind then.
        """

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    async def start(self, emit: Emit) -> ModelInfo:
        assert self._loop is None, "start() comes once"

        def emit_without_probe(events: StepEvents) -> None:
            probe = self._probe
            if probe is not None:
                events = probe.take_from(events)
            if events:
                emit(events)

        loaded = self._loaded = await asyncio.to_thread(self._load)
        loop = self._loop = StepLoop(loaded.runner, loaded.limits, loaded.info.eos_token_ids, emit_without_probe)
        loop.start()
        if "grammar" in self._capabilities.features:
            self._compiler = _start_compiler(loop, loaded.vocabulary)
        if loaded.watch is not None:
            loaded.watch(loop.lose)
        return loaded.info

    def submit(self, request: Request) -> None:
        try:
            refuse_unsupported(request, self._capabilities)
        except GatewayError as error:
            self._running_loop.submit(request, error)
            return
        if request.sampling.grammar is None:
            self._running_loop.submit(request)
        else:
            assert self._compiler is not None, "start() comes first"
            self._compiler.submit(request)

    def cancel(self, request_id: int) -> None:
        if self._compiler is None or not self._compiler.cancel(request_id):
            self._running_loop.cancel(request_id)

    def capacity(self) -> Capacity:
        loop, loaded = self._running_loop, self._loaded
        if loaded is None:  # workers are told their last events after the engine is gone
            return Capacity(0, 0, 0, 0, preemptions=loop.stats.preemptions)
        info = loaded.info
        load = loop.load
        compiling = 0 if self._compiler is None else self._compiler.waiting
        return Capacity(
            max_sequences=info.max_sequences,
            free_sequences=max(info.max_sequences - load.running - load.waiting - compiling, 0),
            total_kv_tokens=info.max_batch_total_tokens,
            free_kv_tokens=min(load.available_pages * loop.limits.page_size, info.max_batch_total_tokens),
            preemptions=loop.stats.preemptions,
        )

    async def health(self) -> None:
        loop = self._loop
        if loop is None:
            raise Unhealthy("the engine has not started")
        if loop.ended:
            raise Unhealthy(loop.failure or "the engine has stopped")
        if loop.busy:
            silent_s = time.monotonic() - loop.last_progress_s
            if silent_s > STALL_S:
                raise Unhealthy(f"no step was done for {silent_s:.0f} s")
            return
        async with self._probing:
            await self._generate_one(loop)

    async def lost(self) -> str:
        """See `tgi_gateway.backend.ReportsLoss`."""
        loop = self._running_loop
        while loop.failure is None or not loop.ended:  # noqa: ASYNC110 - its thread knows of no event loop
            await asyncio.sleep(LOSS_POLL_S)
        return loop.failure

    def silent_s(self) -> float:
        """See `tgi_gateway.backend.ReportsProgress`."""
        loop = self._running_loop
        return time.monotonic() - loop.last_progress_s if loop.busy else 0.0

    async def stop(self, drain_s: float) -> None:
        async with self._stopping:
            drained_s = time.monotonic() + drain_s
            if self._compiler is not None:
                await asyncio.to_thread(self._compiler.stop, drain_s)
            if self._loop is not None:
                await asyncio.to_thread(self._loop.stop, max(drained_s - time.monotonic(), 0.0))
            if self._loaded is not None:
                await asyncio.to_thread(self._loaded.close)
                self._loaded = None

    @property
    def _running_loop(self) -> StepLoop:
        assert self._loop is not None, "start() comes first"
        return self._loop

    async def _generate_one(self, loop: StepLoop) -> None:
        """One token from one token, through everything that a request goes through."""
        if self._probe is not None and not self._probe.ended.is_set():
            raise Unhealthy("an earlier generation of one token has not ended")
        probe = self._probe = _Probe()
        sampling, stop = SamplingParams(), StopRules(1, ignore_eos=True)
        loop.submit(Request(PROBE_ID, (0,), sampling, stop, priority=-1))
        try:
            done = await asyncio.to_thread(probe.ended.wait, PROBE_TIMEOUT_S)
            if not done:
                loop.cancel(PROBE_ID)
                raise Unhealthy(f"a generation of one token took more than {PROBE_TIMEOUT_S:.0f} s")
            if probe.failed is not None:
                raise Unhealthy(probe.failed.message)
        finally:
            if probe.ended.is_set():
                self._probe = None

    def _load(self) -> Loaded:
        began_s = time.monotonic()
        loaded: Loaded | None = None
        try:
            loaded = self.load()
            logs.progress(log, "Warming up", None)
            warm_up(loaded.runner, loaded.limits, loaded.info.eos_token_ids)
        except BaseException as error:
            if loaded is not None:
                loaded.close()
            if isinstance(error, MemoryError):
                raise ModelError(
                    "the model does not fit into memory. Use a smaller one or a smaller --dtype."
                ) from error
            if isinstance(error, StartError) or not isinstance(error, Exception):
                raise
            raise StartError(f"the engine cannot start: {type(error).__name__}: {error}") from error
        log.info("the engine has started in %.1f s", time.monotonic() - began_s)
        return loaded


def _start_compiler(loop: StepLoop, vocabulary: Callable[[], Vocabulary]) -> GrammarCompiler:
    def ready(request: Request, arrived_s: float, outcome: Outcome) -> None:
        if isinstance(outcome, Constraint):
            loop.submit(request, constraint=outcome, arrived_s=arrived_s)
        else:
            loop.submit(request, outcome)

    compiler = GrammarCompiler(vocabulary, ready, loop.cancel)
    compiler.start()
    return compiler


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may be, in tokens."""

    max_input_tokens: int
    max_total_tokens: int


def request_limits(
    max_input_tokens: int | None, max_total_tokens: int | None, *, longest: int, pool_tokens: int
) -> RequestLimits:
    """The options, and where they leave it open what the model (`longest`) and the KV pool allow.

    Raises `SettingsError` for options that contradict the pool or each other.
    """
    total = max_total_tokens or min(longest, pool_tokens)
    if total > pool_tokens:
        raise SettingsError(
            f"--max-total-tokens is {total}, but the KV pool holds {pool_tokens} tokens. Lower it or raise "
            "--max-batch-total-tokens."
        )
    if total < 2:
        raise SettingsError(f"--max-total-tokens is {total}; a prompt and an answer need at least 2.")
    longest_input = max_input_tokens or total - 1
    if longest_input >= total:
        raise SettingsError(
            f"--max-input-tokens is {longest_input}; it must be less than --max-total-tokens, which is {total}."
        )
    return RequestLimits(longest_input, total)


def warm_up(runner: Runner, limits: BatchLimits, eos_token_ids: Iterable[int]) -> None:
    """Run a few short generations, so that the first request finds everything loaded. Raises `StartError`."""
    failed: list[Failed] = []
    loop = StepLoop(runner, limits, eos_token_ids, lambda events: failed.extend(events.failed))
    prompt = min(WARM_UP_TOKENS, limits.max_input_tokens)
    new = min(3, limits.max_total_tokens - prompt)
    for request_id in range(min(2, limits.max_sequences)):
        loop.submit(Request(request_id, (0,) * prompt, SamplingParams(), StopRules(new, ignore_eos=True)))
    while loop.has_work() and loop.turn():
        pass
    if failed or loop.failure:
        raise StartError(f"the engine cannot generate: {loop.failure or failed[0].message}. The log says more.")


class _Probe:
    """Waits for the events of `health`'s own request, which nobody else should see."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.failed: Failed | None = None

    def take_from(self, events: StepEvents) -> StepEvents:
        """`events` without the probe's."""
        ends: list[Finished | Failed] = [*events.finished, *events.failed]
        if PROBE_ID not in events.request_ids and all(end.request_id != PROBE_ID for end in ends):
            return events
        self.failed = next((failed for failed in events.failed if failed.request_id == PROBE_ID), None)
        if any(end.request_id == PROBE_ID for end in ends):
            self.ended.set()
        return StepEvents.pack(event for event in events.events() if event.request_id != PROBE_ID)


@dataclass(slots=True)
class LoadingProgress:
    """Tells how far the weights are, often enough for a moving bar; the launcher decides what is shown."""

    next_s: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s >= self.next_s or done == total:
            logs.progress(log, "Loading weights", done / max(total, 1))
            self.next_s = now_s + 0.2
