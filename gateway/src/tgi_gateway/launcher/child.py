"""The child's side of a process that the launcher started: what to do, where to report, when to die.

A child gets one line of JSON on its standard input, its `Assignment`. The pipe then stays open for `Order`s; when it
closes, the launcher is gone and the child ends itself and all it started. Logs go to standard output, `Report`s to a
pipe of their own, so that nothing a library prints can be taken for a report.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from tgi_gateway.errors import GatewayError, StartError
from tgi_gateway.settings import Settings
from tgi_gateway.telemetry import logs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one child shall do."""

    process: str
    """Its name in the log."""
    settings: Settings
    report_fd: int
    runtime_folder: str
    socket_path: str
    metrics_folder: str = ""
    model_path: str = ""
    """What the engine loads."""
    tokenizer_path: str = ""
    """The folder of the model's tokenizer."""
    worker: int = 0
    """Which HTTP worker."""
    restarts: int = 0
    """How many processes had this place before."""
    listen_fd: int = -1
    keys: tuple[str, ...] = ()
    """Of an HTTP worker: `Keys.hashed`; none: every caller is welcome."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the launcher tells a running child: the API keys that are accepted from now on."""

    keys: tuple[str, ...]


BEAT_S = 1.0
"""How often a child that promises beats sends one."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a child tells the launcher: once that it is ready, or why it will never be; then that it is alive."""

    kind: Literal["ready", "failed", "beat"]
    text: str = ""
    """ready: what the next process needs to know; failed: the message."""
    exit_code: int = 0
    silent_s: float = 0.0
    """beat: for so long it has had work and made no progress."""


class Reporter:
    """The child's line to the launcher, in both directions."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_blocking(fd, False)  # a launcher that does not read for a while must not stop its children
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._wake: Callable[[], object] = lambda: None

    def obey(self, carry_out: Callable[[Order], None]) -> None:
        """Have `carry_out` called in this event loop with each order, also with those that came before."""
        loop = asyncio.get_running_loop()

        def look() -> None:
            while not self._orders.empty():
                carry_out(self._orders.get())

        self._wake = lambda: loop.call_soon_threadsafe(look)
        look()

    def ordered(self, order: Order) -> None:
        """From the thread that listens."""
        self._orders.put(order)
        self._wake()

    def ready(self, text: str = "") -> None:
        self._send(Report("ready", text))

    def failed(self, text: str, exit_code: int) -> None:
        self._send(Report("failed", text, exit_code))

    async def beat(self, silent_s: Callable[[], float]) -> None:
        """Tell for ever that the event loop turns, and how long the work in it has stood still."""
        while True:
            await asyncio.sleep(BEAT_S)
            with contextlib.suppress(BlockingIOError):
                self._send(Report("beat", silent_s=round(silent_s(), 3)))

    def _send(self, report: Report) -> None:
        os.write(self._fd, msgspec.json.encode(report) + b"\n")


def run(main: Callable[[Assignment, Reporter], Awaitable[int | None]]) -> int:
    """Read the assignment and run `main` in a uvloop event loop; returns the exit code, `main`'s if it has one."""
    import uvloop

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what Ctrl-C means
    faulthandler.enable()
    told = _lines(sys.stdin.fileno())
    assignment = msgspec.json.decode(next(told, b""), type=Assignment)
    reporter = Reporter(assignment.report_fd)
    logs.configure_child(assignment.settings.log_level, assignment.process)
    _watch_launcher(told, assignment.runtime_folder, reporter)

    async def awaited() -> int:
        return await main(assignment, reporter) or 0

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(awaited())
    except GatewayError as error:
        reporter.failed(str(error), error.exit_code if isinstance(error, StartError) else 1)
        return 1
    except Exception as error:
        logger.exception("%s failed", assignment.process)
        reporter.failed(f"{type(error).__name__}: {error}", 1)
        return 1


def stop_signal() -> asyncio.Event:
    """Set at SIGTERM. Until this is called SIGTERM ends the process at once, so call it before telling to be ready."""
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    return told


def _lines(fd: int) -> Iterator[bytes]:
    """Whole lines until the other end closes. No thread may be inside Python's own reader when the interpreter ends."""
    rest = b""
    while chunk := os.read(fd, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _watch_launcher(told: Iterator[bytes], runtime_folder: str, reporter: Reporter) -> None:
    """Take the launcher's orders; end this process group as soon as it is gone, however it went."""

    def watch() -> None:
        for line in told:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                reporter.ordered(msgspec.json.decode(line, type=Order))
        shutil.rmtree(runtime_folder, ignore_errors=True)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
