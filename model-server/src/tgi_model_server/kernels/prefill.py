"""Attention of rows with several new tokens over their pages: whole prompts, chunks, and what follows a cached prefix.

FlashAttention-2 (Dao 2023) over paged keys. A tile is some tokens of one row, times the query heads that share a KV
head: each key that is read serves the whole group. Tiles are listed by the host, so that rows of any lengths make one
launch without empty programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tgi_model_server.kernels.launch import LOG2E, SMALLEST_DOT, Tuning, interpreted, launch, power_of_two, shrink
from tgi_model_server.kernels.shared import SharedState
from tgi_model_server.kernels.tiles import attend_range, prefill_tile, shared_beginning, strides


@triton.jit
def prefill_kernel(
    q,
    k_pool,
    v_pool,
    out,
    tiles,
    page_table,
    kv_lens,
    query_lens,
    query_starts,
    state_out,
    state_lse,
    shared_starts,
    shared_lens,
    q_token,
    q_head,
    pool_page,
    pool_slot,
    pool_head,
    table_row,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid [tiles, kv_heads]. tiles int32 [n, 2]: a row, or -1 for no work, and the first of its new tokens.

    A tile has BLOCK_M // GROUP tokens. q [T, heads, HEAD_DIM], a view -> out, contiguous; pools of strides (pool_page,
    pool_slot, pool_head, 1); int32 page_table [rows, table_row], kv_lens, query_lens and query_starts [rows]. `scale`
    is in units of log2. WINDOW 0 means none. With SHARED rows go on behind their first `shared_lens` keys, from the
    state that `SharedState` describes.
    """
    row = tl.load(tiles + 2 * tl.program_id(0))
    if row < 0:
        return
    first = tl.load(tiles + 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    tokens: tl.constexpr = BLOCK_M // GROUP
    kv_len = tl.load(kv_lens + row)
    query_len = tl.load(query_lens + row)

    member = tl.arange(0, BLOCK_M)
    offset = first + member // GROUP
    real = (member < tokens * GROUP) & (offset < query_len)
    token = tl.load(query_starts + row).to(tl.int64) + offset
    head = kv_head * GROUP + member % GROUP
    column = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (column < HEAD_DIM)[None, :]
    query = tl.load(q + (token * q_token + head * q_head)[:, None] + column[None, :], mask=inside, other=0.0)
    if WIDEN:
        query = query.to(tl.float32)

    # Rows of the tile that are no queries look from the last real position: they see keys, so nothing divides by 0.
    earliest = kv_len - query_len + first
    latest = tl.minimum(earliest + tokens, kv_len) - 1
    position = tl.minimum(kv_len - query_len + offset, latest)
    pages = page_table + row.to(tl.int64) * table_row
    head_offset = kv_head * pool_head
    begin = 0
    if SHARED:
        begin = tl.load(shared_lens + row)
        place = (tl.load(shared_starts + row) + offset).to(tl.int64) * heads + head
        largest, total, sums = shared_beginning(state_out, state_lse, place, real & (begin > 0), HEAD_DIM, BLOCK_D)
    else:
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOW:
        middle = tl.maximum(earliest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    else:
        middle = begin + (earliest + 1 - begin) // BLOCK_N * BLOCK_N
    largest, total, sums = attend_range(
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
        latest + 1,
        head_offset,
        pool_page,
        pool_slot,
        scale,
        HEAD_DIM,
        PAGE,
        WINDOW,
        BLOCK_N,
        BLOCK_D,
    )
    into = out + ((token * heads + head) * HEAD_DIM)[:, None] + column[None, :]
    tl.store(into, (sums / total[:, None]).to(out.dtype.element_ty), mask=inside)


def prefill(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    out: torch.Tensor,
    tiles: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    query_lens: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    tuning: Tuning,
    state: SharedState | None = None,
) -> None:
    """Fill `out` [T, heads, head_dim], contiguous, at the tokens of `tiles`, which has `prefill_tokens` for each.

    q [T, heads, head_dim], a view; NHD-shaped pools, which may be views; tables as `prefill_kernel` has them. Without a
    window rows may go on from a `state`.
    """
    assert out.is_contiguous()
    assert state is None or not window
    heads, head_dim, kv_heads = q.shape[1], q.shape[2], k_pool.shape[2]
    group = heads // kv_heads
    launch(
        prefill_kernel,
        (tiles.shape[0], kv_heads),
        q,
        k_pool,
        v_pool,
        out,
        tiles,
        page_table,
        kv_lens,
        query_lens,
        query_starts,
        *((None,) * 4 if state is None else (state.out, state.lse, state.starts, state.lens)),
        *strides(q, k_pool, v_pool, page_table),
        scale * LOG2E,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE=k_pool.shape[1],
        WINDOW=window or 0,
        SHARED=state is not None,
        BLOCK_M=prefill_tile(group, head_dim, q.dtype, tuning),
        BLOCK_N=max(SMALLEST_DOT, tuning.prefill_keys // shrink(head_dim, q.dtype)),
        BLOCK_D=max(SMALLEST_DOT, power_of_two(head_dim)),
        WIDEN=interpreted(),
        num_warps=tuning.prefill_warps,
        num_stages=tuning.prefill_stages,
    )
