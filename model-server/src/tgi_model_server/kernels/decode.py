"""Attention of rows with one new token over their pages, each row's keys split among several programs.

Flash-decoding (Dao et al. 2023): every split computes the attention over its keys and the logarithm of its sum; a
second kernel puts the splits together. All query heads of a KV head are rows of one tile, so keys are read once.

Where rows begin with the same pages, one more kernel reads these once for many of them (Hydragen, Juravsky et al.
2024); its results are splits like the others, and each row's own programs begin behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tgi_model_server.kernels.launch import LOG2E, SMALLEST_DOT, Tuning, interpreted, power_of_two, shrink
from tgi_model_server.kernels.prefill import attend_tiles

_FEWEST_SPLITS = 8
"""That a reduction has room for."""


@triton.jit(do_not_specialize=["splits", "together"])
def decode_kernel(
    q,
    k_pool,
    v_pool,
    out,
    part_out,
    part_lse,
    page_table,
    kv_lens,
    query_starts,
    shared_lens,
    q_token,
    q_head,
    pool_page,
    pool_slot,
    pool_head,
    table_row,
    splits,
    together,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    MANY: tl.constexpr,
    SHARED: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid [rows, kv_heads, splits - together], whatever the lengths: programs without keys return at once.

    q [T, heads, HEAD_DIM], a view; pools of strides (pool_page, pool_slot, pool_head, 1); page_table int32
    [rows, table_row]; kv_lens int32 [rows], 0 for rows that are not decoded; query_starts int32 [rows]: the row's
    token. `scale` is in units of log2. A split has at least LEAST tiles of BLOCK_N keys. WINDOW 0 means none. If not
    MANY, there is one split and `out` [T, heads, HEAD_DIM] gets the result. With MANY part_out float32
    [rows, heads, splits, HEAD_DIM] gets each split's and part_lse float32 [rows, heads, splits] the log2 of its sum,
    -inf where it had no keys. With SHARED the first `together` splits are `shared_kernel`'s, which reads the first
    `shared_lens` (int32 [rows]) keys; without it there are none.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    kv_len = tl.load(kv_lens + row)
    member = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + member
    real = member < GROUP

    lowest = 0
    if WINDOW:
        lowest = tl.maximum(kv_len - WINDOW, 0) // BLOCK_N * BLOCK_N
    if SHARED:
        lowest = tl.load(shared_lens + row)
    own = splits - together
    tiles = (kv_len - lowest + BLOCK_N - 1) // BLOCK_N
    share = tl.maximum((tiles + own - 1) // own, LEAST) * BLOCK_N
    begin = lowest + split * share
    end = tl.minimum(begin + share, kv_len)
    part = (row.to(tl.int64) * heads + head) * splits + together + split
    if begin >= kv_len:
        if MANY:
            tl.store(part_lse + part, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=real)
        return

    token = tl.load(query_starts + row).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < HEAD_DIM
    query = tl.load(
        q + token * q_token + head[:, None] * q_head + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
    )
    if WIDEN:
        query = query.to(tl.float32)
    pages = page_table + row.to(tl.int64) * table_row
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        key_at = start + tl.arange(0, BLOCK_N)
        known = key_at < end
        page = tl.load(pages + key_at // PAGE, mask=known, other=0).to(tl.int64)
        place = page * pool_page + key_at % PAGE * pool_slot + kv_head * pool_head
        # What lies behind the row's end may be anything, even NaN, which a weight of 0 would not remove.
        taken = known[:, None] & inside[None, :]
        key = tl.load(k_pool + place[:, None] + column[None, :], mask=taken, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = known
        if WINDOW:
            seen = known & (key_at >= kv_len - WINDOW)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # The first tile of a window always holds a key that is seen, so this is finite.
        weights = tl.exp2(scores - new_largest[:, None])
        fade = tl.exp2(largest - new_largest)
        total = total * fade + tl.sum(weights, axis=1)
        value = tl.load(v_pool + place[:, None] + column[None, :], mask=taken, other=0.0).to(query.dtype)
        sums = sums * fade[:, None] + tl.dot(weights.to(query.dtype), value, input_precision="ieee")
        largest = new_largest

    mixed = sums / total[:, None]
    if MANY:
        tl.store(part_lse + part, largest + tl.log2(total), mask=real)
        into = part_out + part[:, None] * HEAD_DIM + column[None, :]
        tl.store(into, mixed, mask=real[:, None] & inside[None, :])
    else:
        into = out + (token * heads + head[:, None]) * HEAD_DIM + column[None, :]
        tl.store(into, mixed.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["splits", "together"])
def shared_kernel(
    q,
    k_pool,
    v_pool,
    part_out,
    part_lse,
    page_table,
    shared_tiles,
    query_starts,
    q_token,
    q_head,
    pool_page,
    pool_slot,
    pool_head,
    table_row,
    heads,
    splits,
    together,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid [tiles, kv_heads, together]. shared_tiles int32 [tiles, 3]: a first row, how many rows from there on, at
    most BLOCK_M // GROUP, and how many keys they share; no rows means no work.

    The keys are found through the first row's pages. Writes the first `together` splits as `decode_kernel` has them.
    """
    tile = shared_tiles + 3 * tl.program_id(0)
    count = tl.load(tile + 1)
    if count == 0:
        return
    first = tl.load(tile)
    length = tl.load(tile + 2)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    member = tl.arange(0, BLOCK_M)
    real = member // GROUP < count
    row = (first + member // GROUP).to(tl.int64)
    head = kv_head * GROUP + member % GROUP
    part = (row * heads + head) * splits + split
    tiles = (length + BLOCK_N - 1) // BLOCK_N
    share = (tiles + together - 1) // together * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, length)
    if begin >= length:
        tl.store(part_lse + part, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=real)
        return

    token = tl.load(query_starts + row, mask=real, other=0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < HEAD_DIM
    query = tl.load(
        q + (token * q_token + head * q_head)[:, None] + column[None, :],
        mask=real[:, None] & inside[None, :],
        other=0.0,
    )
    if WIDEN:
        query = query.to(tl.float32)
    pages = page_table + first.to(tl.int64) * table_row
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Every query sees all of the split's keys.
    position = tl.zeros((BLOCK_M,), tl.int32) + (end - 1)
    head_offset = kv_head * pool_head
    middle = end // BLOCK_N * BLOCK_N
    largest, total, sums = attend_tiles(
        query,
        k_pool,
        v_pool,
        pages,
        position,
        largest,
        total,
        sums,
        begin,
        middle,
        head_offset,
        pool_page,
        pool_slot,
        scale,
        HEAD_DIM,
        PAGE,
        0,
        BLOCK_N,
        BLOCK_D,
        False,
    )
    largest, total, sums = attend_tiles(
        query,
        k_pool,
        v_pool,
        pages,
        position,
        largest,
        total,
        sums,
        middle,
        end,
        head_offset,
        pool_page,
        pool_slot,
        scale,
        HEAD_DIM,
        PAGE,
        0,
        BLOCK_N,
        BLOCK_D,
        True,
    )
    tl.store(part_lse + part, largest + tl.log2(total), mask=real)
    into = part_out + part[:, None] * HEAD_DIM + column[None, :]
    tl.store(into, sums / total[:, None], mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["splits", "together"])
def reduce_splits_kernel(
    part_out,
    part_lse,
    out,
    kv_lens,
    query_starts,
    shared_lens,
    splits,
    together,
    HEAD_DIM: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid [rows, heads]: `decode_kernel`'s splits, weighted by their sums, to out [T, heads, HEAD_DIM]."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    if tl.load(kv_lens + row) == 0:
        return
    split = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_D)
    part = (row.to(tl.int64) * heads + head) * splits
    written = split < splits
    if SHARED:
        # Rows that share nothing have only splits of their own.
        written = written & ((split >= together) | (tl.load(shared_lens + row) > 0))
    lse = tl.load(part_lse + part + split, mask=written, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    # Splits without keys have written no result.
    real = (weights > 0.0)[:, None] & (column < HEAD_DIM)[None, :]
    mixed = tl.load(part_out + (part + split)[:, None] * HEAD_DIM + column[None, :], mask=real, other=0.0)
    result = tl.sum(mixed * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    token = tl.load(query_starts + row).to(tl.int64)
    into = out + (token * heads + head) * HEAD_DIM + column
    tl.store(into, result.to(out.dtype.element_ty), mask=column < HEAD_DIM)


def choose_splits(rows: int, kv_heads: int, longest: int, cores: int, tuning: Tuning) -> int:
    """A power of two: enough programs to fill `cores` twice, but no split below `tuning.split_keys` of `longest`."""
    wanted = triton.cdiv(2 * cores, max(1, rows * kv_heads))
    useful = triton.cdiv(longest, tuning.split_keys)
    return power_of_two(max(1, min(wanted, useful, tuning.max_splits)))


def shared_rows(group: int, head_dim: int, dtype: torch.dtype, tuning: Tuning) -> int:
    """Rows that `shared_kernel` reads the same keys for in one tile."""
    return _shared_tile(group, head_dim, dtype, tuning) // group


def _shared_tile(group: int, head_dim: int, dtype: torch.dtype, tuning: Tuning) -> int:
    return max(tuning.shared_queries // shrink(head_dim, dtype), power_of_two(group), SMALLEST_DOT)


@dataclass(frozen=True, slots=True)
class SharedKeys:
    """Which rows of a step read which keys together."""

    tiles: torch.Tensor
    """int32 [tiles, 3], as `shared_kernel` has it."""
    lens: torch.Tensor
    """int32 [rows]: keys of each row that are read together with others'."""
    splits: int


def decode(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    out: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    splits: int,
    tuning: Tuning,
    shared: SharedKeys | None = None,
) -> None:
    """Fill `out` [T, heads, head_dim], contiguous, at the tokens of rows whose `kv_lens` is not 0.

    q [T, heads, head_dim], a view; NHD-shaped pools, which may be views; tables as `decode_kernel` has them. Without a
    window rows may read `shared` keys together.
    """
    assert q.stride(-1) == k_pool.stride(-1) == 1
    assert k_pool.stride() == v_pool.stride()
    assert out.is_contiguous()
    assert shared is None or not window
    rows, heads, head_dim = kv_lens.shape[0], q.shape[1], q.shape[2]
    kv_heads = k_pool.shape[2]
    group = heads // kv_heads
    block_d = power_of_two(head_dim)
    keys = max(SMALLEST_DOT, tuning.decode_keys // shrink(head_dim, q.dtype))
    together = 0 if shared is None else shared.splits
    every = splits + together
    part_out = part_lse = None
    if every > 1:
        part_out = torch.empty((rows, heads, every, head_dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((rows, heads, every), dtype=torch.float32, device=q.device)
    strides = (q.stride(0), q.stride(1), k_pool.stride(0), k_pool.stride(1), k_pool.stride(2), page_table.stride(0))
    if shared is not None:
        shared_kernel[(shared.tiles.shape[0], kv_heads, together)](
            q,
            k_pool,
            v_pool,
            part_out,
            part_lse,
            page_table,
            shared.tiles,
            query_starts,
            *strides,
            heads,
            every,
            together,
            scale * LOG2E,
            GROUP=group,
            HEAD_DIM=head_dim,
            PAGE=k_pool.shape[1],
            BLOCK_M=_shared_tile(group, head_dim, q.dtype, tuning),
            BLOCK_N=keys,
            BLOCK_D=max(SMALLEST_DOT, block_d),
            WIDEN=interpreted(),
            num_warps=tuning.decode_warps,
            num_stages=tuning.decode_stages,
        )
    decode_kernel[(rows, kv_heads, splits)](
        q,
        k_pool,
        v_pool,
        out,
        part_out,
        part_lse,
        page_table,
        kv_lens,
        query_starts,
        None if shared is None else shared.lens,
        *strides,
        every,
        together,
        scale * LOG2E,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE=k_pool.shape[1],
        WINDOW=window or 0,
        MANY=every > 1,
        SHARED=shared is not None,
        LEAST=max(1, tuning.split_keys // keys),
        BLOCK_M=max(SMALLEST_DOT, power_of_two(group)),
        BLOCK_N=keys,
        BLOCK_D=max(SMALLEST_DOT, block_d),
        WIDEN=interpreted(),
        num_warps=tuning.decode_warps,
        num_stages=tuning.decode_stages,
    )
    if every > 1:
        # Few different sizes: each is compiled.
        block_s = max(_FEWEST_SPLITS, power_of_two(every)) if every <= tuning.max_splits else 2 * tuning.max_splits
        reduce_splits_kernel[(rows, heads)](
            part_out,
            part_lse,
            out,
            kv_lens,
            query_starts,
            None if shared is None else shared.lens,
            every,
            together,
            HEAD_DIM=head_dim,
            SHARED=shared is not None,
            BLOCK_S=block_s,
            BLOCK_D=block_d,
            num_warps=1 if block_d * block_s <= 1024 else 4,
        )
