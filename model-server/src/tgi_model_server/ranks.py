"""Rank 0's side of an engine of several ranks: start the others, send them every step, notice their end, end them."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import torch.distributed as dist

from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import StartError
from tgi_gateway.launcher.child import Report
from tgi_gateway.launcher.processes import ending
from tgi_model_server.device import Device
from tgi_model_server.engine import Engine
from tgi_model_server.parallel import COLLECTIVE_TIMEOUT_S, Group, Shard
from tgi_model_server.plan import StepPlan, StepResult
from tgi_model_server.plan_wire import PlanEncoder
from tgi_model_server.rank_task import MEETING_TIMEOUT_S, RankTask, connect, name_of, open_store, write_plan
from tgi_model_server.runner import DeviceLost, StepOutput

log = logging.getLogger(__name__)

STOP_S = 3.0
"""How long other ranks get to end by themselves."""
STEP_TIMEOUT_S = COLLECTIVE_TIMEOUT_S + 15.0
"""Longer than any step: ranks that wait for each other in a device's own exchange may do so for ever."""
STEP_POLL_S = 1.0
NEWS_S = 1.0
"""A broken exchange is noticed before the death that caused it; how long to wait for the latter."""


@dataclass(eq=False, slots=True)
class _Follower:
    rank: int
    process: subprocess.Popen[bytes]
    plans_fd: int
    report_fd: int
    ready: threading.Event = field(default_factory=threading.Event)
    """It is about to meet the others, or has ended."""
    report: Report | None = None
    """What it told of its failure."""


