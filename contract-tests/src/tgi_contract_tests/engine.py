"""A backend under test: runs in an event loop of its own thread, every event on record, every wait bounded."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from tgi_contract_tests.rules import Rule, broken, demand
from tgi_gateway.backend import Backend, Capabilities, Capacity, Emit, ModelInfo
from tgi_gateway.errors import GatewayError, Unhealthy
from tgi_gateway.types import Event, Failed, Finished, Request, StepEvents, Token

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Answer:
    """What came back for one request."""

    request: Request
    tokens: list[Token] = field(default_factory=list)
    endings: list[Finished | Failed] = field(default_factory=list)
    late: list[Token] = field(default_factory=list)
    """Tokens after the first ending."""

    @property
    def ended(self) -> bool:
        return bool(self.endings)

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def ending(self) -> Finished | Failed:
        return self.endings[0]

    @property
    def finished(self) -> Finished:
        """The ending, which the rules demand to be no failure here."""
        ending = self.ending
        if isinstance(ending, Failed):
            broken("one-ending", f"a request that should be served ended in {ending}")
        return ending


class Engine:
    """Give it a backend that was not started yet. Methods are called from the test's thread."""

    def __init__(self, backend: Backend, patience_s: float) -> None:
        self.backend = backend
        self.patience_s = patience_s
        self.answers: dict[int, Answer] = {}
        self.steps: list[StepEvents] = []
        self.strangers: list[Event] = []
        """Events of requests that were never submitted."""
        self.overlaps = 0
        """Emits that began before the one before had returned."""
        self.on_emit: Callable[[StepEvents], None] | None = None
        self.guests: dict[int, Guest] = {}
        """Who submitted a request that is not ours."""
        self._model: ModelInfo | None = None
        self._changed = threading.Condition()
        self._emitting = threading.Lock()
        self._gate = threading.Event()
        """Closed while `held_emit`."""
        self._gate.set()
        self._held = threading.Event()
        """An emit waits at the closed gate."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._turn, daemon=True, name="backend-under-test")
        self._thread.start()

    # Life.

    def start(self) -> ModelInfo:
        self._model = self.wait_for(self.backend.start(self._emit), "lifecycle", "start")
        return self._model

    @property
    def model(self) -> ModelInfo:
        assert self._model is not None, "start() comes first"
        return self._model

    def stop(self, drain_s: float = 0.0) -> None:
        self.wait_for(self.backend.stop(drain_s), "drain", f"stop({drain_s:g})", drain_s)

    def close(self) -> None:
        """After `stop`: end the event loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(self.patience_s)
        if not self._thread.is_alive():
            self._loop.close()

    def healthy(self) -> bool:
        """Whether `health` returns; False if it raises Unhealthy."""
        try:
            self.wait_for(self.backend.health(), "health", "health")
        except Unhealthy:
            return False
        return True

    def wait_for(self, work: Awaitable[T], rule: Rule, name: str, extra_s: float = 0.0) -> T:
        """Await in the backend's loop, but not for ever."""
        future = asyncio.run_coroutine_threadsafe(_coroutine(work), self._loop)
        done, _ = futures.wait([future], self.patience_s + extra_s)
        if not done:
            future.cancel()
            broken(rule, f"`{name}` did not return within {self.patience_s + extra_s:g} s")
        error = future.exception()
        if error is not None and not isinstance(error, GatewayError):
            broken(rule, f"`{name}` raised {error!r}")
        return future.result()

    # Requests.

    def submit(self, request: Request) -> Answer:
        answer = self.answers[request.request_id] = Answer(request)
        self.call("submit", lambda: self.backend.submit(request))
        return answer

    def cancel(self, request_id: int) -> None:
        self.call("cancel", lambda: self.backend.cancel(request_id))

    def capacity(self) -> Capacity:
        found: list[Capacity] = []
        self.call("capacity", lambda: found.append(self.backend.capacity()))
        return found[0]

    def call(self, name: str, work: Callable[[], None]) -> None:
        """Call a method that must return at once and raise nothing, from a thread of its own."""
        raised: list[BaseException] = []

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=guarded, daemon=True, name=name)
        thread.start()
        thread.join(self.patience_s)
        demand(not thread.is_alive(), "threads", f"`{name}` did not return within {self.patience_s:g} s")
        demand(not raised, "threads", f"`{name}` raised {raised[0]!r}" if raised else "")

    def run(self, *requests: Request) -> list[Answer]:
        """Submit all, wait for all endings."""
        answers = [self.submit(request) for request in requests]
        self.wait_ended(*answers)
        return answers

    def run_one(self, request: Request) -> Answer:
        return self.run(request)[0]

    def wait_ended(self, *answers: Answer, rule: Rule = "one-ending") -> None:
        def seen() -> str:
            still_open = [answer.request.request_id for answer in answers if not answer.ended]
            return f"{len(still_open)} of {len(answers)} requests did not end (ids {still_open[:8]})"

        self.wait_until(lambda: all(answer.ended for answer in answers), rule, seen)

    def wait_tokens(self, answer: Answer, n: int) -> None:
        """Until it has `n` tokens or has ended."""
        self.wait_until(
            lambda: len(answer.tokens) >= n or answer.ended,
            "one-ending",
            lambda: f"request {answer.request.request_id} got {len(answer.tokens)} tokens and did not end",
        )

    def wait_until(self, condition: Callable[[], bool], rule: Rule, seen: Callable[[], str]) -> None:
        """Until `condition` holds, looked at whenever an event arrives; patience begins again with each."""
        with self._changed:
            quiet_since, steps = time.monotonic(), len(self.steps)
            while not condition():
                if len(self.steps) != steps:
                    quiet_since, steps = time.monotonic(), len(self.steps)
                if time.monotonic() - quiet_since > self.patience_s:
                    broken(rule, f"{seen()}, and no event came for {self.patience_s:g} s")
                self._changed.wait(0.05)

    def wait_whole(self, rule: Rule, after: str) -> None:
        """Until `capacity` says that nothing is held."""
        deadline = time.monotonic() + self.patience_s
        while not self._is_whole():
            demand(time.monotonic() < deadline, rule, f"{after}, `capacity` stays at {self.backend.capacity()}")
            time.sleep(0.001)

    @contextmanager
    def held_emit(self, running: Answer) -> Iterator[None]:
        """Inside, the `emit` of a step of `running` does not return: the gateway is busy."""
        if running.ended:
            _ = running.finished  # no failure: an engine that has died emits where it is asked, and would wait there
        self._held.clear()
        self._gate.clear()
        try:
            while not running.ended and not self._held.wait(0.001):
                pass
            yield
        finally:
            self._gate.set()

    @property
    def is_clean(self) -> bool:
        """Whether the next test may use it: nothing open, nothing held, healthy."""
        if not all(answer.ended for answer in self.answers.values()):
            return False
        deadline = time.monotonic() + min(0.5, self.patience_s)
        while not self._is_whole():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return self.healthy()

    def _is_whole(self) -> bool:
        now = self.backend.capacity()
        return now.free_sequences == now.max_sequences and now.free_kv_tokens == now.total_kv_tokens

    # The backend's threads.

    def _emit(self, step: StepEvents) -> None:
        alone = self._emitting.acquire(blocking=False)
        try:
            if not self._gate.is_set():
                self._held.set()
                self._gate.wait(2 * self.patience_s)
            with self._changed:
                self.overlaps += not alone
                self.steps.append(step)
                strange = [event for event in step.events() if not self._record(event)]
                self._changed.notify_all()
            for guest in {self.guests[event.request_id] for event in strange if event.request_id in self.guests}:
                guest.take(strange)
            self.strangers += [event for event in strange if event.request_id not in self.guests]
            if self.on_emit is not None:
                self.on_emit(step)
        finally:
            if alone:
                self._emitting.release()

    def _record(self, event: Event) -> bool:
        """False if the event belongs to no request of ours."""
        answer = self.answers.get(event.request_id)
        match event:
            case _ if answer is None:
                return False
            case Token():
                (answer.late if answer.ended else answer.tokens).append(event)
            case _:
                answer.endings.append(event)
        return True

    def _turn(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


class Guest(Backend):
    """The running backend as somebody else's: requests go straight to it, and their events come back here."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._emit: Emit | None = None
        self._leaving = threading.Lock()

    def take(self, events: list[Event]) -> None:
        """In the engine's thread."""
        with self._leaving:
            mine = [event for event in events if self._engine.guests.get(event.request_id) is self]
            if self._emit is not None:
                self._emit(StepEvents.pack(mine))

    @property
    def capabilities(self) -> Capabilities:
        return self._engine.backend.capabilities

    async def start(self, emit: Emit) -> ModelInfo:
        self._emit = emit
        return self._engine.model

    def submit(self, request: Request) -> None:
        self._engine.guests[request.request_id] = self
        self._engine.backend.submit(request)

    def cancel(self, request_id: int) -> None:
        self._engine.backend.cancel(request_id)

    def capacity(self) -> Capacity:
        return self._engine.backend.capacity()

    async def health(self) -> None:
        # The backend lives in the loop that started it.
        await asyncio.to_thread(self._engine.wait_for, self._engine.backend.health(), "health", "health")

    async def stop(self, drain_s: float) -> None:  # noqa: ARG002
        """The guest leaves, and hears nothing more; the engine goes on."""
        with self._leaving:
            self._emit = None


async def _coroutine(work: Awaitable[T]) -> T:
    return await work
