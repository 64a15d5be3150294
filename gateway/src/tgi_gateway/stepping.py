"""SteppingBackend: all of the Backend protocol but the model, for engines that work in steps.

Subclass it and say `load` and `step`; `examples/toy-backend` does. `submit` and `cancel` only append to an inbox, from
any thread; one task owns everything else, so nothing needs a lock, and a cancel waits for one step at most. The model
runs in a thread of its own, so that the engine hears of requests meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from tgi_gateway.backend import Backend, Capabilities, Capacity, Emit, ModelInfo, check_request
from tgi_gateway.errors import BackendFailed, GatewayError, IncompleteGeneration, StartError, Unhealthy
from tgi_gateway.types import (
    Failed,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    StepEvents,
    StopRules,
    Token,
    Usage,
)
from tgi_gateway.work_thread import WorkThread

log = logging.getLogger(__name__)
T = TypeVar("T")

HEALTH_TIMEOUT_S = 5.0
_PROBE = Request(2**64 - 1, (0,), SamplingParams(), StopRules(1, ignore_eos=True))


@dataclass(slots=True, eq=False)
class Row:
    """A request in the engine, waiting or running."""

    request: Request
    """What was asked for; it never changes."""
    submitted_at: float = field(default_factory=time.monotonic)
    """time.monotonic() seconds, as all times here."""
    started_at: float = 0.0
    """When it entered; 0.0: it waits."""
    not_before: float = 0.0
    """It takes part in no step before this time."""
    output: list[int] = field(default_factory=list)
    """Ids of its tokens so far. `SteppingBackend` appends what `step` returns."""

    @property
    def kv_tokens(self) -> int:
        """Reserved from its first step to its end, so that it never runs out."""
        return len(self.request.input_ids) + self.request.stop.max_new_tokens

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and output so far."""
        return (*self.request.input_ids, *self.output)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.input_ids), len(self.output))


