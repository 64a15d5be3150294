"""Attention over keys that several rows share: read once for the new tokens of all of them (Hydragen, Juravsky et al.
2024).

The new tokens of a group of rows lie packed in tiles, whatever row they are of: every one of them sees all the shared
keys. Where tiles are few, several programs share a tile's keys. What comes out is the state in which each row's own
attention over the rest of its keys begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tgi_model_server.kernels.launch import LOG2E, SMALLEST_DOT, Tuning, interpreted, launch, power_of_two, shrink
from tgi_model_server.kernels.sharing import Group
from tgi_model_server.kernels.tiles import attend_range, mix_splits, prefill_tile, strides

_MOST_ROUNDS = 4
"""Of programs, where a tile has several."""


@dataclass(frozen=True, slots=True)
class SharedKeys:
    """Which rows of a step read which keys together, int32. Places are those of the queries in all tiles."""

    tokens: torch.Tensor
    """[tiles * tokens of a tile]: the new token at each place; places that are left over repeat one of them."""
    tiles: torch.Tensor
    """[tiles, 2]: how many keys, and the row of the page table that begins with their pages. No keys: no work."""
    starts: torch.Tensor
    """[rows]: place of the row's first new token, if it shares keys."""
    lens: torch.Tensor
    """[rows]: keys that are shared, 0 for rows that share none."""
    splits: torch.Tensor
    """[1]: programs that share a tile's keys."""
    programs: int
    """At least the tiles times the splits."""
    most_splits: int
    """What `splits` may be: a captured graph cannot know what it is."""
    groups: Sequence[Group] = ()
    """For whom tiles are of one step only: the rows of the plan, in the order of their places."""


@dataclass(frozen=True, slots=True)
class SharedState:
    """Attention of places over the shared keys; rows find theirs by `starts` and `lens`, as `SharedKeys` has them."""

    starts: torch.Tensor
    lens: torch.Tensor
    out: torch.Tensor
    """[places, heads, head_dim], contiguous."""
    lse: torch.Tensor
    """float32 [places, heads]: log2 of the sum of the weights."""


