"""A Backend around the engine that decides who enters it, and keeps the promise of one ending per request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from tgi_gateway.backend import Backend, Capabilities, Capacity, Emit, ModelInfo, ReportsProgress
from tgi_gateway.errors import (
    BackendFailed,
    GatewayError,
    IncompleteGeneration,
    Overloaded,
    RateLimited,
    Unhealthy,
    ValidationError,
)
from tgi_gateway.host.pace import Pace
from tgi_gateway.host.queue import OUTPUT_WEIGHT, Queue, Ticket
from tgi_gateway.host.scheduler import MAX_PASSED, may_pass, needed_kv_tokens, refuse_impossible, room, room_after
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StepEvents, StopRules, Usage

log = logging.getLogger(__name__)

PROBE_IDS = 0xFFFF << 48
"""Health probes' request ids: those of a worker index that no HTTP worker has."""
QUEUED_BATCHES = 8
"""Who waits behind so many full batches would wait for minutes, and should rather ask another server."""
RECHECK_S = 0.1
"""How often waiting tickets are looked at without an event: an engine may free memory late."""


@dataclass(frozen=True, slots=True)
class HostStats:
    """The host at one moment."""

    queue_size: int
    running: int
    """Requests in the engine."""
    batch_tokens: int
    """Prompt and output tokens of the requests in the engine."""
    batch_max_tokens: int = 0
    """What those will have at most when they end."""
    queue_tokens: int = 0
    """Prompt tokens of the requests that wait."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One engine step, as far as its events tell."""

    duration_s: float
    """Since the step before, or since work came to an idle engine."""
    prefills: int
    """Requests that got their first token."""
    decodes: int
    """Tokens of requests that already had one."""
    stats: HostStats
    """After the step."""
    failures: int = 0
    """Requests that failed."""
    tokens_per_request: tuple[int, ...] = ()
    """Where speculation gave a request several tokens: what each got. Empty: one each."""
    handling_s: float = 0.0
    """What the host took to see whose the tokens are and who has ended."""
    telling_s: float = 0.0
    """What it took to hand them on."""


Trace = Callable[[Ticket, float], None]
"""Called with a request that has ended, and when (time.perf_counter())."""


class HostObserver(Protocol):
    """Whoever counts. Called from any thread, but never from two at once; must return at once and not raise."""

    def queued(self, stats: HostStats) -> None:
        """A request came to wait, or left the queue by being cancelled."""
        ...

    def admitted(self, requests: int, stats: HostStats, took_s: float) -> None:
        """So many requests went from the queue into the engine together, and it took so long to hand them over."""
        ...

    def stepped(self, report: StepReport) -> None:
        """The engine has told the events of a step."""
        ...


