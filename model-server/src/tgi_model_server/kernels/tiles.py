"""What the attention kernels have in common: the pass of a tile of queries over paged keys, and the sizes of tiles.

Of the keys that a tile has gone through it keeps, per query, the largest score, the sum of the weights relative to it
and the weighted values (Milakov & Gimelshein 2018). Scores are in units of log2, so that weights are powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tgi_model_server.device import AttentionShape
from tgi_model_server.kernels.launch import SMALLEST_DOT, Tuning, power_of_two, shrink


@triton.jit
def attend_tiles(
    query,
    k_pool,
    v_pool,
    pages,
    position,
    largest,
    total,
    sums,
    begin,
    end,
    head_offset,
    pool_page,
    pool_slot,
    scale,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One pass over the keys begin .. end - 1; MASKED where a query of the tile may not see one of them."""
    column = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        key_at = start + tl.arange(0, BLOCK_N)
        if MASKED:
            known = key_at < end
            page = tl.load(pages + key_at // PAGE, mask=known, other=0).to(tl.int64)
        else:
            page = tl.load(pages + key_at // PAGE).to(tl.int64)
        place = (page * pool_page + key_at % PAGE * pool_slot + head_offset)[:, None] + column[None, :]
        # What lies behind the row's end may be anything, even NaN, which a weight of 0 would not remove.
        if MASKED:
            taken = known[:, None] & (column < HEAD_DIM)[None, :]
            key = tl.load(k_pool + place, mask=taken, other=0.0).to(query.dtype)
        elif HEAD_DIM != BLOCK_D:
            key = tl.load(k_pool + place, mask=(column < HEAD_DIM)[None, :], other=0.0).to(query.dtype)
        else:
            key = tl.load(k_pool + place).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if MASKED:
            seen = key_at[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (key_at[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # With a window a query may see no key of a tile; -inf minus -inf would be NaN.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest) if WINDOW else new_largest
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(largest - base)
        total = total * fade + tl.sum(weights, axis=1)
        if MASKED:
            value = tl.load(v_pool + place, mask=taken, other=0.0).to(query.dtype)
        elif HEAD_DIM != BLOCK_D:
            value = tl.load(v_pool + place, mask=(column < HEAD_DIM)[None, :], other=0.0).to(query.dtype)
        else:
            value = tl.load(v_pool + place).to(query.dtype)
        sums = tl.dot(weights.to(query.dtype), value, sums * fade[:, None], input_precision="ieee")
        largest = new_largest
    return largest, total, sums


@triton.jit
def attend_range(
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
    end,
    head_offset,
    pool_page,
    pool_slot,
    scale,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The keys begin .. middle - 1, whole tiles that all queries see, if there is no WINDOW; then middle .. end - 1."""
    if not WINDOW:
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
    return attend_tiles(
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
        WINDOW,
        BLOCK_N,
        BLOCK_D,
        True,
    )


@triton.jit
def mix_splits(
    part_out,
    part_lse,
    first,
    apart,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`splits` parts, the first at `first` and each `apart` from the one before, weighted by their sums: the result and
    the log2 of its sum. part_out [.., HEAD_DIM]; part_lse, -inf for parts that had no keys and wrote no result.
    """
    split = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_D)
    part = first + split * apart
    lse = tl.load(part_lse + part, mask=split < splits, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    weights = tl.exp2(lse - largest)
    real = (weights > 0.0)[:, None] & (column < HEAD_DIM)[None, :]
    mixed = tl.load(part_out + part[:, None] * HEAD_DIM + column[None, :], mask=real, other=0.0)
    total = tl.sum(weights, axis=0)
    return tl.sum(mixed * weights[:, None], axis=0) / total, largest + tl.log2(total)


@triton.jit
def shared_beginning(
    state_out,
    state_lse,
    place,
    real,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(largest, total, sums) after the keys that queries share with others': of the results at `place`, none where not
    `real`.
    """
    column = tl.arange(0, BLOCK_D)
    largest = tl.load(state_lse + place, mask=real, other=float("-inf"))
    inside = real[:, None] & (column < HEAD_DIM)[None, :]
    sums = tl.load(state_out + place[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return largest, tl.where(real, 1.0, 0.0), sums


def strides(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, page_table: torch.Tensor
) -> tuple[int, int, int, int, int, int]:
    """What kernels take as q_token, q_head, pool_page, pool_slot, pool_head and table_row, of NHD-shaped pools."""
    assert q.stride(-1) == k_pool.stride(-1) == 1
    assert k_pool.stride() == v_pool.stride()
    return (*q.stride()[:2], *k_pool.stride()[:3], page_table.stride(0))  # type: ignore[return-value]


def prefill_tile(group: int, head_dim: int, dtype: torch.dtype, tuning: Tuning) -> int:
    """Rows of a tile of prompts' queries: `tuning.prefill_queries`, or what one token's heads need."""
    return _tile(tuning.prefill_queries, group, head_dim, dtype)


def prefill_tokens(shape: AttentionShape, tuning: Tuning) -> int:
    """New tokens of such a tile, for plans that list tiles."""
    group = shape.num_heads // shape.num_kv_heads
    return prefill_tile(group, shape.head_dim, shape.dtype, tuning) // group


def decode_tokens(shape: AttentionShape, tuning: Tuning) -> int:
    """New tokens, each of another row, of a tile that reads the keys they share."""
    group = shape.num_heads // shape.num_kv_heads
    return _tile(tuning.shared_queries, group, shape.head_dim, shape.dtype) // group


def _tile(queries: int, group: int, head_dim: int, dtype: torch.dtype) -> int:
    return max(queries // shrink(head_dim, dtype), power_of_two(group), SMALLEST_DOT)
