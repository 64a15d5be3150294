"""How fast requests have been ending lately, and so when one that is refused now should come again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 30.0
SLOT_S = 1.0
UNKNOWN_S = 5.0
"""What is said before anything has ended."""
LONGEST_S = 60.0


@dataclass(slots=True)
class Pace:
    """Ends per second over the last `WINDOW_S`."""

    _slots: deque[tuple[float, int]] = field(default_factory=deque)
    """(begin, ends) of each second that had any."""

    def ended(self, now: float, count: int = 1) -> None:
        if self._slots and now - self._slots[-1][0] < SLOT_S:
            begin, before = self._slots[-1]
            self._slots[-1] = (begin, before + count)
        else:
            self._slots.append((now, count))
        self._forget(now)

    def retry_after_s(self, now: float, ahead: int) -> float:
        """Seconds, at least 1, in which `ahead` requests will have ended if it goes on like that."""
        self._forget(now)
        ends = sum(count for _, count in self._slots)
        if not ends:
            return UNKNOWN_S
        per_s = ends / max(now - self._slots[0][0], SLOT_S)
        return min(max(ahead / per_s, 1.0), LONGEST_S)

    def _forget(self, now: float) -> None:
        while self._slots and now - self._slots[0][0] > WINDOW_S:
            self._slots.popleft()
