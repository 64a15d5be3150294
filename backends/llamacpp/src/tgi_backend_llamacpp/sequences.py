"""Pages of the batcher, as cells of llama.cpp's sequences.

llama.cpp keeps keys and values by (sequence, position), not by page. A slot's sequence has the slot's number, and a
page is a run of positions in it. A page that a running request has is taken over by copying the run into another
sequence, which moves nothing: the cells get a second owner. When the last request that has a cached page ends, the page
is saved out of the KV cache, and loaded again for whoever finds it in the prefix cache. How many may be saved is
bounded: what was not used for longest leaves the prefix cache then.

So only running requests have cells. That matters, because llama.cpp's attention goes over every cell in use, whoever's
it is: a thousand idle ones would make each token of everybody dearer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from tgi_model_server.kv.pages import PageAllocator
from tgi_model_server.kv.prefix import PrefixCache

Saved: TypeAlias = npt.NDArray[np.uint8]
"""Keys and values of a sequence, as llama.cpp writes them."""


class Cells(Protocol):
    """The part of `native.Context` that moves sequences about."""

    def copy(self, source: int, target: int, begin: int, end: int) -> None: ...

    def remove(self, sequence: int, begin: int = -1, end: int = -1) -> None: ...

    def save(self, sequence: int) -> Saved: ...

    def load(self, sequence: int, saved: Saved) -> None: ...

    def clear(self) -> None: ...


@dataclass(slots=True)
class _Bound:
    """The pages that a slot's sequence has."""

    source: Sequence[int] | None = None
    """The batcher's list, which it replaces when a page becomes another one."""
    pages: list[int] = field(default_factory=list)


class SequenceMap:
    """Where each page is. Uses the sequences ``0 .. max_sequences``, the last to save and load by."""

    def __init__(self, cells: Cells, page_size: int, max_sequences: int, max_saved: int | None = None) -> None:
        """`max_saved`: most pages that are saved at a time, but for such as a request is about to load; None: all."""
        self._cells = cells
        self._page_size = page_size
        self._spare = max_sequences
        self._max_saved = max_saved
        self._allocator: PageAllocator | None = None
        self._prefix: PrefixCache | None = None
        self._reset()

    @property
    def saved_pages(self) -> int:
        return len(self._saved)

    def attach(self, allocator: PageAllocator, prefix: PrefixCache | None) -> None:
        """Begin anew, with the accounts of this batcher. No `prefix`: no page is wanted after its request."""
        self._allocator, self._prefix = allocator, prefix
        self._reset()
        self._cells.clear()

    def prepare(self, slots: Sequence[int], starts: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        """Before a step that computes the positions from ``starts[row]`` to the end of ``pages[row]`` for each row."""
        for slot, start, row_pages in zip(slots, starts, pages, strict=True):
            bound = self._bound.setdefault(slot, _Bound())
            if bound.source is not row_pages:
                self._take_over(slot, row_pages[: -(-start // self._page_size)], start)
                bound.source = row_pages
        # Only now: the pages that are claimed here may have been somebody's before.
        for slot, row_pages in zip(slots, pages, strict=True):
            bound = self._bound[slot]
            for page in row_pages[len(bound.pages) :]:
                self._saved.pop(page, None)
                self._live[page] = slot
                bound.pages.append(page)

    def release(self, slot: int) -> None:
        """The slot's request has ended. What the prefix cache keeps of it and nobody else has is saved."""
        bound = self._bound.pop(slot, None)
        if bound is None:
            return
        left: list[tuple[int, int]] = []
        for index, page in enumerate(bound.pages):
            if self._live.get(page) != slot:
                continue
            other = next((each for each, its in self._bound.items() if its.pages[index : index + 1] == [page]), None)
            if other is not None:
                self._live[page] = other
            else:
                del self._live[page]
                left.append((index, page))
        for index, page in self._worth_saving(left):
            self._saved[page] = self._save(slot, index)
        self._cells.remove(slot)

    def _worth_saving(self, left: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of `left`, pages that no sequence has any more, that the prefix cache keeps, after room was made."""
        assert self._allocator is not None, "attach() comes first"
        while True:
            free = self._allocator.free_set()
            for page in free & self._saved.keys():
                del self._saved[page]
            kept = [(index, page) for index, page in left if page not in free and page not in self._saved]
            if self._prefix is None:
                return []
            if self._max_saved is None:
                return kept
            excess = len(self._saved) + len(kept) - self._max_saved
            for page in [page for page in self._saved if page in self._live][: max(excess, 0)]:
                del self._saved[page]  # a sequence has it as well
                excess -= 1
            if excess <= 0 or not self._prefix.evict(excess):
                return kept

    def check(self) -> None:
        """Assert that the accounts agree. For tests."""
        for page, slot in self._live.items():
            assert page in self._bound[slot].pages
        for bound in self._bound.values():
            assert all(page in self._live for page in bound.pages)

    def _reset(self) -> None:
        self._bound: dict[int, _Bound] = {}
        self._live: dict[int, int] = {}
        """Page -> a slot whose sequence has it."""
        self._saved: dict[int, Saved] = {}
        """Page -> its keys and values."""

    def _take_over(self, slot: int, pages: Sequence[int], start: int) -> None:
        """Let the sequence have what these pages hold up to position `start`, where it has not.

        A newcomer gets its cached prefix so; others meet here when the prefix cache had some of their pages already.
        """
        bound, size = self._bound[slot], self._page_size
        changed = [index for index, page in enumerate(pages) if index >= len(bound.pages) or bound.pages[index] != page]
        for begin, end in _runs(changed):
            for page in bound.pages[begin:end]:
                if self._live.get(page) == slot:
                    del self._live[page]
            if begin < len(bound.pages):
                self._cells.remove(slot, begin * size, end * size)
            owners = [self._live.get(page) for page in pages[begin:end]]
            for first, last in _equal(owners):
                owner, at = owners[first], begin + first
                if owner is not None:
                    self._cells.copy(owner, slot, at * size, min((begin + last) * size, start))
                    continue
                for index in range(at, begin + last):
                    self._load(slot, index, pages[index], start)
        bound.pages[: len(pages)] = pages

    def _save(self, slot: int, index: int) -> Saved:
        begin = index * self._page_size
        self._cells.copy(slot, self._spare, begin, begin + self._page_size)
        saved = self._cells.save(self._spare)
        self._cells.remove(self._spare)
        return saved

    def _load(self, slot: int, index: int, page: int, start: int) -> None:
        begin = index * self._page_size
        self._cells.load(self._spare, self._saved[page])
        self._cells.copy(self._spare, slot, begin, min(begin + self._page_size, start))
        self._cells.remove(self._spare)
        self._live[page] = slot


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as half-open ranges."""
    if not indices:
        return []
    cuts = [0, *(at for at, (one, other) in enumerate(pairwise(indices), 1) if other != one + 1), len(indices)]
    return [(indices[begin], indices[end - 1] + 1) for begin, end in pairwise(cuts)]


def _equal(items: Sequence[int | None]) -> list[tuple[int, int]]:
    """Half-open ranges of neighbours that are equal."""
    cuts = [0, *(at for at, (one, other) in enumerate(pairwise(items), 1) if other != one), len(items)]
    return list(pairwise(cuts))
