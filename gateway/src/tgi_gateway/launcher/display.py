"""What a user sees while the server starts: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from tgi_gateway.telemetry.logs import Line, Log

PLAIN_EVERY_S = 5.0


class Display:
    """Shows one phase at a time. Leave the block before anything but progress is to be seen.

    While a bar is shown, rich puts itself in front of `sys.stdout`, so that log lines appear above the bar.
    """

    def __init__(self, log: Log, *, stream: TextIO | None = None, json_output: bool = False) -> None:
        self._log = log
        stream = stream or sys.stdout
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._share: float | None = None
        self._shown_at = -PLAIN_EVERY_S
        if stream.isatty() and not json_output:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=Console(file=stream),
                refresh_per_second=4,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, line: Line) -> None:
        """Show the progress that `line` tells, see `logs.progress`."""
        fraction = line.fields.get("progress")
        share = float(fraction) if isinstance(fraction, (int, float)) else None
        if self._bar is not None:
            self._move_bar(line.message, share)
        elif self._is_news(line.message, share):
            self._shown_at = time.monotonic()
            self._log.write(line if share is None else replace(line, message=f"{line.message}: {share:.0%}"))
        self._phase, self._share = line.message, share

    def bytes(self, phase: str) -> Callable[[int, int], None]:
        """A `hub.Report` that shows a download."""

        def report(here: int, total: int) -> None:
            share = round(here / max(total, 1), 3)
            self.update(Line.now(phase, "tgi_gateway.hub", fields={"phase": phase, "progress": share}))

        return report

    def _is_news(self, phase: str, share: float | None) -> bool:
        if phase != self._phase:
            return True
        return (share == 1.0) > (self._share == 1.0) or (
            share != self._share and time.monotonic() - self._shown_at >= PLAIN_EVERY_S
        )

    def _move_bar(self, phase: str, share: float | None) -> None:
        assert self._bar is not None
        if phase != self._phase or self._task is None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(phase, total=None if share is None else 1.0)
        self._bar.update(self._task, completed=share or 0.0, total=None if share is None else 1.0)
