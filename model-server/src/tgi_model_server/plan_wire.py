"""StepPlans on their way to the other ranks: of every row only the pages that its slot has not been told yet.

A row's list of pages is the sequence's own, which only ever grows at its end; whatever else happens to a sequence gives
it another list. So the same list in the same slot means that its beginning is known, and any other one is sent whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from tgi_model_server.plan import StepPlan


@dataclass(frozen=True, slots=True)
class _Message:
    plan: StepPlan
    """With the new pages alone."""
    known: list[int]
    """Per row: how many pages come before them."""


class PlanEncoder:
    """Rank 0's side. What it encodes must all be decoded, in order."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[Sequence[int], int]] = {}
        """Slot -> list of pages, which is kept only to recognize it, and how many of it were sent."""

    def encode(self, plan: StepPlan) -> bytes:
        new: list[Sequence[int]] = []
        known: list[int] = []
        sent = self._sent
        for slot, pages in zip(plan.slots, plan.pages, strict=True):
            before, count = sent.get(slot, ((), 0))
            if before is not pages:
                count = 0
            assert count <= len(pages), "a list of pages only grows"
            known.append(count)
            new.append(pages[count:] if count else pages)
            sent[slot] = (pages, len(pages))
        return msgspec.msgpack.encode(_Message(replace(plan, pages=new), known))


class PlanDecoder:
    """Another rank's side."""

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}
        self._decoder = msgspec.msgpack.Decoder(_Message)

    def decode(self, body: bytes) -> StepPlan:
        """The plan with whole page lists, which change with the next one."""
        message = self._decoder.decode(body)
        plan, tables = message.plan, self._tables
        for row, (slot, known, new) in enumerate(zip(plan.slots, message.known, plan.pages, strict=True)):
            if known:
                table = tables[slot]
                assert len(table) == known, "plans come in order"
                table += new
            else:
                table = tables[slot] = list(new)
            plan.pages[row] = table
        return plan
