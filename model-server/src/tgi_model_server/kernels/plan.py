"""TritonAttentionPlan: what the attention kernels of every layer read of a step, one int32 tensor moved once.

`triton_plan` makes one of a step's own size. `FixedPlan` keeps the buffers of one bucket, which a captured graph
remembers, and fills them in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import triton

from tgi_model_server.device import AttentionShape, Bucket, KVLayout
from tgi_model_server.kernels.decode import choose_splits
from tgi_model_server.kernels.launch import Tuning
from tgi_model_server.kernels.shared import SharedKeys, choose_shared_splits
from tgi_model_server.kernels.sharing import Group, find_lonely, find_sharing, tiles_of
from tgi_model_server.kernels.tiles import decode_tokens, prefill_tokens
from tgi_model_server.plan import StepPlan

_ALIGNED = 16
"""Kernels are compiled anew for sizes that are not multiples of this, so tables have none."""

_SPARE_TILES = 4
"""Of keys that rows share, in buffers of fixed size: each group of rows may leave its last tile unfilled."""

_ANY_TILES = 1 << 30

_LAST_SPLITS = 8
"""Programs that share a row of which the last token alone is wanted: once a step, where rows may be many or few."""

Ints: TypeAlias = npt.NDArray[np.int32]
_NO_PAGES: Ints = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class TritonAttentionPlan:
    """Tables of one step, int32 views into one buffer on the device. Implements `step.AttentionPlan`."""

    layout: KVLayout
    cache_slots: torch.Tensor
    """[T]: ``page * page_size + offset`` of each new token."""
    page_table: torch.Tensor
    """[rows, at least the pages of the longest row]; behind a row's last page it may hold anything."""
    kv_lens: torch.Tensor
    """[rows]"""
    decode_lens: torch.Tensor
    """[decode rows]: `kv_lens` of the first rows of the tables, 0 for those with more than one new token."""
    query_lens: torch.Tensor
    """[rows]"""
    query_starts: torch.Tensor
    """[rows]: the row's first new token. The tables' rows need not have the step's order."""
    last_tokens: torch.Tensor
    """[rows]: the row's last new token."""
    tiles: torch.Tensor
    """[tiles, 2]: row and first new token of each prefill tile; row -1 is no work."""
    decode_splits: int
    shared: SharedKeys | None = None
    """None: no rows of this step read keys together."""

    def of_last_tokens(self) -> TritonAttentionPlan:
        """For attention of each row's last new token alone. Where rows read keys together it is all of them, still."""
        if not self.tiles.shape[0] or self.shared is not None:
            return self
        return TritonAttentionPlan(
            layout=self.layout,
            cache_slots=self.cache_slots,
            page_table=self.page_table,
            kv_lens=self.kv_lens,
            decode_lens=self.kv_lens,
            query_lens=self.query_lens,
            query_starts=self.last_tokens,
            last_tokens=self.last_tokens,
            tiles=self.tiles[:0],
            decode_splits=_LAST_SPLITS,
        )


