"""TorchBackend: the Backend of every torch device. An Engine, a step loop around it, and the limits they promise."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tgi_gateway.backend import Backend, Capabilities, Capacity, Emit, EngineOptions, ModelInfo, refuse_unsupported
from tgi_gateway.errors import GatewayError, ModelError, SettingsError, StartError, Unhealthy
from tgi_gateway.telemetry import logs
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StepEvents, StopRules
from tgi_model_server.batcher import BatchLimits
from tgi_model_server.device import Device
from tgi_model_server.engine import Engine, load_engine, prepare
from tgi_model_server.loop import StepLoop
from tgi_model_server.parallel import ALONE, Group, Shard
from tgi_model_server.ranks import Followers, Leader
from tgi_model_server.sampling.compiler import GrammarCompiler, Outcome
from tgi_model_server.sampling.grammar import Constraint, Vocabulary
from tgi_model_server.step import Runner

log = logging.getLogger(__name__)

PROBE_ID = (1 << 64) - 1
"""Request id of the generation that `health` makes."""
PROBE_TIMEOUT_S = 30.0
STALL_S = 120.0
"""A busy engine that finished no step for so long is not healthy."""
LOSS_POLL_S = 0.2
WARM_UP_TOKENS = 32


class TorchBackend(Backend):
    """`device_factory` makes the Device; it is called in the thread that loads the model.

    With several shards, every rank's process calls it: it must be something that can be imported by its name.
    """

    def __init__(
        self, device_factory: Callable[[], Device], options: EngineOptions, capabilities: Capabilities
    ) -> None:
        self._device_factory = device_factory
        self._options = options
        self._capabilities = capabilities
        self._engine: Engine | None = None
        self._followers: Followers | None = None
        self._loop: StepLoop | None = None
        self._compiler: GrammarCompiler | None = None
        self._info: ModelInfo | None = None
        self._probe: _Probe | None = None
        self._probing = asyncio.Lock()
        self._stopping = asyncio.Lock()

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

        loaded = await asyncio.to_thread(self._load)
        engine, followers = loaded.engine, loaded.followers
        self._engine, self._followers, self._info = engine, followers, loaded.info
        loop = self._loop = StepLoop(loaded.runner, loaded.limits, engine.eos_token_ids, emit_without_probe)
        loop.start()
        if "grammar" in self._capabilities.features:
            self._compiler = self._start_compiler(loop, engine)
        if followers is not None:

            def lose(why: str) -> None:
                loop.lose(why)
                loaded.group.abort()

            followers.when_lost(lose)
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
        loop, info = self._running_loop, self._info
        assert info is not None
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

    async def stop(self, drain_s: float) -> None:
        async with self._stopping:
            drained_s = time.monotonic() + drain_s
            if self._compiler is not None:
                await asyncio.to_thread(self._compiler.stop, drain_s)
            if self._loop is not None:
                await asyncio.to_thread(self._loop.stop, max(drained_s - time.monotonic(), 0.0))
            if self._engine is not None:
                await asyncio.to_thread(_close, self._engine, self._followers)
                self._engine = self._followers = None

    @property
    def _running_loop(self) -> StepLoop:
        assert self._loop is not None, "start() comes first"
        return self._loop

    def _start_compiler(self, loop: StepLoop, engine: Engine) -> GrammarCompiler:
        folder, vocab_size, eos_token_ids = self._options.model_path, engine.vocab_size, engine.eos_token_ids

        def ready(request: Request, arrived_s: float, outcome: Outcome) -> None:
            if isinstance(outcome, Constraint):
                loop.submit(request, constraint=outcome, arrived_s=arrived_s)
            else:
                loop.submit(request, outcome)

        compiler = GrammarCompiler(lambda: Vocabulary.load(folder, vocab_size, eos_token_ids), ready, loop.cancel)
        compiler.start()
        return compiler

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

    def _load(self) -> _Loaded:
        began_s = time.monotonic()
        with contextlib.ExitStack() as undo:
            try:
                loaded = self._load_ranks(undo)
                logs.progress(log, "Warming up", None)
                warm_up(loaded.runner, loaded.limits, loaded.engine.eos_token_ids)
            except StartError:
                raise
            except MemoryError as error:
                raise ModelError(
                    "the model does not fit into memory. Use a smaller one or a smaller --dtype."
                ) from error
            except Exception as error:
                raise StartError(f"the engine cannot start: {type(error).__name__}: {error}") from error
            undo.pop_all()
        log.info("the engine has started in %.1f s", time.monotonic() - began_s)
        return loaded

    def _load_ranks(self, undo: contextlib.ExitStack) -> _Loaded:
        """The engine on this rank and all others; `undo` ends what was started."""
        device, options, group = self._device_factory(), self._options, ALONE
        followers: Followers | None = None
        if options.num_shard > 1:
            shard = Shard(0, options.num_shard)
            device.join(shard)
            options = prepare(device, options, shard).options
            followers = Followers(self._device_factory, options)
            undo.callback(followers.kill)
            group = followers.meet(device, shard)
            undo.callback(group.close)
            followers.when_lost(lambda _why: group.abort())
        try:
            engine = load_engine(device, options, _Progress(), group)
        except Exception as error:
            if followers is None or isinstance(error, StartError):
                raise
            raise followers.cause() or error from error
        info = model_info(engine, options)
        runner: Runner = engine if followers is None else Leader(engine, followers)
        return _Loaded(engine, runner, group, followers, info, batch_limits(engine, info, options))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What an engine consists of once it has started."""

    engine: Engine
    runner: Runner
    group: Group
    followers: Followers | None
    info: ModelInfo
    limits: BatchLimits


