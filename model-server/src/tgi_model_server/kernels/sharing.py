"""Which decode rows of a step begin with the same pages for so long that reading them together pays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tgi_model_server.plan import StepPlan

_LEADERS = 3
"""Rows to compare all others with before it is given up: comparing each with each would take too long."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Groups of rows. In tables that list rows in `order`, `tiles` says which read what together."""

    rows: list[int] = field(default_factory=list)
    """Of all groups, one after the other."""
    tiles: list[tuple[int, int, int]] = field(default_factory=list)
    """Place of the first row, how many rows, how many keys."""

    def order(self, rows: Iterable[int]) -> list[int]:
        """`rows`, those of the groups first."""
        if not self.rows:
            return list(rows)
        grouped = set(self.rows)
        return self.rows + [row for row in rows if row not in grouped]


def find_sharing(
    plan: StepPlan, page_size: int, *, worth: int, per_tile: int, most_tiles: int | None = None
) -> Sharing:
    """Groups of decode rows that save reading `worth` keys or more, cut into tiles of at most `per_tile` rows.

    Pages are shared only where all tokens up to their end are the same, so equal page ids mean equal prefixes.
    """
    sharing = Sharing()
    beginnings: dict[int, list[int]] = {}
    for row, (query_len, kv_len) in enumerate(zip(plan.query_lens, plan.kv_lens, strict=True)):
        if query_len == 1 and kv_len > page_size:
            beginnings.setdefault(plan.pages[row][0], []).append(row)
    for rows in beginnings.values():
        leaders = 0
        while len(rows) > 1 and leaders < _LEADERS:
            group, length = _best_group(plan, rows, page_size)
            if (len(group) - 1) * length < worth:
                leaders, rows = leaders + 1, rows[1:]
                continue
            needed = -(-len(group) // per_tile)
            if most_tiles is not None and len(sharing.tiles) + needed > most_tiles:
                return sharing
            for at in range(0, len(group), per_tile):
                sharing.tiles.append((len(sharing.rows) + at, min(per_tile, len(group) - at), length))
            sharing.rows.extend(group)
            taken = set(group)
            rows = [row for row in rows if row not in taken]
    return sharing


def _best_group(plan: StepPlan, rows: Sequence[int], page_size: int) -> tuple[list[int], int]:
    """The rows that share most with the first one, it included, and how many keys they share."""
    leader = plan.pages[rows[0]]
    # The last token's key is always a row's own.
    limit = (plan.kv_lens[rows[0]] - 1) // page_size
    common = sorted(
        (
            (_common_pages(leader, plan.pages[row], min(limit, (plan.kv_lens[row] - 1) // page_size)), row)
            for row in rows
        ),
        reverse=True,
    )
    best = max(range(len(common)), key=lambda last: last * common[last][0])
    return [row for _, row in common[: best + 1]], common[best][0] * page_size


def _common_pages(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """How many of the first `limit` pages are the same. Once two lists part they never meet again."""
    if limit and one[limit - 1] == other[limit - 1]:
        return limit
    low, high = 0, max(limit - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