@dataclass(frozen=True, slots=True)
class _Sizes:
    tokens: int
    rows: int
    table_pages: int
    decode_rows: int
    tiles: int
    shared_tiles: int
    per_shared: int
    """Tokens of a tile of those."""

    def lengths(self) -> tuple[int, ...]:
        """Of the buffer's parts: slots, KV lengths, decode lengths, query lengths, query starts, last tokens, tiles; of
        `SharedKeys` lengths, starts, tokens, tiles and splits; page table.
        """
        rows, shared = self.rows, self.shared_tiles
        own = (self.tokens, rows, self.decode_rows, rows, rows, rows, 2 * self.tiles)
        return (*own, rows, rows, shared * self.per_shared, 2 * shared, 1, rows * self.table_pages)

    def starts(self) -> list[int]:
        """Where the parts begin, aligned, and where the last one, the page table, ends."""
        out = [0]
        for length in self.lengths():
            out.append(-(-(out[-1] + length) // _ALIGNED) * _ALIGNED)
        return out


def triton_plan(
    plan: StepPlan,
    shape: AttentionShape,
    layout: KVLayout,
    *,
    device: torch.device,
    cores: int,
    tuning: Tuning,
    pages: Sequence[Ints] | None = None,
    per_tile: int | None = None,
) -> TritonAttentionPlan:
    """A plan of exactly this step, its decode rows first. `cores` are the chip's processors that run programs.

    `pages`: the plan's as `PageLists` gives them, where the caller keeps one.
    `per_tile`: tokens of a tile, of one head, of who computes the prompts, if it is not `prefill`; rows that fill it
    share nothing.
    """
    per_shared = (decode_tokens if plan.is_decode else prefill_tokens)(shape, tuning)
    fill = cores // (shape.num_kv_heads if per_tile is None else shape.num_heads)
    groups = _find_groups(plan, layout.page_size, tuning, per_tile or per_shared, fill)
    order = sorted(range(len(plan.slots)), key=lambda row: plan.query_lens[row] > 1)
    decode_rows = sum(query_len == 1 for query_len in plan.query_lens)
    tiles = _list_tiles(plan, order, prefill_tokens(shape, tuning))
    longest = max(plan.kv_lens, default=1)
    shared_tiles = sum(tiles_of(plan, group, per_shared) for group in groups)
    sizes = _Sizes(
        tokens=plan.num_tokens,
        rows=len(order),
        table_pages=aligned(-(-longest // layout.page_size)),
        decode_rows=decode_rows,
        tiles=len(tiles),
        shared_tiles=shared_tiles,
        per_shared=per_shared,
    )
    at_once = _programs_at_once(cores, only_decode=plan.is_decode)
    shared_splits = _choose_shared_splits(groups, shared_tiles, shape, at_once, tuning.max_splits, tuning)
    buffer, place = _host_buffer(sizes, device), sizes.starts()
    pages = pages or PageLists().arrays(plan.pages)
    _fill(buffer.numpy(), sizes, plan, pages, order, tiles, groups, shared_splits, layout.page_size)
    moved = buffer.to(device, non_blocking=True)
    splits = choose_splits(decode_rows, shape.num_kv_heads, longest, cores, tuning)
    return _views(moved, place, sizes, layout, splits, shared_tiles * shared_splits, shared_splits, groups)


class PageLists:
    """Sequences' page ids as arrays, int32: lists of thousands, which only grow, are not converted in every step."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Sequence[int], Ints, int]] = {}
        """By id: the list, which keeps its id while it is here, and its array, of which so many are filled in."""

    def arrays(self, lists: Sequence[Sequence[int]]) -> list[Ints]:
        """Each at least as long as its list. Lists of the last call are remembered."""
        known: dict[int, tuple[Sequence[int], Ints, int]] = {}
        for each in lists:
            _, array, count = self._known.get(id(each), (each, _NO_PAGES, 0))
            size = len(each)
            if size > len(array):
                grown = np.empty(size + size // 8 + _ALIGNED, np.int32)
                grown[:count] = array[:count]
                array = grown
            if size != count:
                array[min(count, size) : size] = each[min(count, size) :]
            known[id(each)] = each, array, size
        self._known = known
        return [known[id(each)][1] for each in lists]


class FixedPlan:
    """The buffers of one bucket, always of the same addresses and shapes; `update` changes what is in them.

    Whether rows read keys together changes which kernels run: `alone` and `together` are two plans over one buffer.
    """

    def __init__(
        self,
        bucket: Bucket,
        max_kv_len: int,
        shape: AttentionShape,
        layout: KVLayout,
        *,
        device: torch.device,
        cores: int,
        tuning: Tuning,
        pages: PageLists | None = None,
        share: bool = True,
    ) -> None:
        """A bucket of as many tokens as rows is for decoding only: it has no prefill tiles. Without `share` no rows
        read keys together. Plans of several buckets may have the same `pages`.
        """
        self._layout = layout
        self._pages = pages or PageLists()
        self._shape, self._tuning = shape, tuning
        only_decode = bucket.num_tokens == bucket.num_rows
        self._at_once = _programs_at_once(cores, only_decode=only_decode)
        per_shared = (decode_tokens if only_decode else prefill_tokens)(shape, tuning)
        self._per_tile = prefill_tokens(shape, tuning)
        self._sizes = _Sizes(
            tokens=bucket.num_tokens,
            rows=bucket.num_rows,
            table_pages=aligned(-(-max_kv_len // layout.page_size)),
            decode_rows=bucket.num_rows,
            tiles=0 if only_decode else bucket.num_tokens // self._per_tile + bucket.num_rows,
            shared_tiles=triton.cdiv(bucket.num_tokens, per_shared) + _SPARE_TILES if share else 0,
            per_shared=per_shared,
        )
        place = self._sizes.starts()
        self._device = device
        self._buffer = torch.zeros(place[-1], dtype=torch.int32, device=device)
        splits = choose_splits(bucket.num_rows, shape.num_kv_heads, max_kv_len, cores, tuning)
        self.alone = _views(self._buffer, place, self._sizes, layout, splits)
        self._programs = max(self._sizes.shared_tiles, self._at_once // shape.num_kv_heads) if share else 0
        self.together = _views(self._buffer, place, self._sizes, layout, splits, self._programs, tuning.max_splits)

    def update(self, plan: StepPlan) -> TritonAttentionPlan:
        """Take over `plan`, padded to the bucket; in the order of the current stream, without waiting for it. Returns
        the one of the two plans that it needs.

        Raises ValueError for a plan that is not of the bucket's size or too long for it.
        """
        sizes = self._sizes
        if (plan.num_tokens, len(plan.slots)) != (sizes.tokens, sizes.rows):
            raise ValueError(
                f"the step has {plan.num_tokens} tokens in {len(plan.slots)} rows; "
                f"the buffers are for {sizes.tokens} in {sizes.rows}. Pad it to the bucket."
            )
        allowed = sizes.table_pages * self._layout.page_size
        if max(plan.kv_lens) > allowed:
            raise ValueError(f"a row has {max(plan.kv_lens)} tokens; the buffers hold {allowed}.")
        groups: list[Group] = []
        if sizes.shared_tiles:
            fill = self._at_once // self._shape.num_kv_heads
            size, tuning = self._layout.page_size, self._tuning
            groups = _find_groups(plan, size, tuning, sizes.per_shared, fill, sizes.shared_tiles)
        shared_tiles = sum(tiles_of(plan, group, sizes.per_shared) for group in groups)
        most = self._programs // max(1, shared_tiles)
        splits = _choose_shared_splits(groups, shared_tiles, self._shape, self._at_once, most, self._tuning)
        order = range(sizes.rows)
        tiles = _list_tiles(plan, order, self._per_tile)
        assert len(tiles) <= sizes.tiles, "rows of one token have no tile, and others fill all but their last one"
        # Of the page table, which has room for the longest row that is allowed, only the columns in use travel.
        used = replace(sizes, table_pages=aligned(-(-max(plan.kv_lens) // self._layout.page_size)))
        # Pinned memory comes from a cache that hands a piece out again only when the copies from it are done.
        staged = _host_buffer(used, self._device)
        arrays = self._pages.arrays(plan.pages)
        _fill(staged.numpy(), used, plan, arrays, order, tiles, groups, splits, self._layout.page_size)
        head = used.starts()[-2]
        self._buffer[:head].copy_(staged[:head], non_blocking=True)
        columns = staged[head:].to(self._device, non_blocking=True)[: used.rows * used.table_pages]
        self.alone.page_table[:, : used.table_pages].copy_(columns.view(used.rows, used.table_pages))
        return self.together if groups else self.alone


def _find_groups(
    plan: StepPlan, page_size: int, tuning: Tuning, per_tile: int, fill: int, most_tiles: int = _ANY_TILES
) -> list[Group]:
    groups = find_sharing(plan, page_size, worth=tuning.shared_keys, per_tile=per_tile, most_tiles=most_tiles)
    if plan.is_decode:
        return groups  # rows of one token have programs enough
    return groups + find_lonely(
        plan, page_size, groups, keys=tuning.lonely_keys, fill=fill, per_tile=per_tile, most_tiles=most_tiles
    )


def _programs_at_once(cores: int, *, only_decode: bool) -> int:
    """Of those that read shared keys: of tiles as large as prompts' there is room for one on each core."""
    return 2 * cores if only_decode else cores


def _choose_shared_splits(
    groups: Sequence[Group], tiles: int, shape: AttentionShape, at_once: int, most: int, tuning: Tuning
) -> int:
    longest = max((group.keys for group in groups), default=0)
    return choose_shared_splits(tiles, shape.num_kv_heads, longest, at_once, most, tuning)


def aligned(size: int) -> int:
    """So many columns has a table that needs `size`."""
    return -(-max(size, 1) // _ALIGNED) * _ALIGNED


def _host_buffer(sizes: _Sizes, device: torch.device) -> torch.Tensor:
    return torch.empty(sizes.starts()[-1], dtype=torch.int32, device="cpu", pin_memory=device.type != "cpu")


def _list_tiles(plan: StepPlan, order: Sequence[int], per_tile: int) -> list[tuple[int, int]]:
    """Place in `order` and first new token; those with the most keys first, so that none is left to run alone."""
    tiles: list[tuple[int, int, int]] = []
    for place, row in enumerate(order):
        query_len, kv_len = plan.query_lens[row], plan.kv_lens[row]
        if query_len > 1:
            tiles.extend((kv_len - query_len + first, place, first) for first in range(0, query_len, per_tile))
    tiles.sort(reverse=True)
    return [(place, first) for _, place, first in tiles]


def _fill(
    buffer: Ints,
    sizes: _Sizes,
    plan: StepPlan,
    pages: Sequence[Ints],
    order: Sequence[int],
    tiles: list[tuple[int, int]],
    groups: Sequence[Group],
    shared_splits: int,
    page_size: int,
) -> None:
    """Write every number that a kernel reads into `buffer`, whose contents may be anything. `pages` are the plan's."""
    starts = sizes.starts()
    slots, kv_lens, decode_lens, query_lens, query_starts, last_tokens, tile_list, *shared, table = (
        buffer[start:end] for start, end in pairwise(starts)
    )
    query_lens[: sizes.rows] = np.fromiter((plan.query_lens[row] for row in order), np.int32, sizes.rows)
    kv_lens[: sizes.rows] = np.fromiter((plan.kv_lens[row] for row in order), np.int32, sizes.rows)
    decode_lens[: sizes.decode_rows] = np.where(query_lens[: sizes.decode_rows] == 1, kv_lens[: sizes.decode_rows], 0)
    first_tokens = np.zeros(len(order) + 1, np.int64)
    np.cumsum(plan.query_lens, out=first_tokens[1:])
    pages_of_row = table[: sizes.rows * sizes.table_pages].reshape(sizes.rows, sizes.table_pages)
    for place, row in enumerate(order):
        kv_len, query_len, token = plan.kv_lens[row], plan.query_lens[row], int(first_tokens[row])
        used = -(-kv_len // page_size)
        pages_of_row[place, :used] = pages[row][:used]
        query_starts[place] = token
        if query_len == 1:
            slots[token] = pages_of_row[place, used - 1] * page_size + (kv_len - 1) % page_size
        else:
            at = np.arange(kv_len - query_len, kv_len)
            slots[token : token + query_len] = pages_of_row[place, at // page_size] * page_size + at % page_size
    last_tokens[: sizes.rows] = np.maximum(query_starts[: sizes.rows] + query_lens[: sizes.rows] - 1, 0)
    _fill_shared(shared, sizes, plan, order, groups, first_tokens)
    shared[-1][:1] = shared_splits
    tile_list[: 2 * sizes.tiles : 2] = -1
    if tiles:
        tile_list[: 2 * len(tiles)] = np.asarray(tiles, np.int32).reshape(-1)


def _fill_shared(
    parts: Sequence[Ints],
    sizes: _Sizes,
    plan: StepPlan,
    order: Sequence[int],
    groups: Sequence[Group],
    first_tokens: npt.NDArray[np.int64],
) -> None:
    """Lengths, starts, tokens and tiles of `SharedKeys`."""
    lens, starts, tokens, tiles, _ = parts
    lens[:] = 0
    tiles[:] = 0
    tile, per_tile = 0, sizes.per_shared
    rows_at = {row: place for place, row in enumerate(order)} if groups else {}
    for group in groups:
        place = tile * per_tile
        for row in group.rows:
            after = place + plan.query_lens[row]
            tokens[place:after] = np.arange(first_tokens[row], first_tokens[row + 1])
            lens[rows_at[row]] = group.keys
            starts[rows_at[row]] = place
            place = after
        last = triton.cdiv(place, per_tile)
        tokens[place : last * per_tile] = tokens[place - 1]
        tiles[2 * tile : 2 * last : 2] = group.keys
        tiles[2 * tile + 1 : 2 * last : 2] = rows_at[group.rows[0]]
        tile = last


def _views(
    buffer: torch.Tensor,
    starts: list[int],
    sizes: _Sizes,
    layout: KVLayout,
    splits: int,
    programs: int = 0,
    most_splits: int = 1,
    groups: Sequence[Group] = (),
) -> TritonAttentionPlan:
    """Without `programs` for it nothing is read together."""
    parts = [buffer[start : start + length] for start, length in zip(starts, sizes.lengths(), strict=False)]
    slots, kv_lens, decode_lens, query_lens, query_starts, last_tokens, tiles, *more, table = parts
    lens, places, tokens, together, split = more
    shared = None
    if programs:
        shared = SharedKeys(tokens, together.view(-1, 2), places, lens, split, programs, most_splits, groups)
    return TritonAttentionPlan(
        layout=layout,
        cache_slots=slots,
        page_table=table.view(sizes.rows, sizes.table_pages),
        kv_lens=kv_lens,
        decode_lens=decode_lens,
        query_lens=query_lens,
        query_starts=query_starts,
        last_tokens=last_tokens,
        tiles=tiles.view(sizes.tiles, 2),
        decode_splits=splits,
        shared=shared,
    )
