"""The launcher's side of a child process: start it, read its log and report, end it with all it started."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import msgspec

from tgi_gateway.errors import StartError
from tgi_gateway.launcher.child import BEAT_S, Assignment, Order, Report

MAX_LINE_BYTES = 1 << 20
"""A longer log line is cut in pieces."""
LAST_WORDS_S = 2.0
"""How long to wait for the log of a dead child, whose own children may keep the pipe open."""

OnLine = Callable[[bytes, str], None]
"""Called with each line that a child prints, and its name."""


class Reports:
    """What a child tells, as it comes."""

    def __init__(self, fd: int) -> None:
        self.first: asyncio.Future[Report | None] = asyncio.get_running_loop().create_future()
        """Ready, failed, or None if it ended without a word."""
        self._silent_s = 0.0
        self._task = asyncio.create_task(self._read(fd))

    async def silence(self, limit_s: float) -> None:
        """Return when the child has told of no progress for `limit_s`; it must have promised beats.

        Time is counted in ticks of this process, so that one during which the launcher, or the whole machine, stood
        still is no reproach.
        """
        while self._silent_s < limit_s:
            await asyncio.sleep(BEAT_S)
            self._silent_s += BEAT_S

    async def _read(self, fd: int) -> None:
        try:
            async for line in _lines(fd):
                report = msgspec.json.decode(line, type=Report)
                if report.kind == "beat":
                    self._silent_s = report.silent_s
                elif not self.first.done():
                    self.first.set_result(report)
        finally:
            if not self.first.done():
                self.first.set_result(None)


@dataclass(eq=False, slots=True)
class Child:
    """A running process. Made by `start`."""

    name: str
    process: asyncio.subprocess.Process
    reports: Reports
    exit: asyncio.Task[int]
    """Its exit code, after all of its log was read."""

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def ready(self) -> str:
        """Wait until it is ready; returns its text. Raises `StartError` if it never will be."""
        report = await self.reports.first
        if report is not None and report.kind == "ready":
            return report.text
        code = await self.exit
        if report is not None:
            raise StartError(report.text, exit_code=report.exit_code)
        raise StartError(f"{self.name} {ending(code)} before it was ready")

    def order(self, order: Order) -> None:
        """Tell it; one that has ended hears nothing."""
        if self.alive and self.process.stdin is not None:
            self.process.stdin.write(msgspec.json.encode(order) + b"\n")

    def tell_to_stop(self) -> None:
        self._signal(signal.SIGTERM, group=False)

    def kill(self) -> None:
        """End it and everything it started."""
        self._signal(signal.SIGKILL, group=True)

    async def stop(self, timeout_s: float) -> bool:
        """Let it finish for so long, then kill it; False if it had to be killed."""
        self.tell_to_stop()
        done, _ = await asyncio.wait([self.exit], timeout=timeout_s)
        self.kill()
        await asyncio.wait([self.exit])
        return bool(done)

    def _signal(self, number: signal.Signals, *, group: bool) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if group:
                os.killpg(self.process.pid, number)  # it leads a session, and so a group, of its own
            elif self.alive:
                self.process.send_signal(number)


async def start(
    module: str, assignment: Assignment, *, environ: Mapping[str, str], on_line: OnLine, keep_fds: tuple[int, ...] = ()
) -> Child:
    """Run ``python -m module`` with `assignment`, whose `report_fd` is filled in here."""
    report_read, report_write = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the user's working directory is no place to import from
            "-m",
            module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=(report_write, *keep_fds),
            start_new_session=True,  # a terminal's Ctrl-C reaches only the launcher
            env=dict(environ),
        )
    except OSError as error:
        os.close(report_read)
        raise StartError(f"cannot start {assignment.process}: {error.strerror}") from error
    finally:
        os.close(report_write)
    reports = Reports(report_read)
    exited = asyncio.create_task(_follow(process, assignment.process, on_line))
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(dataclasses.replace(assignment, report_fd=report_write)) + b"\n")
    with contextlib.suppress(ConnectionError):  # it died already; its log will say why
        await process.stdin.drain()
    return Child(assignment.process, process, reports, exited)


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (the system may have run out of memory: see its log)" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


async def _lines(fd: int) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
    )
    try:
        while line := await reader.readline():
            yield line
    finally:
        transport.close()


async def _follow(process: asyncio.subprocess.Process, name: str, on_line: OnLine) -> int:
    assert process.stdout is not None
    log = asyncio.create_task(_read_lines(process.stdout, name, on_line))
    code = await process.wait()
    await asyncio.wait([log], timeout=LAST_WORDS_S)
    log.cancel()
    return code


async def _read_lines(stream: asyncio.StreamReader, name: str, on_line: OnLine) -> None:
    rest = b""
    while chunk := await stream.read(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            on_line(line, name)
        if len(rest) > MAX_LINE_BYTES:
            on_line(rest, name)
            rest = b""
    if rest:
        on_line(rest, name)
