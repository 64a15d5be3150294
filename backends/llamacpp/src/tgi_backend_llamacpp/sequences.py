"""Pages of the batcher, as sequences of llama.cpp.

llama.cpp keeps keys and values by (sequence, position), not by page. A page that a request fills is a run of positions
in that request's sequence, its *home*. Another request takes a cached prefix over by copying those runs into its own
sequence, which moves nothing: the cells get a second owner. When a request ends, its sequence stays as the home of the
pages that the prefix cache keeps, unless a running one has them too; whoever takes them over later is their home from
then on. A page that is given to somebody else leaves its old home first. So there are never more cells in use than
pages, and llama.cpp always finds room.

There are at most 256 sequences. One is kept for every free slot: where they run out, cached prefixes are evicted until
another home is empty. There are enough of those, because what a running request uses lives with running requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from tgi_model_server.kv.pages import PageAllocator
from tgi_model_server.kv.prefix import PrefixCache

_EVICT_AT_ONCE = 16


class Cells(Protocol):
    """The part of `native.Context` that moves sequences about."""

    def copy(self, source: int, target: int, begin: int, end: int) -> None: ...

    def remove(self, sequence: int, begin: int = -1, end: int = -1) -> None: ...

    def clear(self) -> None: ...


@dataclass(slots=True)
class _Bound:
    """A slot's sequence, and the pages that it has there."""

    sequence: int
    source: Sequence[int] | None = None
    """The batcher's list, which it replaces when a page becomes another one."""
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Home:
    sequence: int
    index: int
    """The page holds positions ``index * page_size ..``."""


