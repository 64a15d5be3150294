"""The line in front of the engine: lower priority number first, then first come, first served."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from tgi_gateway.types import Request


@dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way through the host. Times are time.perf_counter() seconds."""

    request: Request
    number: int
    """Order of arrival."""
    arrived_at: float
    entered_at: float = 0.0
    """When it left the queue for the engine."""
    submitted: bool = False
    """The engine's `submit` has returned; before that a cancel would not be understood."""
    cancelled: bool = False
    generated_tokens: int = 0

    @property
    def waited_s(self) -> float:
        return self.entered_at - self.arrived_at


@dataclass(slots=True)
class Queue:
    """Tickets by priority and arrival. `add` and `pop` cost O(log n), `cancel` O(1) amortized."""

    _heap: list[tuple[int, int, Ticket]] = field(default_factory=list)
    """May hold cancelled tickets, fewer than waiting ones or a handful."""
    _waiting: dict[int, Ticket] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._waiting

    def __iter__(self) -> Iterator[Ticket]:
        """In no particular order."""
        return iter(self._waiting.values())

    def add(self, ticket: Ticket) -> None:
        assert ticket.request.request_id not in self._waiting
        self._waiting[ticket.request.request_id] = ticket
        heapq.heappush(self._heap, (ticket.request.priority, ticket.number, ticket))

    def peek(self) -> Ticket | None:
        """The ticket that enters next."""
        while self._heap and self._heap[0][2].cancelled:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Ticket:
        """Remove and return what `peek` shows."""
        ticket = self.peek()
        if ticket is None:
            raise IndexError("pop from an empty queue")
        heapq.heappop(self._heap)
        del self._waiting[ticket.request.request_id]
        return ticket

    def cancel(self, request_id: int) -> Ticket | None:
        """Take a ticket out, wherever it stands; None if it does not wait here."""
        ticket = self._waiting.pop(request_id, None)
        if ticket is None:
            return None
        ticket.cancelled = True
        if len(self._heap) > 2 * len(self._waiting) + 16:
            # Cancelled tickets hold whole prompts: do not keep more of them than of living ones.
            self._heap = [entry for entry in self._heap if not entry[2].cancelled]
            heapq.heapify(self._heap)
        return ticket

    def clear(self) -> list[Ticket]:
        """Take out everything, in order."""
        tickets = [ticket for _, _, ticket in sorted(self._heap, key=lambda entry: entry[:2]) if not ticket.cancelled]
        self._heap.clear()
        self._waiting.clear()
        return tickets
