"""Attention of rows with one new token over their pages, each row's keys split among several programs.

Flash-decoding (Dao et al. 2023): every split computes the attention over its keys and the logarithm of its sum; a
second kernel puts the splits together. All query heads of a KV head are rows of one tile, so keys are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tgi_model_server.kernels.launch import LOG2E, SMALLEST_DOT, Tuning, interpreted, launch, power_of_two, shrink
from tgi_model_server.kernels.shared import SharedState
from tgi_model_server.kernels.tiles import attend_tiles, mix_splits, shared_beginning, strides

_FEWEST_SPLITS = 8
"""That a reduction has room for."""


@triton.jit(do_not_specialize=["splits"])
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
    splits,
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
    """Grid [rows, kv_heads, splits], whatever the lengths: programs without keys return at once.

    q [T, heads, HEAD_DIM], a view; pools of strides (pool_page, pool_slot, pool_head, 1); page_table int32
    [rows, table_row]; kv_lens int32 [rows], 0 for rows that are not decoded; query_starts int32 [rows]: the row's
    token. `scale` is in units of log2. A split has at least LEAST tiles of BLOCK_N keys. WINDOW 0 means none. If not
    MANY, there is one split and `out` [T, heads, HEAD_DIM] gets the result. With MANY part_out float32
    [rows, heads, splits, HEAD_DIM] gets each split's and part_lse float32 [rows, heads, splits] the log2 of its sum,
    -inf where it had no keys. With SHARED rows go on behind their first `shared_lens` keys, from the state that
    `SharedState` describes, which the first split takes over.
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
    tiles = (kv_len - lowest + BLOCK_N - 1) // BLOCK_N
    share = tl.maximum((tiles + splits - 1) // splits, LEAST) * BLOCK_N
    begin = lowest + split * share
    end = tl.minimum(begin + share, kv_len)
    part = (row.to(tl.int64) * heads + head) * splits + split
    if begin >= kv_len:
        if MANY:
            tl.store(part_lse + part, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=real)
        return

    token = tl.load(query_starts + row).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (column < HEAD_DIM)[None, :]
    query = tl.load(q + token * q_token + head[:, None] * q_head + column[None, :], mask=inside, other=0.0)
    if WIDEN:
        query = query.to(tl.float32)
    if SHARED:
        place = tl.load(shared_starts + row).to(tl.int64) * heads + head
        begun = real & (split == 0) & (lowest > 0)
        largest, total, sums = shared_beginning(state_out, state_lse, place, begun, HEAD_DIM, BLOCK_D)
    else:
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Only the row's end, which is the last split's, lies inside a tile. The first tile of a window always holds a key
    # that is seen.
    largest, total, sums = attend_tiles(
        query,
        k_pool,
        v_pool,
        page_table + row.to(tl.int64) * table_row,
        tl.zeros((BLOCK_M,), tl.int32) + (kv_len - 1),
        largest,
        total,
        sums,
        begin,
        end,
        kv_head * pool_head,
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
    mixed = sums / total[:, None]
    if MANY:
        tl.store(part_lse + part, largest + tl.log2(total), mask=real)
        tl.store(part_out + part[:, None] * HEAD_DIM + column[None, :], mixed, mask=inside)
    else:
        into = out + (token * heads + head[:, None]) * HEAD_DIM + column[None, :]
        tl.store(into, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def reduce_splits_kernel(
    part_out,
    part_lse,
    out,
    kv_lens,
    query_starts,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid [rows, heads]: `decode_kernel`'s splits, weighted by their sums, to out [T, heads, HEAD_DIM]."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    if tl.load(kv_lens + row) == 0:
        return
    first = (row.to(tl.int64) * heads + head) * splits
    result, _ = mix_splits(part_out, part_lse, first, 1, splits, HEAD_DIM, BLOCK_S, BLOCK_D)
    token = tl.load(query_starts + row).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    into = out + (token * heads + head) * HEAD_DIM + column
    tl.store(into, result.to(out.dtype.element_ty), mask=column < HEAD_DIM)


def choose_splits(rows: int, kv_heads: int, longest: int, cores: int, tuning: Tuning) -> int:
    """A power of two: enough programs to fill `cores` twice, but no split below `tuning.split_keys` of `longest`."""
    wanted = triton.cdiv(2 * cores, max(1, rows * kv_heads))
    useful = triton.cdiv(longest, tuning.split_keys)
    return power_of_two(max(1, min(wanted, useful, tuning.max_splits)))


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
    state: SharedState | None = None,
) -> None:
    """Fill `out` [T, heads, head_dim], contiguous, at the tokens of rows whose `kv_lens` is not 0.

    q [T, heads, head_dim], a view; NHD-shaped pools, which may be views; tables as `decode_kernel` has them. Without a
    window rows may go on from a `state`.
    """
    assert out.is_contiguous()
    assert state is None or not window
    rows, heads, head_dim = kv_lens.shape[0], q.shape[1], q.shape[2]
    kv_heads = k_pool.shape[2]
    group = heads // kv_heads
    block_d = power_of_two(head_dim)
    keys = max(SMALLEST_DOT, tuning.decode_keys // shrink(head_dim, q.dtype))
    part_out = part_lse = None
    if splits > 1:
        part_out = torch.empty((rows, heads, splits, head_dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((rows, heads, splits), dtype=torch.float32, device=q.device)
    launch(
        decode_kernel,
        (rows, kv_heads, splits),
        q,
        k_pool,
        v_pool,
        out,
        part_out,
        part_lse,
        page_table,
        kv_lens,
        query_starts,
        *((None,) * 4 if state is None else (state.out, state.lse, state.starts, state.lens)),
        *strides(q, k_pool, v_pool, page_table),
        splits,
        scale * LOG2E,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE=k_pool.shape[1],
        WINDOW=window or 0,
        MANY=splits > 1,
        SHARED=state is not None,
        LEAST=max(1, tuning.split_keys // keys),
        BLOCK_M=max(SMALLEST_DOT, power_of_two(group)),
        BLOCK_N=keys,
        BLOCK_D=max(SMALLEST_DOT, block_d),
        WIDEN=interpreted(),
        num_warps=tuning.decode_warps,
        num_stages=tuning.decode_stages,
    )
    if splits > 1:
        # Few different sizes: each is compiled.
        block_s = max(_FEWEST_SPLITS, splits)
        launch(
            reduce_splits_kernel,
            (rows, heads),
            part_out,
            part_lse,
            out,
            kv_lens,
            query_starts,
            splits,
            HEAD_DIM=head_dim,
            BLOCK_S=block_s,
            BLOCK_D=block_d,
            num_warps=1 if block_d * block_s <= 1024 else 4,
        )