class Dispatch:
    """Queue and admission around an engine; itself a Backend.

    Every submit gets exactly one ending, also when the engine raises, ends a request twice or is stopped too early.
    The engine and the receiver of events may call back, from any thread: while they are called, no lock is held that
    a callback takes.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_concurrent_requests: int,
        max_concurrent_requests_per_key: int | None = None,
        max_queued_tokens: int | None = None,
        observer: HostObserver | None = None,
        probe_timeout_s: float = 10.0,
        stall_s: float = 10.0,
        fresh_s: float = 1.0,
    ) -> None:
        """`max_concurrent_requests` bounds waiting and running requests together, `max_concurrent_requests_per_key`
        those of one tenant, `max_queued_tokens` the prompt tokens of those that wait (None: `QUEUED_BATCHES` times
        what the engine can hold). What exceeds them is refused and told when to come again.

        Health: busy without an event for `stall_s` asks the engine itself, idle for `fresh_s` asks for a token, which
        must come within `probe_timeout_s`.
        """
        self._backend = backend
        self._max_concurrent_requests = max_concurrent_requests
        self._max_per_key = max_concurrent_requests_per_key
        self._max_queued_tokens = max_queued_tokens
        self._observer = observer
        self._observer_lock = threading.Lock()
        self._trace: Trace = lambda _ticket, _ended: None
        self._probe_timeout_s = probe_timeout_s
        self._stall_s = stall_s
        self._fresh_s = fresh_s
        self._model: ModelInfo
        self._emit: Emit
        self._emitting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop
        self._arrivals = itertools.count()
        self._probe_ids = itertools.count(PROBE_IDS)
        self._probe_task: asyncio.Task[None] | None = None
        self._recheck_task: asyncio.Task[None] | None = None
        self._empty: asyncio.Event

        self._lock = threading.Lock()  # guards everything below
        self._queue = Queue()
        self._running: dict[int, Ticket] = {}
        self._open: Counter[str] = Counter()
        """Tenant -> its waiting and running requests, at least one."""
        self._pace = Pace()
        self._unseen_kv_tokens = 0  # needed by running requests without a token so far
        self._batch_tokens = self._batch_max_tokens = 0
        self._admitting = False
        self._admit_again = False
        self._stopping = False
        self._probes: dict[int, asyncio.Future[Finished | Failed]] = {}
        self._progress_at = 0.0
        self._busy_since = 0.0
        self._step_began_at = 0.0

    @property
    def capabilities(self) -> Capabilities:
        return self._backend.capabilities

    async def start(self, emit: Emit) -> ModelInfo:
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._empty = asyncio.Event()
        self._model = await self._backend.start(self._on_step)
        if self._max_queued_tokens is None:
            self._max_queued_tokens = QUEUED_BATCHES * self._model.max_batch_total_tokens
        self._recheck_task = asyncio.create_task(self._recheck())
        return self._model

    def observe(self, observer: HostObserver) -> None:
        """Tell `observer` from now on: for one that needs what `start` has found out."""
        self._observer = observer

    def trace(self, trace: Trace) -> None:
        """Tell `trace` from now on of every request that has ended, from any thread. It must return at once."""
        self._trace = trace

    def capacity(self) -> Capacity:
        return self._backend.capacity()

    def stats(self) -> HostStats:
        with self._lock:
            return self._stats()

    def silent_s(self) -> float:
        """For so many seconds the engine has had work and made no progress, as far as can be told."""
        with self._lock:
            if not self._running and not self._queue:
                return 0.0
            silent_s = time.perf_counter() - max(self._progress_at, self._busy_since)
        if isinstance(self._backend, ReportsProgress):
            return min(silent_s, self._backend.silent_s())
        return silent_s

    def submit(self, request: Request) -> None:
        try:
            refuse_impossible(request, self._model, self._backend.capabilities)
            with self._lock:
                self._enqueue(request)
                stats = self._stats()
        except GatewayError as error:
            told = Failed(request.request_id, error.error_type, error.detail, error.retry_after_s)
            self._tell_soon(StepEvents(failed=[told]))
            return
        self._observe_queue(stats)
        self._admit()

    def cancel(self, request_id: int) -> None:
        with self._lock:
            ticket = self._queue.cancel(request_id)
            if ticket is not None:
                self._close(ticket)
                self._trace(ticket, time.perf_counter())
            running = self._running.get(request_id)
            if running is not None:
                running.cancelled = True
            reaches_engine = running is not None and running.submitted
            stats = self._stats()
            self._note_if_empty()
        if ticket is not None:
            usage = Usage(len(ticket.request.input_ids), 0)
            queue_s = time.perf_counter() - ticket.arrived_at
            self._tell_soon(StepEvents(finished=[Finished(request_id, "cancelled", usage, queue_s)]))
            self._observe_queue(stats)
            self._admit()  # the one that stood in the way may have been this one
        elif reaches_engine:
            self._cancel_in_engine(request_id)

    async def health(self) -> None:
        now = time.perf_counter()
        with self._lock:
            busy, silent_s, stopping = bool(self._running), now - self._progress_at, self._stopping
        if stopping:
            raise Unhealthy("The server is stopping")
        if silent_s < (self._stall_s if busy else self._fresh_s):
            return
        if busy:
            # A long prefill or compilation has no events; only the engine knows whether it moves.
            try:
                await asyncio.wait_for(self._backend.health(), self._probe_timeout_s)
            except TimeoutError:
                raise Unhealthy(f"The engine has made no progress for {silent_s:.0f} s") from None
            return
        if self._probe_task is None or self._probe_task.done():
            self._probe_task = asyncio.create_task(self._probe())
        await asyncio.shield(self._probe_task)

    async def stop(self, drain_s: float) -> None:
        deadline = time.perf_counter() + drain_s
        with self._lock:
            self._stopping = True
            self._note_if_empty()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), max(drain_s, 0.0))
        if self._recheck_task is not None:
            self._recheck_task.cancel()
        with self._lock:
            waiting = self._queue.clear()
            for ticket in waiting:
                self._close(ticket)
        self._fail([ticket.request.request_id for ticket in waiting], IncompleteGeneration("The server stops"))
        try:
            await self._backend.stop(max(deadline - time.perf_counter(), 0.0))
        finally:
            with self._lock:
                left = list(self._running)
                for ticket in self._running.values():
                    self._close(ticket)
                self._running.clear()
                self._unseen_kv_tokens = self._batch_tokens = self._batch_max_tokens = 0
            self._fail(left, IncompleteGeneration("The server stops"))
            await asyncio.sleep(0)  # what is to be told soon has been told when this returns

    # Admission.

    def _enqueue(self, request: Request) -> None:
        """With the lock held. Raises what the request has to be told."""
        if self._stopping:
            raise Unhealthy("The server is stopping; another one will answer")
        if request.request_id in self._queue or request.request_id in self._running:
            raise ValidationError(f"request id {request.request_id} is already open")
        now = time.perf_counter()
        if self._max_per_key is not None and self._open[request.tenant] >= self._max_per_key:
            raise RateLimited(
                f"This API key has {self._max_per_key} requests open, which is the most it may have",
                retry_after_s=self._pace.retry_after_s(now, 1),
            )
        assert self._max_queued_tokens is not None, "start() comes first"
        if len(self._queue) + len(self._running) >= self._max_concurrent_requests or (
            self._queue and self._queue.prompt_tokens + len(request.input_ids) > self._max_queued_tokens
        ):
            raise Overloaded(retry_after_s=self._pace.retry_after_s(now, len(self._queue) + 1))
        if not self._queue and not self._running:
            self._busy_since = now
        self._open[request.tenant] += 1
        self._queue.add(Ticket(request, next(self._arrivals), now))

    def _close(self, ticket: Ticket) -> None:
        """The request has ended, wherever it was; with the lock held."""
        tenant = ticket.request.tenant
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant]
        self._pace.ended(time.perf_counter())

    async def _recheck(self) -> None:
        while True:
            await asyncio.sleep(RECHECK_S)
            self._admit()

    def _admit(self) -> None:
        """Let in who fits. Only one thread does so at a time; others leave it a note to look again."""
        with self._lock:
            if self._admitting:
                self._admit_again = True
                return
            if not self._queue:
                return
            self._admitting = True
        try:
            while True:
                self._admit_once()
                with self._lock:
                    if not self._admit_again or not self._queue:
                        self._admitting = False
                        return
        except BaseException:
            with self._lock:
                self._admitting = False
            raise

    def _admit_once(self) -> None:
        try:
            capacity = self._backend.capacity()
        except Exception:
            log.exception("the engine could not tell its capacity; admission waits")
            capacity = Capacity(0, 0, 0, 0)
        with self._lock:
            self._admit_again = False
            tickets = self._take(capacity)
            stats = self._stats()
        began = time.perf_counter()
        for ticket in tickets:
            self._enter(ticket)
        if tickets and self._observer is not None:
            with self._observer_lock:
                self._observer.admitted(len(tickets), stats, time.perf_counter() - began)

    def _take(self, capacity: Capacity) -> list[Ticket]:
        """Move from the queue to the running requests who fits; with the lock held."""
        left = room(capacity, running=len(self._running), unseen_kv_tokens=self._unseen_kv_tokens)
        now = time.perf_counter()
        if not self._running:
            self._step_began_at = now
        tickets: list[Ticket] = []
        first: Ticket | None = None
        passed: set[int] = set()
        while len(passed) < MAX_PASSED and (ticket := self._queue.peek(passed)) is not None:
            after = room_after(ticket.request, left, alone=not self._running)
            if after is None or not (first is None or self._passes(ticket, first, now)):
                passed.add(ticket.request.request_id)
                if first is None:
                    first = ticket
                    first.blocked_at = now if first.blocked_at is None else first.blocked_at
                continue
            left = after
            self._queue.take(ticket)
            ticket.entered_at = now
            self._running[ticket.request.request_id] = ticket
            self._unseen_kv_tokens += needed_kv_tokens(ticket.request)
            self._batch_tokens += len(ticket.request.input_ids)
            self._batch_max_tokens += _final_tokens(ticket.request)
            tickets.append(ticket)
        return tickets

    @staticmethod
    def _passes(ticket: Ticket, first: Ticket, now: float) -> bool:
        assert first.blocked_at is not None
        blocked_s = now - first.blocked_at
        allowed = may_pass(ticket.request, first.request, blocked_s=blocked_s, passed_by_tokens=first.passed_by_tokens)
        if allowed:
            first.passed_by_tokens += needed_kv_tokens(ticket.request)
        return allowed

    def _enter(self, ticket: Ticket) -> None:
        request_id = ticket.request.request_id
        try:
            self._backend.submit(ticket.request)
        except Exception:
            log.exception("the engine raised in submit; request %d fails", request_id)
            with self._lock:
                ours = self._leave(request_id) is not None
            if ours:
                self._fail([request_id], BackendFailed("The engine did not take the request"))
            return
        with self._lock:
            ticket.submitted = True
            cancel = ticket.cancelled
        if cancel:
            self._cancel_in_engine(request_id)

    def _leave(self, request_id: int) -> Ticket | None:
        """The request has ended in the engine; with the lock held. None if that is known already."""
        ticket = self._running.pop(request_id, None)
        if ticket is not None:
            if ticket.generated_tokens == 0:
                self._unseen_kv_tokens -= needed_kv_tokens(ticket.request)
            self._batch_tokens -= len(ticket.request.input_ids) + ticket.generated_tokens
            self._batch_max_tokens -= _final_tokens(ticket.request)
            self._close(ticket)
            self._trace(ticket, time.perf_counter())
            self._note_if_empty()
        return ticket

    def _cancel_in_engine(self, request_id: int) -> None:
        try:
            self._backend.cancel(request_id)
        except Exception:
            log.exception("the engine raised in cancel; request %d runs to its end", request_id)

    # Events of the engine, from any thread.

    def _on_step(self, events: StepEvents) -> None:
        now = time.perf_counter()
        prefills, strangers = 0, False
        served: Counter[str] = Counter()
        with self._lock:
            self._progress_at = now
            running = self._running
            for request_id in events.request_ids:
                ticket = running.get(request_id)
                if ticket is None:
                    strangers = True
                    continue
                if ticket.generated_tokens == 0:
                    prefills += 1
                    ticket.first_token_at = now
                    self._unseen_kv_tokens -= needed_kv_tokens(ticket.request)
                ticket.generated_tokens += 1
                if len(self._open) > 1:
                    served[ticket.request.tenant] += 1
            for tenant, tokens in served.items():
                self._queue.charge(tenant, OUTPUT_WEIGHT * tokens)
            self._batch_tokens += len(events.request_ids)
            if strangers:
                rows = len(events.request_ids)
                events = self._without_strangers(events)
                self._batch_tokens -= rows - len(events.request_ids)
            ended = bool(events.finished or events.failed)
            if ended:
                events = self._end(events)
            duration_s, self._step_began_at = now - self._step_began_at, now
            stats = self._stats()
            waiting = stats.queue_size > 0
        if events:
            handled = time.perf_counter()
            self._tell(events)
            told = time.perf_counter()
            if self._observer is not None:
                rows = len(events.request_ids)
                decodes = rows - prefills
                several = tuple(Counter(events.request_ids).values()) if len(set(events.request_ids)) < rows else ()
                with self._observer_lock:
                    self._observer.stepped(
                        StepReport(
                            duration_s,
                            prefills,
                            decodes,
                            stats,
                            len(events.failed),
                            several,
                            handling_s=handled - now,
                            telling_s=told - handled,
                        )
                    )
        if waiting:
            self._admit()

    def _without_strangers(self, events: StepEvents) -> StepEvents:
        """Drop tokens of requests that have ended, and of probes."""
        kept = StepEvents(finished=events.finished, failed=events.failed)
        for row, request_id in enumerate(events.request_ids):
            if request_id in self._running:
                if row in events.top:
                    kept.top[len(kept.request_ids)] = events.top[row]
                kept.request_ids.append(request_id)
                kept.token_ids.append(events.token_ids[row])
                kept.logprobs.append(events.logprobs[row])
        return kept

    def _end(self, events: StepEvents) -> StepEvents:
        """Take the ended requests out, add their waiting time, drop second endings; with the lock held."""
        kept = StepEvents(events.request_ids, events.token_ids, events.logprobs, events.top)
        for finished in events.finished:
            ticket = self._leave(finished.request_id)
            if ticket is not None:
                kept.finished.append(replace(finished, queue_s=finished.queue_s + ticket.waited_s))
            else:
                self._answer_probe(finished)
        for failed in events.failed:
            if self._leave(failed.request_id) is not None:
                kept.failed.append(failed)
            else:
                self._answer_probe(failed)
        return kept

    # Small things.

    def _stats(self) -> HostStats:
        return HostStats(
            len(self._queue), len(self._running), self._batch_tokens, self._batch_max_tokens, self._queue.prompt_tokens
        )

    def _observe_queue(self, stats: HostStats) -> None:
        if self._observer is not None:
            with self._observer_lock:
                self._observer.queued(stats)

    def _note_if_empty(self) -> None:
        if self._stopping and not self._queue and not self._running:
            self._loop.call_soon_threadsafe(self._empty.set)

    def _fail(self, request_ids: list[int], error: GatewayError) -> None:
        if request_ids:
            self._tell_soon(StepEvents(failed=[Failed(each, error.error_type, error.detail) for each in request_ids]))

    def _tell(self, events: StepEvents) -> None:
        """Emit, one step at a time whichever thread it comes from."""
        with self._emitting:
            self._emit(events)

    def _tell_soon(self, events: StepEvents) -> None:
        """Emit from the event loop, so that the caller waits for nobody."""
        try:
            self._loop.call_soon_threadsafe(self._tell, events)
        except RuntimeError:  # the loop is closed, which happens only after `stop`
            self._tell(events)

    # Health.

    async def _probe(self) -> None:
        """One token of a one-token prompt, past the queue."""
        request = Request(
            request_id=next(self._probe_ids),
            input_ids=(0,),
            sampling=SamplingParams(),
            stop=StopRules(max_new_tokens=1),
            cache_salt="health",
        )
        answer: asyncio.Future[Finished | Failed] = self._loop.create_future()
        with self._lock:
            self._probes[request.request_id] = answer
        try:
            self._backend.submit(request)
            ending = await asyncio.wait_for(answer, self._probe_timeout_s)
        except TimeoutError:
            self._cancel_in_engine(request.request_id)
            raise Unhealthy(f"The engine gave no token within {self._probe_timeout_s:g} s") from None
        except Exception as error:
            log.exception("the engine raised when asked for a token")
            raise Unhealthy("The engine does not take requests") from error
        finally:
            with self._lock:
                self._probes.pop(request.request_id, None)
        if isinstance(ending, Failed):
            log.error("the health probe failed: %s", ending.message)
            raise Unhealthy("The engine cannot generate")

    def _answer_probe(self, ending: Finished | Failed) -> None:
        answer = self._probes.get(ending.request_id)
        if answer is not None:
            self._loop.call_soon_threadsafe(_answer, answer, ending)


def _final_tokens(request: Request) -> int:
    return len(request.input_ids) + request.stop.max_new_tokens


def _answer(future: asyncio.Future[Finished | Failed], ending: Finished | Failed) -> None:
    if not future.done():
        future.set_result(ending)
