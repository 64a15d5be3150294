"""Who has which KV page: an allocator over ints.

Every page has exactly one owner: the free list, one sequence, or the prefix cache. Sharing goes through the prefix
cache, which counts its users per tree node, so that taking a cached prefix of a thousand pages costs one increment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

PADDING_PAGE = 0
"""Never given out: padded rows of a static step shape write there."""


class PageAllocator:
    """Pages ``1 .. num_pages - 1``. Taking and giving back cost one list slice, whatever their number."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages is {num_pages}; at least 2 are needed, because page 0 is for padding")
        self.total = num_pages - 1
        # A stack: a page given back is the next one taken, so it is the likeliest to be in a cache of the chip.
        self._free = list(range(num_pages - 1, PADDING_PAGE, -1))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def free_set(self) -> frozenset[int]:
        """The pages that nobody has. O(pages)."""
        return frozenset(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages; the caller has made sure that so many are free."""
        free = self._free
        assert count <= len(free), f"{count} pages wanted, {len(free)} free"
        if count == 1:
            return [free.pop()]
        first = len(free) - count
        taken = free[first:]
        del free[first:]
        return taken

    def give(self, pages: Iterable[int]) -> None:
        """Take back what `take` gave out."""
        self._free.extend(pages)

    def check(self, *owned: Iterable[int]) -> None:
        """Assert that free and `owned` pages are all pages, each once. Costs O(pages): for tests and debugging."""
        seen = Counter(self._free)
        for pages in owned:
            seen.update(pages)
        twice = sorted(page for page, owners in seen.items() if owners > 1)
        assert not twice, f"pages with two owners: {twice}"
        lost = sorted(set(range(1, self.total + 1)) - set(seen))
        assert not lost, f"pages without owner: {lost}"
        foreign = sorted(set(seen) - set(range(1, self.total + 1)))
        assert not foreign, f"pages that are not ours to give: {foreign}"
