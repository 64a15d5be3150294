"""Whether and when a process that ended is started again: at once, then ever later, and not for ever."""

from __future__ import annotations

from dataclasses import dataclass

SETTLED_S = 60.0
"""Who served for so long has proven that it can; its next end counts as a first one."""
LONGEST_S = 30.0
FAILED_STARTS = 3
"""A process that fails so often in a row before it is ready will not come up by being tried again."""
ENDS = 20
"""Nor will one stay up that has ended so often in a row."""


@dataclass(slots=True)
class Restarts:
    """The ends of one process and those that took its place."""

    total: int = 0
    """Starts after the first."""
    _ends: int = 0
    _failed_starts: int = 0

    def delay_s(self, served_s: float | None) -> float | None:
        """The process has ended, `served_s` seconds after it was ready (None: it never was).

        Returns the seconds to wait before the next start; None: give up.
        """
        if served_s is None:
            self._failed_starts += 1
        else:
            self._failed_starts = 0
            if served_s >= SETTLED_S:
                self._ends = 0
        self._ends += 1
        if self._failed_starts >= FAILED_STARTS or self._ends >= ENDS:
            return None
        self.total += 1
        return 0.0 if self._ends == 1 else min(0.5 * 2.0 ** (self._ends - 2), LONGEST_S)