class SequenceMap:
    """Which sequence each slot has, and where each page lives. Belongs to the step loop's thread."""

    def __init__(self, cells: Cells, page_size: int, max_sequences: int, sequence_ids: int) -> None:
        assert sequence_ids >= max_sequences
        self._cells = cells
        self._page_size = page_size
        self._max_sequences = max_sequences
        self._sequence_ids = sequence_ids
        self._allocator: PageAllocator | None = None
        self._prefix: PrefixCache | None = None
        self._reset()

    def attach(self, allocator: PageAllocator, prefix: PrefixCache | None) -> None:
        """Begin anew, with the accounts of this batcher."""
        self._allocator, self._prefix = allocator, prefix
        self._reset()
        self._cells.clear()

    def sequence_of(self, slot: int) -> int:
        return self._bound[slot].sequence

    def prepare(self, slots: Sequence[int], starts: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        """Before a step that computes the positions from ``starts[row]`` to the end of ``pages[row]`` for each row."""
        rows = sorted(zip(slots, starts, pages, strict=True), key=lambda row: row[0] not in self._bound)
        for slot, start, row_pages in rows:  # newcomers last: what the others take over may leave a home empty
            bound = self._bound.get(slot)
            if bound is None:
                bound = self._bound[slot] = _Bound(self._take_sequence())
            if bound.source is not row_pages:
                self._take_over(bound, row_pages[: -(-start // self._page_size)], start)
                bound.source = row_pages
        # Only now: the pages that are claimed here may have been somebody's before.
        for slot, row_pages in zip(slots, pages, strict=True):
            bound = self._bound[slot]
            for index in range(len(bound.pages), len(row_pages)):
                self._settle(row_pages[index], _Home(bound.sequence, index))
                bound.pages.append(row_pages[index])

    def release(self, slot: int) -> None:
        """The slot's request has ended; what it computed stays until its pages are given to others."""
        bound = self._bound.pop(slot, None)
        if bound is None:
            return
        for other in self._bound.values():
            for index in range(_common(bound.pages, other.pages)):
                if self._homes[bound.pages[index]].sequence == bound.sequence:
                    self._move(bound.pages[index], _Home(other.sequence, index))
        foreign = [
            index for index, page in enumerate(bound.pages) if self._homes.get(page) != _Home(bound.sequence, index)
        ]
        for begin, end in _runs(foreign):
            self._remove(bound.sequence, begin, end)
        if self._prefix is None:
            self._forget(bound.sequence)
        else:
            self._free_if_empty(bound.sequence)
        self._keep_spare()

    def check(self) -> None:
        """Assert that the accounts agree. For tests."""
        found: dict[int, set[int]] = {sequence: set() for sequence in self._homed}
        for page, home in self._homes.items():
            assert page in self._homed[home.sequence]
            found[home.sequence].add(page)
        assert found == self._homed
        in_use = set(self._homed)
        assert {bound.sequence for bound in self._bound.values()} <= in_use
        assert not in_use & set(self._unused)
        assert len(in_use) + len(self._unused) == self._sequence_ids

    def _reset(self) -> None:
        self._bound: dict[int, _Bound] = {}
        self._homes: dict[int, _Home] = {}
        self._homed: dict[int, set[int]] = {}
        """Sequence in use -> the pages that live there."""
        self._unused = list(range(self._sequence_ids - 1, -1, -1))

    def _take_over(self, bound: _Bound, pages: Sequence[int], start: int) -> None:
        """Let the sequence have what these pages hold up to position `start`, where it has not.

        A newcomer gets its cached prefix so; others meet here when the prefix cache had some of their pages already.
        """
        size = self._page_size
        changed = [index for index, page in enumerate(pages) if index >= len(bound.pages) or bound.pages[index] != page]
        for begin, end in _runs(changed):
            for index, page in enumerate(bound.pages[begin:end], begin):
                if self._homes.get(page) == _Home(bound.sequence, index):
                    del self._homes[page]
                    self._homed[bound.sequence].discard(page)
            if begin < len(bound.pages):
                self._remove(bound.sequence, begin, end)
            for first, last in self._same_home(pages, begin, end):
                before = self._homes[pages[first]].sequence
                self._cells.copy(before, bound.sequence, first * size, min(last * size, start))
                if not self._is_bound(before):
                    self._remove(before, first, last)
                    for index in range(first, last):
                        self._move(pages[index], _Home(bound.sequence, index))
                    self._free_if_empty(before)
        bound.pages[: len(pages)] = pages

    def _same_home(self, pages: Sequence[int], begin: int, end: int) -> Iterator[tuple[int, int]]:
        """``begin .. end - 1`` cut where the home changes."""
        at = begin
        for index in range(begin + 1, end + 1):
            if index == end or self._homes[pages[index]].sequence != self._homes[pages[at]].sequence:
                yield at, index
                at = index

    def _settle(self, page: int, home: _Home) -> None:
        """`page` is about to be filled there."""
        before = self._homes.get(page)
        if before == home:
            return
        if before is not None:
            self._homed[before.sequence].discard(page)
            self._remove(before.sequence, before.index, before.index + 1)
            self._free_if_empty(before.sequence)
        self._homes[page] = home
        self._homed[home.sequence].add(page)

    def _move(self, page: int, home: _Home) -> None:
        self._homed[self._homes[page].sequence].discard(page)
        self._homes[page] = home
        self._homed[home.sequence].add(page)

    def _take_sequence(self) -> int:
        if not self._unused:
            self._keep_spare()
        if not self._unused:
            raise RuntimeError("no sequence of llama.cpp is left")
        sequence = self._unused.pop()
        self._homed[sequence] = set()
        return sequence

    def _keep_spare(self) -> None:
        """See that each free slot could have a sequence: empty homes of pages that are free, or evict prefixes."""
        wanted = self._max_sequences - len(self._bound)
        evicted = 1
        while len(self._unused) < wanted and evicted:
            if self._drop_free_pages():
                continue
            assert self._prefix is not None, "without a prefix cache a sequence ends with its request"
            evicted = self._prefix.evict(_EVICT_AT_ONCE)

    def _drop_free_pages(self) -> bool:
        """Free the sequences that hold nothing but pages which nobody has. Whether there were any."""
        free = self._free_pages()
        empty = [each for each, held in self._homed.items() if held <= free and not self._is_bound(each)]
        for sequence in empty:
            self._forget(sequence)
        return bool(empty)

    def _free_pages(self) -> frozenset[int]:
        assert self._allocator is not None, "attach() comes first"
        return self._allocator.free_set()

    def _is_bound(self, sequence: int) -> bool:
        return any(bound.sequence == sequence for bound in self._bound.values())

    def _forget(self, sequence: int) -> None:
        for page in self._homed[sequence]:
            del self._homes[page]
        self._homed[sequence].clear()
        self._free(sequence)

    def _free_if_empty(self, sequence: int) -> None:
        if not self._homed[sequence] and not self._is_bound(sequence):
            self._free(sequence)

    def _free(self, sequence: int) -> None:
        assert not self._homed[sequence]
        del self._homed[sequence]
        self._cells.remove(sequence)
        self._unused.append(sequence)

    def _remove(self, sequence: int, begin: int, end: int) -> None:
        self._cells.remove(sequence, begin * self._page_size, end * self._page_size)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many items both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as half-open ranges."""
    if not indices:
        return []
    cuts = [0, *(at for at, (one, other) in enumerate(pairwise(indices), 1) if other != one + 1), len(indices)]
    return [(indices[begin], indices[end - 1] + 1) for begin, end in pairwise(cuts)]