@triton.jit(do_not_specialize=["tile_count"])
def shared_kernel(
    q,
    k_pool,
    v_pool,
    part_out,
    part_lse,
    page_table,
    tokens,
    tiles,
    splits,
    tile_count,
    q_token,
    q_head,
    pool_page,
    pool_slot,
    pool_head,
    table_row,
    scale,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid [programs, kv_heads]: of each tile of TOKENS tokens as many as `splits` says, what is left has no work.

    Tables as `SharedKeys` has them; `scale` is in units of log2. part_out float32 [programs, TOKENS, heads, HEAD_DIM]
    gets each program's result, part_lse float32 [programs, TOKENS, heads] the log2 of its sum, -inf without keys.
    """
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    parts = tl.load(splits)
    tile = program // parts
    if tile >= tile_count:
        return
    length = tl.load(tiles + 2 * tile)
    if length == 0:
        return
    member = tl.arange(0, BLOCK_M)
    real = member < TOKENS * GROUP
    head = kv_head * GROUP + member % GROUP
    part = (program.to(tl.int64) * TOKENS + member // GROUP) * heads + head
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), parts) * BLOCK_N
    begin = program % parts * share
    end = tl.minimum(begin + share, length)
    if begin >= length:
        tl.store(part_lse + part, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=real)
        return

    token = tl.load(tokens + tile * TOKENS + member // GROUP, mask=real, other=0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (column < HEAD_DIM)[None, :]
    query = tl.load(q + (token * q_token + head * q_head)[:, None] + column[None, :], mask=inside, other=0.0)
    if WIDEN:
        query = query.to(tl.float32)
    pages = page_table + tl.load(tiles + 2 * tile + 1).to(tl.int64) * table_row
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Every query sees all of the program's keys.
    position = tl.zeros((BLOCK_M,), tl.int32) + (end - 1)
    head_offset = kv_head * pool_head
    middle = end // BLOCK_N * BLOCK_N
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
    )
    tl.store(part_lse + part, largest + tl.log2(total), mask=real)
    into = part_out + part[:, None] * HEAD_DIM + column[None, :]
    tl.store(into, sums / total[:, None], mask=inside)


@triton.jit
def reduce_shared_kernel(
    part_out,
    part_lse,
    out,
    lse,
    tiles,
    splits,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid [places, heads]: `shared_kernel`'s parts to float32 out [places, heads, HEAD_DIM], lse [places, heads]."""
    place = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    tile = place // TOKENS
    if tl.load(tiles + 2 * tile) == 0:
        return
    parts = tl.load(splits)
    first = ((tile.to(tl.int64) * parts) * TOKENS + place % TOKENS) * heads + head
    result, total = mix_splits(part_out, part_lse, first, TOKENS * heads, parts, HEAD_DIM, BLOCK_S, BLOCK_D)
    at = place.to(tl.int64) * heads + head
    column = tl.arange(0, BLOCK_D)
    tl.store(out + at * HEAD_DIM + column, result, mask=column < HEAD_DIM)
    tl.store(lse + at, total)


@triton.jit(do_not_specialize=["first_token"])
def merge_kernel(
    out,
    own_lse,
    state_out,
    state_lse,
    tiles,
    query_lens,
    query_starts,
    shared_starts,
    shared_lens,
    first_token,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid [tiles, tokens of a tile], tiles as `prefill_kernel` has them: into `out` [T, HEADS, HEAD_DIM], which holds
    the rows' own parts, what they share with others. own_lse float32 [tokens from first_token on, HEADS]: the log2 of
    the own parts' sums.
    """
    row = tl.load(tiles + 2 * tl.program_id(0))
    if row < 0:
        return
    offset = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.program_id(1)
    if (tl.load(shared_lens + row) == 0) | (offset >= tl.load(query_lens + row)):
        return
    token = (tl.load(query_starts + row) + offset).to(tl.int64)
    place = (tl.load(shared_starts + row) + offset).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    real = head < HEADS
    inside = real[:, None] & (column < HEAD_DIM)[None, :]
    spot = head[:, None] * HEAD_DIM + column[None, :]
    own = tl.load(own_lse + (token - first_token) * HEADS + head, mask=real, other=0.0)
    shared = tl.load(state_lse + place * HEADS + head, mask=real, other=0.0)
    # The part of all weights that the shared keys have.
    part = 1.0 / (1.0 + tl.exp2(own - shared))
    mine = tl.load(out + token * HEADS * HEAD_DIM + spot, mask=inside, other=0.0).to(tl.float32)
    theirs = tl.load(state_out + place * HEADS * HEAD_DIM + spot, mask=inside, other=0.0).to(tl.float32)
    mixed = mine + (theirs - mine) * part[:, None]
    tl.store(out + token * HEADS * HEAD_DIM + spot, mixed.to(out.dtype.element_ty), mask=inside)


def choose_shared_splits(tiles: int, kv_heads: int, keys: int, at_once: int, most: int, tuning: Tuning) -> int:
    """At most `most`, and none below `tuning.split_keys` keys: as few as leave little of a chip idle that runs
    `at_once` programs, in the last of the rounds that they take.
    """
    whole = tiles * kv_heads
    if not whole:
        return 1
    # Results of many rounds of programs would take memory that nobody has set aside.
    most = max(1, min(most, tuning.max_splits, keys // tuning.split_keys, _MOST_ROUNDS * at_once // whole))

    def idle(splits: int) -> float:
        return 1.0 - whole * splits / (-(-whole * splits // at_once) * at_once)

    # Each split's result is written and read once more, which costs about as much as a hundredth of the chip.
    return min(range(1, most + 1), key=lambda splits: idle(splits) + 0.01 * splits)


def attend_shared(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_table: torch.Tensor,
    shared: SharedKeys,
    *,
    scale: float,
    tuning: Tuning,
) -> SharedState:
    """q [T, heads, head_dim], a view; NHD-shaped pools, which may be views."""
    places, tiles = shared.tokens.shape[0], shared.tiles.shape[0]
    heads, head_dim, kv_heads = q.shape[1], q.shape[2], k_pool.shape[2]
    group, tokens = heads // kv_heads, places // tiles
    block_m = max(SMALLEST_DOT, power_of_two(tokens * group))
    block_d = max(SMALLEST_DOT, power_of_two(head_dim))
    large = block_m > tuning.shared_queries
    keys = (tuning.prefill_keys if large else tuning.decode_keys) // shrink(head_dim, q.dtype)
    parts = shared.programs * tokens
    part_out = torch.empty((parts, heads, head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((parts, heads), dtype=torch.float32, device=q.device)
    launch(
        shared_kernel,
        (shared.programs, kv_heads),
        q,
        k_pool,
        v_pool,
        part_out,
        part_lse,
        page_table,
        shared.tokens,
        shared.tiles,
        shared.splits,
        tiles,
        *strides(q, k_pool, v_pool, page_table),
        scale * LOG2E,
        TOKENS=tokens,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE=k_pool.shape[1],
        BLOCK_M=block_m,
        BLOCK_N=max(SMALLEST_DOT, keys),
        BLOCK_D=block_d,
        WIDEN=interpreted(),
        num_warps=tuning.prefill_warps if large else tuning.decode_warps,
        num_stages=tuning.prefill_stages if large else tuning.decode_stages,
    )
    if shared.most_splits == 1:  # a program's part is the result of its places
        return SharedState(shared.starts, shared.lens, part_out, part_lse)
    out = torch.empty((places, heads, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((places, heads), dtype=torch.float32, device=q.device)
    block_s = power_of_two(tuning.max_splits)
    launch(
        reduce_shared_kernel,
        (places, heads),
        part_out,
        part_lse,
        out,
        lse,
        shared.tiles,
        shared.splits,
        TOKENS=tokens,
        HEAD_DIM=head_dim,
        BLOCK_S=block_s,
        BLOCK_D=block_d,
        num_warps=1 if block_d * block_s <= 1024 else 4,
    )
    return SharedState(shared.starts, shared.lens, out, lse)


def merge_shared(
    out: torch.Tensor,
    own_lse: torch.Tensor,
    first_token: int,
    state: SharedState,
    tiles: torch.Tensor,
    query_lens: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    kv_heads: int,
    tuning: Tuning,
) -> None:
    """Add what rows share to their own parts in `out` [T, heads, head_dim], for the tokens of `tiles`, which are those
    of `prefill`. own_lse float32 [tokens from first_token on, heads]: log2 of the sums of the own parts' weights.
    """
    assert out.is_contiguous()
    assert own_lse.is_contiguous()
    heads, head_dim = out.shape[1:]
    per_tile = prefill_tile(heads // kv_heads, head_dim, out.dtype, tuning) // (heads // kv_heads)
    launch(
        merge_kernel,
        (tiles.shape[0], per_tile),
        out,
        own_lse,
        state.out,
        state.lse,
        tiles,
        query_lens,
        query_starts,
        state.starts,
        state.lens,
        first_token,
        HEAD_DIM=head_dim,
        HEADS=heads,
        BLOCK_H=power_of_two(heads),
        BLOCK_D=power_of_two(head_dim),
    )