class Followers:
    """Ranks 1 to N - 1. Made and ended by the thread that loads the engine; `send` belongs to the loop's."""

    def __init__(self, device: Callable[[], Device], options: EngineOptions) -> None:
        """Start them. Raises `StartError`."""
        if dist.is_available() and dist.is_initialized():
            raise StartError("this process runs an engine of several shards already; it can run only one.")
        self._world_size = options.num_shard
        self._lock = threading.Lock()
        self._ending = False
        self._failure: StartError | None = None
        self._failed = threading.Event()
        self._over = threading.Event()
        self._step_since_s: float | None = None
        self._broken = False
        """Some rank may never end by itself."""
        self._when_lost: Callable[[str], None] | None = None
        self._followers: list[_Follower] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._plans: list[int] = []
        self._encoder = PlanEncoder()
        try:
            threading.Thread(target=self._watch_steps, name="steps-watch", daemon=True).start()
            for rank in range(1, self._world_size):
                self._start(rank, name_of(device), options)
        except BaseException:
            self.end()
            raise

    def meet(self, device: Device, shard: Shard) -> Group:
        """Wait for all and make the group. Raises `StartError` if one of them ends before."""
        deadline_s = time.monotonic() + MEETING_TIMEOUT_S
        for follower in self._followers:
            rank = follower.rank
            if not follower.ready.wait(max(deadline_s - time.monotonic(), 0.0)):
                raise StartError(f"rank {rank} was not ready after {MEETING_TIMEOUT_S:.0f} s. Look at its log.")
            if self._failure is not None:
                raise self._failure
        port = self._listener.getsockname()[1]
        return connect(device, shard, open_store(port, self._world_size, self._listener.detach()))

    @property
    def failure(self) -> StartError | None:
        """Why the engine can run no further step."""
        return self._failure

    def when_lost(self, call: Callable[[str], None]) -> None:
        """Call this once a rank has ended by itself, from a thread of its own; at once if one has already."""
        with self._lock:
            self._when_lost = call
        if self._failure is not None:
            call(str(self._failure))

    def send(self, plan: StepPlan) -> None:
        """Every rank runs this next. Raises `OSError`."""
        write_plan(self._plans, self._encoder.encode(plan), COLLECTIVE_TIMEOUT_S)

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Around what waits for a step. One that takes too long is the end of the engine."""
        self._step_since_s = time.monotonic()
        try:
            yield
        finally:
            self._step_since_s = None

    def cause(self) -> StartError | None:
        """Why an exchange broke, if it was because a rank has ended. Blocks until that would be known."""
        if not self._failed.wait(NEWS_S):
            self._broken = True
        return self._failure

    def lost(self) -> DeviceLost:
        """What a broken step means: the ranks are no longer at the same place."""
        return DeviceLost(str(self.cause() or f"a step broke on one of the {self._world_size} ranks or took too long"))

    def tell_to_stop(self) -> None:
        """They end after the steps that were sent."""
        with self._lock:
            self._ending = True
        self._over.set()
        while self._plans:
            os.close(self._plans.pop())

    def kill(self) -> None:
        """End them at once, wherever they are."""
        self._broken = True
        self.end()

    def end(self) -> None:
        """Returns when none of them runs any more. Idempotent."""
        self.tell_to_stop()
        self._listener.close()
        deadline_s = time.monotonic() + (0.0 if self._broken or self._failure is not None else STOP_S)
        for follower in self._followers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                follower.process.wait(max(deadline_s - time.monotonic(), 0.0))
                continue
            follower.process.kill()
            follower.process.wait()
        for follower in self._followers:
            assert follower.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                follower.process.stdin.close()

    def _start(self, rank: int, device: str, options: EngineOptions) -> None:
        plans_read, plans_write = os.pipe()
        report_read, report_write = os.pipe()
        os.set_blocking(plans_write, False)
        self._plans.append(plans_write)
        task = RankTask(
            shard=Shard(rank, self._world_size),
            device=device,
            options=options,
            port=self._listener.getsockname()[1],
            plans_fd=plans_read,
            report_fd=report_write,
            log_level=_log_level(),
        )
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tgi_model_server.rank"],
                stdin=subprocess.PIPE,
                pass_fds=(plans_read, report_write),
            )
        except OSError as error:
            os.close(report_read)
            raise StartError(f"cannot start rank {rank}: {error.strerror}") from error
        finally:
            os.close(plans_read)
            os.close(report_write)
        follower = _Follower(rank, process, plans_write, report_read)
        self._followers.append(follower)
        threading.Thread(target=self._watch, args=(follower,), name=f"rank-{rank}-watch", daemon=True).start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already, which the watch tells
            process.stdin.write(task.encode())
            process.stdin.flush()

    def _watch(self, follower: _Follower) -> None:
        with os.fdopen(follower.report_fd, "rb") as reports:
            for line in reports:
                report = msgspec.json.decode(line, type=Report)
                if report.kind == "ready":
                    follower.ready.set()
                else:
                    follower.report = report
        self._ended(follower, follower.process.wait())

    def _ended(self, follower: _Follower, code: int) -> None:
        report = follower.report
        how = ending(code) if report is None else f"failed: {report.text}"
        error = StartError(
            f"rank {follower.rank} of {self._world_size} {how}", exit_code=None if report is None else report.exit_code
        )
        self._fail(error)
        self._failed.set()
        follower.ready.set()

    def _fail(self, error: StartError) -> None:
        with self._lock:
            if self._ending or self._failure is not None:
                return
            self._failure = error
            call = self._when_lost
        log.error("%s", error)
        if call is not None:
            call(str(error))

    def _watch_steps(self) -> None:
        while not self._over.wait(STEP_POLL_S):
            since_s = self._step_since_s
            if since_s is not None and time.monotonic() - since_s > STEP_TIMEOUT_S:
                self._broken = True
                self._fail(StartError(f"a step of {self._world_size} ranks took more than {STEP_TIMEOUT_S:.0f} s"))
                self._failed.set()
                return


def _log_level() -> str:
    """What this process logs, the others shall too."""
    levels = {"debug": logging.DEBUG, "info": logging.INFO}
    return next((name for name, level in levels.items() if log.isEnabledFor(level)), "warn")


class Leader:
    """Implements `runner.Runner` on rank 0: tells the others of every step, and ends the engine if one of them breaks.

    Ranks exchange values within a step; one that leaves it, for whatever reason, leaves the others waiting. So there
    is no next step after a broken one.
    """

    def __init__(self, engine: Engine, followers: Followers) -> None:
        self._engine = engine
        self._followers = followers
        # Rank 0 alone knows the requests.
        self.admit = engine.admit
        self.release = engine.release

    @property
    def page_size(self) -> int:
        return self._engine.page_size

    @property
    def num_pages(self) -> int:
        return self._engine.num_pages

    @property
    def max_sequences(self) -> int:
        return self._engine.max_sequences

    @property
    def pipeline_depth(self) -> int:
        return self._engine.pipeline_depth

    def run(self, plan: StepPlan) -> StepOutput:
        try:
            self._followers.send(plan)
            with self._followers.in_step():
                return _LeaderOutput(self._engine.run(plan), self._followers)
        except Exception as error:
            raise self._followers.lost() from error


@dataclass(frozen=True, slots=True)
class _LeaderOutput:
    """Implements `runner.StepOutput`."""

    output: StepOutput
    followers: Followers

    def wait(self) -> StepResult:
        try:
            with self.followers.in_step():
                result = self.output.wait()
        except Exception as error:
            raise self.followers.lost() from error
        if self.followers.failure is not None:
            raise DeviceLost(str(self.followers.failure))  # an aborted exchange leaves anything in its tensors
        return result
