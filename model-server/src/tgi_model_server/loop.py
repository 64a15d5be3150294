"""The step loop: one thread that plans, runs and reads steps for as long as there is work.

With a Runner of depth 2 it plans and starts step n + 1 while step n runs, and reads step n while n + 1 runs. With one
of depth 1, which computes in this thread, another thread hands the events of step n on while n + 1 is computed.
Callers' threads only append to a deque and set an event.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tgi_gateway.errors import BackendFailed, GatewayError, IncompleteGeneration, Unhealthy
from tgi_gateway.types import Failed, Request, StepEvents
from tgi_model_server.batcher import Batcher, BatchLimits, BatchStats, Step
from tgi_model_server.plan import StepResult
from tgi_model_server.runner import DeviceLost, Runner, StepOutput
from tgi_model_server.teller import Teller

if TYPE_CHECKING:
    from tgi_model_server.sampling.grammar import Constraint

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""So many broken steps without a good one between them end the engine."""


@dataclass(frozen=True, slots=True)
class Load:
    """A moment of the loop, for admission and metrics."""

    running: int
    waiting: int
    available_pages: int


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A request on its way into the batcher, or only to be told of its ending."""

    request: Request
    arrived_s: float
    """time.monotonic()"""
    ending: GatewayError | Literal["cancelled"] | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class _NotStarted:
    """Output of a step that `Runner.run` refused."""

    error: Exception

    def wait(self) -> StepResult:
        raise self.error


class StepLoop:
    """Drives one Runner. `submit`, `cancel` and everything that only reads may be called from any thread."""

    def __init__(
        self,
        runner: Runner,
        limits: BatchLimits,
        eos_token_ids: Iterable[int],
        emit: Callable[[StepEvents], None],
    ) -> None:
        self.limits = limits
        self.failure: str | None = None
        """Why no step can run any more."""
        self.last_progress_s = time.monotonic()
        """time.monotonic() when a step was last done, or work last began."""
        self.turns = 0
        self._runner = runner
        self.batcher = Batcher(limits, runner, eos_token_ids)
        """Belongs to the loop's thread."""
        self._emit = emit
        self._teller: Teller | None = None
        self._in_flight: deque[tuple[Step, StepOutput]] = deque()
        self._failures = 0
        # From other threads; cancels as plain ids.
        self._inbox: deque[_Submitted | int] = deque()
        self._wake = threading.Event()
        self._closed = threading.Event()
        """Nobody reads the inbox any more."""
        self._closing = threading.RLock()
        """Held to emit from other threads: never two emits at a time."""
        self._stop_at_s: float | None = None
        self._lost: str | None = None
        self._load = Load(0, 0, self.batcher.available_pages)
        self._thread = threading.Thread(target=self._main, name="step-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(
        self,
        request: Request,
        ending: GatewayError | Literal["cancelled"] | None = None,
        *,
        constraint: Constraint | None = None,
        arrived_s: float | None = None,
    ) -> None:
        """Queue the request, or only its ending; its events follow from the loop's thread.

        `arrived_s`: time.monotonic() when it came, if it was kept somewhere meanwhile.
        """
        now_s = time.monotonic()
        self._inbox.append(_Submitted(request, now_s if arrived_s is None else arrived_s, ending, constraint))
        if not self._wake.is_set():
            self.last_progress_s = now_s
            self._wake.set()
        if self._closed.is_set():
            self._refuse_inbox()

    def cancel(self, request_id: int) -> None:
        self._inbox.append(request_id)
        self._wake.set()

    def stop(self, drain_s: float) -> None:
        """Go on for up to `drain_s` seconds with what is open, fail the rest, end the thread. Blocks; idempotent."""
        self._stop_at_s = time.monotonic() + drain_s
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        else:
            self._close()

    def lose(self, why: str) -> None:
        """The device is lost, as somebody noticed outside of a step: end everything."""
        self._lost = why
        self._wake.set()

    @property
    def load(self) -> Load:
        """As of the last step; what has been submitted since counts as waiting."""
        load = self._load
        return Load(load.running, load.waiting + len(self._inbox), load.available_pages)

    @property
    def stats(self) -> BatchStats:
        """Counters since start; they change while one looks."""
        return self.batcher.stats

    @property
    def ended(self) -> bool:
        """Whether everything submitted from now on fails."""
        return self._closed.is_set()

    @property
    def busy(self) -> bool:
        load = self.load
        return bool(load.running or load.waiting)

    def _main(self) -> None:
        if self._runner.pipeline_depth == 1:
            self._teller = Teller(self._tell, self.lose)
        try:
            while self.turn():
                if not self.has_work():
                    self._sleep()
        except Exception as error:
            self.failure = self.failure or "the step loop broke"
            log.critical("the step loop ends: %s", error, exc_info=True)
        finally:
            if self._teller is not None:
                self._teller.close()  # before others may emit
            self._close()

    def turn(self) -> bool:
        """Start a step and read one, each if there is one. False when the loop is over. Never sleeps."""
        batcher, in_flight = self.batcher, self._in_flight
        was_in_flight = bool(in_flight)
        self.turns += 1
        self._take_inbox()
        if self._lost is not None:
            self._lose(self._lost)
            return False
        if self._stop_at_s is not None and (not self.has_work() or time.monotonic() >= self._stop_at_s):
            return False
        started = self._start_step()
        if in_flight and (not started or len(in_flight) >= self._runner.pipeline_depth):
            self._read_step()
        self._note_load()
        events = batcher.take_events()
        if events and self._teller is not None:
            self._teller.hold(events)
        elif events:
            self._tell(events)
        if self.failure is not None:
            return False
        # Sleeping with open requests would hang them, turning on would burn a core.
        assert started or was_in_flight or not (batcher.running or batcher.waiting), "no step fits any request"
        return True

    def _tell(self, events: StepEvents) -> None:
        """Hand events on, their log-probabilities as numbers: see `StepResult.logprobs`."""
        events.logprobs[:] = map(float, events.logprobs)
        self._emit(events)

    def _sleep(self) -> None:
        if self._teller is not None:
            self._teller.tell()
        # Clear first, look second: whoever appends in between sets the event again.
        self._wake.clear()
        if not self._inbox and self._stop_at_s is None and self._lost is None:
            self._wake.wait()

    def has_work(self) -> bool:
        """Whether anything is open, in flight or submitted. For the loop's thread."""
        return bool(self._in_flight or self._inbox or self.batcher.running or self.batcher.waiting)

    def _take_inbox(self) -> None:
        inbox = self._inbox
        if not inbox:
            return
        for _ in range(len(inbox)):
            item = inbox.popleft()
            if isinstance(item, int):
                self.batcher.cancel(item)
                continue
            if item.ending is None:
                self.batcher.add(item.request, item.arrived_s, item.constraint)
            elif item.ending == "cancelled":
                self.batcher.withdraw(item.request)
            else:
                self.batcher.refuse(item.request.request_id, item.ending)
        self._note_load()  # now: the next step may take long

    def _note_load(self) -> None:
        self._load = Load(self.batcher.running, self.batcher.waiting, self.batcher.available_pages)

    def _start_step(self) -> bool:
        if self._in_flight and isinstance(self._in_flight[-1][1], _NotStarted):
            return False
        step = self.batcher.plan()
        if self._teller is not None:
            self._teller.tell()
        if step is None:
            return False
        output: StepOutput
        try:
            output = self._runner.run(step.plan)
        except Exception as error:
            # The steps before it may be sound: it breaks when its turn comes to be read.
            output = _NotStarted(error)
        self._in_flight.append((step, output))
        return True

    def _read_step(self) -> None:
        step, output = self._in_flight[0]
        try:
            result = output.wait()
        except Exception as error:
            self._break(error)
            return
        self._in_flight.popleft()
        self.batcher.complete(step, result)
        self._failures = 0
        self.last_progress_s = time.monotonic()

    def _break(self, error: Exception) -> None:
        """The steps in flight are lost: end their requests, and the engine if it can no longer run."""
        steps = [step for step, _ in self._in_flight]
        log.error("step %d with %d sequences broke: %s", steps[0].number, len(steps[0].rows), error, exc_info=error)
        self._in_flight.popleft()
        if isinstance(error, DeviceLost):
            self._lose(str(error))
            return
        while self._in_flight:
            later, output = self._in_flight.popleft()
            try:
                # Its result rests on the broken step. It is waited for because until then it may touch its pages.
                output.wait()
            except Exception as consequence:
                log.warning("step %d broke after it: %s", later.number, consequence)
        # What a library says may hold paths and addresses; a client gets to read only our own errors.
        told = error if isinstance(error, GatewayError) else BackendFailed("the engine could not compute a step")
        self.batcher.fail(steps, told)
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            self.failure = f"{self._failures} steps in a row broke, the last with: {error}"

    def _lose(self, why: str) -> None:
        self._in_flight.clear()
        self.failure = f"the device is lost: {why}"

    def _close(self) -> None:
        """End whatever is still open; nothing is taken from now on."""
        self._closed.set()
        while self._in_flight and self.failure is None:
            self._read_step()
        if self.failure is None:
            self.batcher.fail_all(IncompleteGeneration())
        else:
            self.batcher.abandon(BackendFailed("the engine has stopped"))
        self._load = Load(0, 0, self.batcher.available_pages)
        with self._closing:
            events = self.batcher.take_events()
            if events:
                self._tell(events)
            self._refuse_inbox()

    def _refuse_inbox(self) -> None:
        """Fail what was submitted to a closed loop. Each item is popped by exactly one thread."""
        with self._closing:
            failed: list[Failed] = []
            while self._inbox:
                item = self._inbox.popleft()
                if not isinstance(item, int):
                    failed.append(Failed(item.request.request_id, Unhealthy.error_type, "the engine has stopped"))
            if failed:
                self._emit(StepEvents(failed=failed))
