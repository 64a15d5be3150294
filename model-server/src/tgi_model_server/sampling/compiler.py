"""GrammarCompiler: requests with a grammar wait here until it is compiled, away from the step loop.

Two threads compile, and a bounded cache keeps what they made, refusals included, so that neither many requests of one
schema nor one explosive schema sent again cost more than the first. A grammar whose every request was cancelled before
its turn is not compiled.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from llguidance import LLMatcher

from tgi_gateway.errors import (
    BackendFailed,
    GatewayError,
    IncompleteGeneration,
    Unhealthy,
    Unsupported,
    ValidationError,
)
from tgi_gateway.types import Grammar, Request
from tgi_model_server.sampling.grammar import Constraint, Vocabulary, compile_grammar

log = logging.getLogger(__name__)

THREADS = 2
CACHED_GRAMMARS = 128
"""A compiled grammar takes about 0.1 to 20 MB."""
STACK_BYTES = 512 << 20
"""Address space, of which only what is used takes memory. A chain of references takes 8 kB for each."""

Outcome = Constraint | GatewayError | Literal["cancelled"]
Ready = Callable[[Request, float, Outcome], None]
"""Called once for each request, from any thread, with the time.monotonic() of its submission."""


@dataclass(slots=True, eq=False)
class _Waiting:
    request: Request
    arrived_s: float
    handing: bool = False
    """Its outcome is being handed over."""
    cancelled: bool = False
    """And it was cancelled meanwhile."""


@dataclass(slots=True, eq=False)
class _Job:
    """One grammar; when `done`, either a matcher or the reason why there is none."""

    grammar: Grammar
    waiting: list[_Waiting] = field(default_factory=list)
    done: bool = False
    matcher: LLMatcher | None = None
    error: GatewayError | None = None


class GrammarCompiler:
    """`submit` and `cancel` return at once and may be called from any thread."""

    def __init__(self, load: Callable[[], Vocabulary], ready: Ready, cancel: Callable[[int], None]) -> None:
        """`load` is called first, in a thread of the compiler. `cancel` is for requests that `ready` was told of."""
        self._load = load
        self._ready = ready
        self._cancel = cancel
        self._vocabulary: Future[Vocabulary] = Future()
        self._lock = threading.Condition()
        # Under the lock: open requests by id, jobs by grammar with the latest used last.
        self._open: dict[int, _Waiting] = {}
        self._jobs: OrderedDict[Grammar, _Job] = OrderedDict()
        self._stopped = False
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=(number == 0,), name=f"grammar-{number}", daemon=True)
            for number in range(THREADS)
        ]

    def start(self) -> None:
        before = threading.stack_size(STACK_BYTES)
        try:
            for thread in self._threads:
                thread.start()
        finally:
            threading.stack_size(before)

    @property
    def waiting(self) -> int:
        """Requests that are here."""
        return len(self._open)

    def submit(self, request: Request) -> None:
        """Take a request with a grammar."""
        grammar = request.sampling.grammar
        assert grammar is not None
        waiting = _Waiting(request, time.monotonic())
        refused: GatewayError | None = None
        with self._lock:
            if self._stopped:
                refused = Unhealthy("the engine has stopped")
            elif request.request_id in self._open:
                refused = ValidationError(f"request id {request.request_id} is in use")
            else:
                self._open[request.request_id] = waiting
                job = self._job(grammar)
                if not job.done:
                    job.waiting.append(waiting)
                    return
        if refused is not None:
            self._ready(request, waiting.arrived_s, refused)
        else:
            self._hand_over(waiting, job)

    def cancel(self, request_id: int) -> bool:
        """Whether the request was here. Its outcome then is `cancelled`."""
        with self._lock:
            waiting = self._open.get(request_id)
            if waiting is None:
                return False
            if waiting.handing:
                waiting.cancelled = True
                return True
            self._close(request_id)
        self._ready(waiting.request, waiting.arrived_s, "cancelled")
        return True

    def stop(self, drain_s: float) -> None:
        """Wait up to `drain_s` seconds for what is open, refuse the rest. Blocks; idempotent."""
        with self._lock:
            self._lock.wait_for(lambda: not self._open, drain_s)
            self._stopped = True
            left = [waiting for waiting in self._open.values() if not waiting.handing]
            for waiting in left:
                self._close(waiting.request.request_id)
            self._lock.wait_for(lambda: not self._open)  # what is being handed over takes no time
        for waiting in left:
            self._ready(waiting.request, waiting.arrived_s, IncompleteGeneration())
        for _ in self._threads:
            self._queue.put(None)

    def _job(self, grammar: Grammar) -> _Job:
        """The job of `grammar`, queued if it is new."""
        job = self._jobs.get(grammar)
        if job is None:
            job = self._jobs[grammar] = _Job(grammar)
            self._queue.put(job)
            if len(self._jobs) > CACHED_GRAMMARS:
                self._jobs.popitem(last=False)  # who waits for it is told nevertheless
        else:
            self._jobs.move_to_end(grammar)
        return job

    def _close(self, request_id: int) -> None:
        del self._open[request_id]
        self._lock.notify_all()

    def _work(self, loads: bool) -> None:
        if loads:
            try:
                self._vocabulary.set_result(self._load())
            except Exception as error:
                log.warning("requests with a grammar will be refused: %s", error)
                self._vocabulary.set_exception(error)
        while (job := self._queue.get()) is not None:
            if self._is_wanted(job):
                self._compile(job)

    def _is_wanted(self, job: _Job) -> bool:
        with self._lock:
            if any(self._open.get(waiting.request.request_id) is waiting for waiting in job.waiting):
                return True
            if self._jobs.get(job.grammar) is job:
                del self._jobs[job.grammar]
            return False

    def _compile(self, job: _Job) -> None:
        matcher: LLMatcher | None = None
        error: GatewayError | None = None
        try:
            vocabulary = self._vocabulary.result()
        except Exception:
            error = Unsupported("grammars need a tokenizer.json that this model's folder does not have in usable form")
        else:
            try:
                matcher = compile_grammar(vocabulary, job.grammar)
            except GatewayError as reason:
                error = reason
            except Exception:
                log.exception("a grammar of %d characters broke its compiler", len(job.grammar.source))
                error = BackendFailed("the grammar could not be compiled")
        with self._lock:
            job.matcher, job.error, job.done = matcher, error, True
            waiting, job.waiting = job.waiting, []
        for each in waiting:
            self._hand_over(each, job)

    def _hand_over(self, waiting: _Waiting, job: _Job) -> None:
        request_id = waiting.request.request_id
        with self._lock:
            if self._open.get(request_id) is not waiting:
                return
            waiting.handing = True
        # Not under the lock: whoever is told may call us from another thread.
        outcome: Outcome = BackendFailed("the grammar could not be compiled")
        if job.error is not None:
            outcome = job.error
        elif job.matcher is not None:
            outcome = Constraint(self._vocabulary.result(), job.matcher.deep_copy())
        self._ready(waiting.request, waiting.arrived_s, outcome)
        with self._lock:
            self._close(request_id)
            cancelled = waiting.cancelled
        if cancelled:
            self._cancel(request_id)
