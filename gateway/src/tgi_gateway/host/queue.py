"""The line in front of the engine: by priority, then fairly between tenants, then first come, first served.

Fair are virtual token counters (VTC; Sheng et al. 2024, "Fairness in Serving Large Language Models"): the prompt and
output tokens that each tenant was served are counted, and the tenant with the lowest count is next. One who comes back
after a pause starts at the lowest count of those who wait, so that nobody saves up.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from tgi_gateway.types import Request

OUTPUT_WEIGHT = 2.0
"""An output token costs as much as so many prompt tokens (VTC, section 5)."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way through the host. Times are time.perf_counter() seconds."""

    request: Request
    number: int
    """Order of arrival."""
    arrived_at: float
    entered_at: float = 0.0
    """When it left the queue for the engine."""
    first_token_at: float = 0.0
    submitted: bool = False
    """The engine's `submit` has returned; before that a cancel would not be understood."""
    cancelled: bool = False
    generated_tokens: int = 0
    blocked_at: float | None = None
    """Since when, being first in line, it finds no room; later ones may pass it for a while."""
    passed_by_tokens: int = 0
    """KV tokens of those that did."""

    @property
    def waited_s(self) -> float:
        return self.entered_at - self.arrived_at


Line = dict[int, Ticket]
"""Waiting tickets of one tenant and priority by request id, in order of arrival."""


@dataclass(slots=True)
class Queue:
    """Waiting tickets. `peek` costs O(tenants that wait), everything else O(1)."""

    _lines: dict[int, dict[str, Line]] = field(default_factory=dict)
    """Priority -> tenant -> its line; none is empty."""
    _waiting: dict[int, Ticket] = field(default_factory=dict)
    _served: dict[str, float] = field(default_factory=dict)
    """Tenant -> tokens, output tokens counting `OUTPUT_WEIGHT`."""
    prompt_tokens: int = 0
    """Of all waiting tickets."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._waiting

    def add(self, ticket: Ticket) -> None:
        request = ticket.request
        assert request.request_id not in self._waiting
        self._lift(request.tenant)
        self._waiting[request.request_id] = ticket
        line = self._lines.setdefault(request.priority, {}).setdefault(request.tenant, {})
        line[request.request_id] = ticket
        self.prompt_tokens += len(request.input_ids)

    def peek(self, passed: Container[int] = ()) -> Ticket | None:
        """The ticket that enters next; `passed` are request ids that it must not be."""
        for _, lines in sorted(self._lines.items()):
            firsts = [
                next((ticket for request_id, ticket in line.items() if request_id not in passed), None)
                for line in lines.values()
            ]
            found = [ticket for ticket in firsts if ticket is not None]
            if found:
                return min(found, key=lambda ticket: (self._served[ticket.request.tenant], ticket.number))
        return None

    def take(self, ticket: Ticket) -> None:
        """Remove `ticket`, which enters the engine."""
        self._remove(ticket)
        self.charge(ticket.request.tenant, len(ticket.request.input_ids))

    def charge(self, tenant: str, tokens: float) -> None:
        """The tenant was served so many tokens."""
        self._served[tenant] = self._served.get(tenant, 0.0) + tokens

    def cancel(self, request_id: int) -> Ticket | None:
        """Take a ticket out, wherever it stands; None if it does not wait here."""
        ticket = self._waiting.get(request_id)
        if ticket is not None:
            ticket.cancelled = True
            self._remove(ticket)
        return ticket

    def clear(self) -> list[Ticket]:
        """Take out everything, by priority and arrival."""
        tickets = sorted(self._waiting.values(), key=lambda ticket: (ticket.request.priority, ticket.number))
        self._lines.clear()
        self._waiting.clear()
        self.prompt_tokens = 0
        return tickets

    def _lift(self, name: str) -> None:
        waiting = {tenant for lines in self._lines.values() for tenant in lines}
        if name in waiting:
            return
        others = [self._served[tenant] for tenant in waiting] or list(self._served.values())
        self._served[name] = max(self._served.get(name, 0.0), min(others, default=0.0))

    def _remove(self, ticket: Ticket) -> None:
        request = ticket.request
        del self._waiting[request.request_id]
        self.prompt_tokens -= len(request.input_ids)
        lines = self._lines[request.priority]
        line = lines[request.tenant]
        del line[request.request_id]
        if not line:
            del lines[request.tenant]
            if not lines:
                del self._lines[request.priority]
