"""Which rows of a step begin with the same pages for so long that reading them together pays, and which long ones are
to be read by several programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tgi_model_server.plan import StepPlan

_LEADERS = 3
"""Rows to compare all others with before it is given up: comparing each with each would take too long."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that share `keys` keys, all of them older than any of the rows' new tokens."""

    rows: list[int]
    keys: int


def tiles_of(plan: StepPlan, group: Group, per_tile: int) -> int:
    """Tiles of at most `per_tile` new tokens that the rows of a group have together."""
    return -(-sum(plan.query_lens[row] for row in group.rows) // per_tile)


def find_sharing(
    plan: StepPlan, page_size: int, *, worth: int, per_tile: int, most_tiles: int | None = None
) -> list[Group]:
    """Groups of rows that save `worth` or more: the shared keys times the tiles of at most `per_tile` new tokens that
    need not go through them. Rows that fill their own tiles save nothing.

    Pages are shared only where all tokens up to their end are the same, so equal page ids mean equal prefixes.
    """
    search = _Search(plan, page_size, -(-worth // page_size), per_tile)
    found: list[Group] = []
    tiles = 0
    beginnings: dict[int, list[int]] = {}
    for row, past in enumerate(search.past):
        if past and plan.query_lens[row]:
            beginnings.setdefault(plan.pages[row][0], []).append(row)
    for rows in beginnings.values():
        leaders = 0
        while len(rows) > 1 and leaders < _LEADERS:
            group = search.best_group(rows)
            if group is None:
                leaders, rows = leaders + 1, rows[1:]
                continue
            tiles += tiles_of(plan, group, per_tile)
            if most_tiles is not None and tiles > most_tiles:
                return found
            found.append(group)
            taken = set(group.rows)
            rows = [row for row in rows if row not in taken]
    return found


def find_lonely(
    plan: StepPlan, page_size: int, groups: Sequence[Group], *, keys: int, fill: int, per_tile: int, most_tiles: int
) -> list[Group]:
    """Groups of one: prompts that begin behind `keys` or more of their own, where a step's have fewer than the `fill`
    tiles that occupy the chip. Keys of groups are split among programs, others are not.

    `groups` were found before; with them no more than `most_tiles` come out.
    """
    past = [(kv_len - new) // page_size * page_size for new, kv_len in zip(plan.query_lens, plan.kv_lens, strict=True)]
    tiles = {
        row: -(-new // per_tile) for row, new in enumerate(plan.query_lens) if new > 1 and past[row] >= max(keys, 1)
    }
    if sum(tiles.values()) >= fill:
        return []
    left = most_tiles
    for group in groups:
        left -= tiles_of(plan, group, per_tile)
        for row in group.rows:
            tiles.pop(row, None)
    found: list[Group] = []
    for row, needed in tiles.items():
        if needed <= left:
            left -= needed
            found.append(Group([row], past[row]))
    return found


class _Search:
    """What is asked of every row again and again."""

    def __init__(self, plan: StepPlan, page_size: int, worth_pages: int, per_tile: int) -> None:
        self._page_size, self._worth, self._per_tile = page_size, worth_pages, per_tile
        self._pages, self._query_lens = plan.pages, plan.query_lens
        rows = list(zip(plan.query_lens, plan.kv_lens, strict=True))
        self.past = [(kv_len - query_len) // page_size for query_len, kv_len in rows]
        """Pages before those of the rows' new tokens."""
        self._alone = [-(-query_len // per_tile) for query_len, _ in rows]
        """Tiles of rows that share nothing."""

    def best_group(self, rows: list[int]) -> Group | None:
        """The rows that are worth most together with the first of `rows`."""
        leader = self._pages[rows[0]]
        rows = self._candidates(rows)
        if not rows:
            return None
        common: list[tuple[int, int]] = []
        parting = limit = self.past[rows[0]]
        for row in rows:
            parting = _common_pages(leader, self._pages[row], min(limit, self.past[row]), parting)
            common.append((parting, row))
        common.sort(reverse=True)
        best = most = tokens = alone = 0
        for last, (pages, row) in enumerate(common):
            tokens += self._query_lens[row]
            alone += self._alone[row]
            saved = (alone - -(-tokens // self._per_tile)) * pages
            # Of equals the most rows: who is left out goes through all the keys alone, and is waited for.
            if saved >= most:
                best, most = last, saved
        if most < self._worth:
            return None
        return Group([row for _, row in common[: best + 1]], common[best][0] * self._page_size)

    def _candidates(self, rows: list[int]) -> list[int]:
        """Those that share so many pages with the first that all of them together could be worth it."""
        first, most = rows[0], 0
        leader = self._pages[first]
        while len(rows) != most:
            most = len(rows)
            # At best one tile is left.
            needed = -(-self._worth // max(1, sum(self._alone[row] for row in rows) - 1))
            if self.past[first] < needed:
                return []
            mark = leader[needed - 1]
            rows = [row for row in rows if self.past[row] >= needed and self._pages[row][needed - 1] == mark]
        return rows if most > 1 else []


def _common_pages(one: Sequence[int], other: Sequence[int], limit: int, guess: int) -> int:
    """How many of the first `limit` pages are the same, perhaps `guess`. Once two lists part they never meet again."""
    if limit and one[limit - 1] == other[limit - 1]:
        return limit
    if 0 < guess < limit and one[guess - 1] == other[guess - 1] and one[guess] != other[guess]:
        return guess
    low, high = 0, max(limit - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