def _close(engine: Engine, followers: Followers | None) -> None:
    if followers is not None:
        followers.tell_to_stop()
    engine.close()
    if followers is not None:
        followers.end()


def model_info(engine: Engine, options: EngineOptions) -> ModelInfo:
    """The limits that this engine promises. Raises `SettingsError` for options that contradict it or each other."""
    # Page 0 is for padding; a promise that counted it could not be kept.
    pool_tokens = (engine.num_pages - 1) * engine.page_size
    total = options.max_total_tokens or min(engine.limits.max_kv_len, pool_tokens)
    if total > pool_tokens:
        raise SettingsError(
            f"--max-total-tokens is {total}, but the KV pool holds {pool_tokens} tokens. Lower it or raise "
            "--max-batch-total-tokens."
        )
    if total < 2:
        raise SettingsError(f"--max-total-tokens is {total}; a prompt and an answer need at least 2.")
    longest_input = options.max_input_tokens or total - 1
    if longest_input >= total:
        raise SettingsError(
            f"--max-input-tokens is {longest_input}; it must be less than --max-total-tokens, which is {total}."
        )
    return ModelInfo(
        model_id=options.model_id,
        max_input_tokens=longest_input,
        max_total_tokens=total,
        max_batch_total_tokens=pool_tokens,
        max_batch_prefill_tokens=engine.limits.max_tokens - engine.limits.max_rows,
        max_sequences=engine.max_sequences,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        dtype=engine.dtype,
        device=engine.device_name,
        model_type=engine.config.model_type,
    )


def batch_limits(engine: Engine, info: ModelInfo, options: EngineOptions) -> BatchLimits:
    """What `info` promises, in the batcher's terms."""
    return BatchLimits(
        page_size=engine.page_size,
        num_pages=engine.num_pages,
        max_sequences=info.max_sequences,
        max_step_tokens=info.max_batch_prefill_tokens,
        max_input_tokens=info.max_input_tokens,
        max_total_tokens=info.max_total_tokens,
        chunked_prefill=options.prefill_chunking,
        prefix_caching=options.prefix_caching,
        max_mixed_tokens=engine.max_mixed_tokens,
    )


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
class _Progress:
    """Tells how far the weights are, often enough for a moving bar; the launcher decides what is shown."""

    next_s: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s >= self.next_s or done == total:
            logs.progress(log, "Loading weights", done / max(total, 1))
            self.next_s = now_s + 0.2