class SteppingBackend(Backend):
    """A whole engine around `step`. First come, first served; a request's KV tokens are reserved when it enters."""

    model: ModelInfo
    """What `load` returned."""

    def __init__(self, capabilities: Capabilities, *, health_timeout_s: float = HEALTH_TIMEOUT_S) -> None:
        self._capabilities = capabilities
        self._health_timeout_s = health_timeout_s
        self._inbox: deque[Row | int | asyncio.Future[None] | None] = deque()
        """Submitted rows, ids to cancel, health checks to answer; None asks to stop."""
        self._wake = asyncio.Event()
        self._waiting: dict[int, Row] = {}
        self._running: dict[int, Row] = {}
        self._checks: list[asyncio.Future[None]] = []
        """Health checks to be answered after the next step."""
        self._next_step_at = 0.0
        self._free_kv_tokens = 0
        self._stopping = False
        self._why = "the engine has stopped"
        """What requests are told that it does not serve any more."""
        self._ended = False
        self._task: asyncio.Task[None] | None = None
        self._thread = WorkThread("engine")

    # What an engine says.

    def load(self) -> ModelInfo:
        """Load the model and warm it up; in the engine's thread. Raises `StartError` with the way out."""
        raise NotImplementedError

    def step(self, rows: Sequence[Row]) -> Sequence[Token | GatewayError]:
        """One step of the model, in the engine's thread: the next token of each row, in order of `rows`.

        A row without output is new: compute its prompt, however long; only memory and `max_sequences` limit who
        enters. A GatewayError in place of a token fails that row alone; an exception ends the engine, and every
        request with it. `health` asks an idle engine for a step of one row, whose prompt is token 0.
        """
        raise NotImplementedError

    def held_back(self, row: Row) -> tuple[int, ...]:
        """Ids that may not be the row's next token: those that would end it before `StopRules.min_new_tokens`.

        An engine that declares `min_new_tokens` gives them a logit of minus infinity.
        """
        stop = row.request.stop
        if len(row.output) >= stop.min_new_tokens:
            return ()
        return (*self.model.eos_token_ids, *stop.stop_token_ids)

    def release(self, row: Row) -> None:
        """The row takes part in no further step: give back what the model keeps for it. Called between two steps."""

    def prompt_logprobs(self, row: Row) -> tuple[float, ...]:  # noqa: ARG002
        """What `Request.prefill_logprobs` asks for: one for each prompt token, the first `NO_LOGPROB`.

        Called once, before `release`, when the row ends or is cancelled after its first token; in the event loop, so
        have them ready.
        """
        return ()

    def prompt_top(self, row: Row) -> tuple[tuple[tuple[int, float], ...], ...]:  # noqa: ARG002
        """What `Request.prefill_top_n_tokens` asks for: for each prompt token the most likely (id, log-probability)
        pairs in its place, most likely first; () for the first token. Called as `prompt_logprobs`.
        """
        return ()

    # Any thread.

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def submit(self, request: Request) -> None:
        self._post(Row(request))

    def cancel(self, request_id: int) -> None:
        self._post(request_id)

    def capacity(self) -> Capacity:
        """As of the last step; what still waits has taken nothing yet."""
        limit = self.model.max_sequences
        return Capacity(
            limit, limit - len(self._running), self.model.max_batch_total_tokens, max(0, self._free_kv_tokens)
        )

    def _post(self, item: Row | int | asyncio.Future[None] | None) -> None:
        assert self._task is not None, "start() comes first"
        self._inbox.append(item)
        if self._ended:  # after the append: either the end of `_run` saw the item, or we see the end
            self._refuse_inbox()
        else:
            self._loop.call_soon_threadsafe(self._wake.set)

    # The event loop that called `start`.

    async def start(self, emit: Emit) -> ModelInfo:
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        try:
            self.model = await self._in_thread(self.load)
        except BaseException as error:
            self._thread.end()
            if isinstance(error, GatewayError) or not isinstance(error, Exception):
                raise
            log.exception("the engine cannot start")
            raise StartError(f"the engine cannot start: {type(error).__name__}: {error}") from error
        self._free_kv_tokens = self.model.max_batch_total_tokens
        self._task = self._loop.create_task(self._run(), name="steps")
        return self.model

    async def health(self) -> None:
        """A busy engine whose steps go on can generate; an idle one is asked for a token."""
        if self._task is None or self._ended:
            raise Unhealthy("the step loop is not running")
        answered = self._loop.create_future()
        self._post(answered)
        try:
            await asyncio.wait_for(answered, self._health_timeout_s)
        except TimeoutError:
            raise Unhealthy("the step loop does not answer") from None

    async def stop(self, drain_s: float) -> None:
        if self._task is None:
            return
        self._post(None)
        await asyncio.wait([self._task], timeout=drain_s)
        self._task.cancel()
        await asyncio.wait([self._task])
        self._thread.end()

    async def _run(self) -> None:
        try:
            while not (self._stopping and not self._waiting and not self._running and not self._inbox):
                await self._until_there_is_work()
                events = StepEvents()
                self._take_inbox(events)
                self._admit()
                if self._running:
                    await self._advance(events)
                elif self._checks:
                    await self._probe()
                if events:
                    self._emit(events)
                self._answer_checks(None)
        except GatewayError as error:  # whose text is for clients
            log.error("the step loop died: %s", error.detail)
            self._why = f"{self._why}: {error.detail}"
        except Exception:
            log.exception("the step loop died")
        finally:
            self._ended = True
            unfinished = [*self._waiting, *self._running]
            for row in self._running.values():
                self._release(row)
            self._waiting.clear()
            self._running.clear()
            self._free_kv_tokens = self.model.max_batch_total_tokens
            self._answer_checks(Unhealthy("the step loop has ended"))
            self._fail(unfinished, IncompleteGeneration(self._why))
            self._refuse_inbox()

    def _answer_checks(self, error: Unhealthy | None) -> None:
        for check in self._checks:
            if not check.done():
                check.set_result(None) if error is None else check.set_exception(error)
        self._checks.clear()

    async def _until_there_is_work(self) -> None:
        """Return at once if a step is due, else when it is or when something lies in the inbox."""
        timeout = None
        if self._running:
            first = min(row.not_before for row in self._running.values())
            timeout = max(first, self._next_step_at) - time.monotonic()
        if self._inbox or (self._waiting and not self._running) or (timeout is not None and timeout <= 0):
            await asyncio.sleep(0)  # the other tasks of this loop get their turn between any two steps
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
        self._wake.clear()

    def _take_inbox(self, events: StepEvents) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            match item:
                case Row():
                    try:
                        self._check(item.request)
                    except GatewayError as error:
                        events.failed.append(Failed(item.request.request_id, error.error_type, error.detail))
                    else:
                        self._waiting[item.request.request_id] = item
                case int():
                    row = self._running.get(item) or self._waiting.get(item)
                    if row is not None:
                        events.finished.append(self._finished(row, "cancelled"))
                        self._remove(item)
                case None:
                    self._stopping = True
                case _:
                    if not item.done():
                        self._checks.append(item)

    def _check(self, request: Request) -> None:
        """Raise what is wrong with the request. Nothing is ignored: what cannot be honoured is refused."""
        if self._stopping:
            raise IncompleteGeneration("the engine is stopping")
        check_request(request, self._capabilities, self.model)

    def _admit(self) -> None:
        """First come, first served: a large request is not overtaken for ever by small ones."""
        while self._waiting and len(self._running) < self.model.max_sequences:
            request_id, row = next(iter(self._waiting.items()))
            if row.kv_tokens > self._free_kv_tokens:
                return
            del self._waiting[request_id]
            self._free_kv_tokens -= row.kv_tokens
            row.started_at = time.monotonic()
            self._running[request_id] = row

    def _remove(self, request_id: int) -> None:
        """Take a request out, with everything it holds."""
        row = self._running.pop(request_id, None)
        if row is None:
            self._waiting.pop(request_id, None)
            return
        self._free_kv_tokens += row.kv_tokens
        self._release(row)

    def _release(self, row: Row) -> None:
        """An engine that cannot give back is broken, but every request must be told its ending all the same."""
        try:
            self.release(row)
        except Exception:
            log.exception("request %d could not be released", row.request.request_id)

    async def _advance(self, events: StepEvents) -> None:
        """Run a step and tell what came of it."""
        rows = list(self._running.values())
        for row, token in zip(rows, await self._step_of(rows), strict=True):
            self._give(row, token, events)

    async def _step_of(self, rows: Sequence[Row]) -> Sequence[Token | GatewayError]:
        """What `step` returns for `rows`. Raises `BackendFailed` if that is not one for each."""
        tokens = await self._in_thread(lambda: list(self.step(rows)))
        if len(tokens) != len(rows):
            raise BackendFailed(f"step returned {len(tokens)} tokens for {len(rows)} rows")
        for row, token in zip(rows, tokens, strict=True):
            if isinstance(token, Token) and token.request_id != row.request.request_id:
                raise BackendFailed(
                    f"step returned a token of request {token.request_id} in the place of request "
                    f"{row.request.request_id}: they come in the order of `rows`"
                )
        return tokens

    def _give(self, row: Row, token: Token | GatewayError, events: StepEvents) -> None:
        """The row's next token, and its ending if that was the last."""
        request_id = row.request.request_id
        if not isinstance(token, GatewayError) and not 0 <= token.token_id < self.model.vocab_size:
            token = BackendFailed(
                f"the engine chose token {token.token_id}, which is not in its vocabulary of {self.model.vocab_size}"
            )
            log.error("request %d: %s", request_id, token.detail)
        if isinstance(token, GatewayError):
            self._remove(request_id)
            events.failed.append(Failed(request_id, token.error_type, token.detail))
            return
        row.output.append(token.token_id)
        if token.top:
            events.top[len(events.request_ids)] = token.top
        events.request_ids.append(request_id)
        events.token_ids.append(token.token_id)
        events.logprobs.append(token.logprob)
        reason = self._stop_reason(row)
        if reason is not None:
            events.finished.append(self._finished(row, reason))
            self._remove(request_id)

    async def _probe(self) -> None:
        """A step of one token that nobody hears of."""
        row = Row(_PROBE)
        await self._step_of([row])
        self._release(row)

    def _stop_reason(self, row: Row) -> FinishReason | None:
        stop, last = row.request.stop, row.output[-1]
        if len(row.output) >= stop.max_new_tokens:
            return "length"
        if last in self.model.eos_token_ids and not stop.ignore_eos:
            return "eos_token"
        if last in stop.stop_token_ids:
            return "stop_sequence"
        return None

    def _finished(self, row: Row, reason: FinishReason) -> Finished:
        # Whoever cancels after a stop string still wants what is known by then.
        known = self.prompt_logprobs(row) if row.output and row.request.prefill_logprobs else ()
        top = self.prompt_top(row) if row.output and row.request.prefill_top_n_tokens else ()
        queue_s = (row.started_at or time.monotonic()) - row.submitted_at
        return Finished(row.request.request_id, reason, row.usage, queue_s, known, top)

    def _fail(self, request_ids: list[int], error: GatewayError) -> None:
        if request_ids:
            self._emit(StepEvents(failed=[Failed(each, error.error_type, error.detail) for each in request_ids]))

    def _refuse_inbox(self) -> None:
        """After the end. popleft makes it safe from several threads: each item is answered once."""
        with suppress(IndexError):
            while True:
                item = self._inbox.popleft()
                if isinstance(item, Row):
                    self._fail([item.request.request_id], IncompleteGeneration(self._why))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """`work` in the engine's thread. What runs there is not broken off: whoever is cancelled waits for it."""
        done = asyncio.wrap_future(self._thread.run(work), loop=self._loop)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            await asyncio.wait([done], timeout=self._health_timeout_s)
            raise
