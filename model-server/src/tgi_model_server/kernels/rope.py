"""Rotary embedding (Su et al. 2021, halves convention), and the way of new keys and values into their pages.

One launch may do all that happens to q, k and v between their projection and attention: the norm of each head, the
rotation, and the write into the pool. A pool is ``[num_pages, page_size, kv_heads, head_dim]``, its first three
dimensions in any order: kernels take its strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tgi_model_server.device import HeadNorms
from tgi_model_server.kernels.launch import launch, power_of_two, warps_for
from tgi_model_server.kv.pool import saturation

_TILE = 1024


@triton.jit
def _turned(
    source,
    weight,
    inside,
    column,
    partner,
    cos,
    sin,
    eps,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
):
    """Rotated heads, float32 [heads, block]; `source` are pointers to their beginnings, [heads, 1].

    `partner` is the column that each column is turned with, `sin` is negative in the first half.
    """
    value = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / HEAD_DIM + eps)[:, None]
        known = column < HEAD_DIM
        value = value * scale * tl.load(weight + column, mask=known, other=0.0).to(tl.float32)[None, :]
        other = other * scale * tl.load(weight + partner, mask=known, other=0.0).to(tl.float32)[None, :]
    return value * cos[None, :] + other * sin[None, :]


@triton.jit
def _kept(value, pool, LIMIT: tl.constexpr):
    """`value` as the pool keeps it: at most LIMIT in size, if that is not 0."""
    if LIMIT:
        value = tl.minimum(tl.maximum(value.to(tl.float32), -LIMIT), LIMIT)
    return value.to(pool.dtype.element_ty)


@triton.jit
def rope_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    q_out,
    k_out,
    k_pool,
    v_pool,
    slots,
    cos,
    sin,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    pool_page,
    pool_slot,
    pool_head,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    STORE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Grid [T, ceil(Q_HEADS / HEADS) + ceil(KV_HEADS / HEADS)]: first the programs of q, then those of k and v.

    q [T, Q_HEADS, HEAD_DIM], k and v [T, KV_HEADS, HEAD_DIM], views; cos, sin float32 [T, HALF], contiguous; the first
    2 * HALF columns are turned. q_out is contiguous. With STORE, k and v go to their `slots` (int32 [T], page * PAGE +
    offset) of the pools; without it k_out, contiguous, takes k, and v is not touched.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    column = tl.arange(0, BLOCK)
    first = column < HALF
    turned = column < 2 * HALF
    partner = tl.where(first, column + HALF, tl.where(turned, column - HALF, column))
    angle = token * HALF + tl.where(first, column, column - HALF)
    cos_row = tl.load(cos + angle, mask=turned, other=1.0)
    sin_row = tl.load(sin + angle, mask=turned, other=0.0)
    sin_row = tl.where(first, -sin_row, sin_row)
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        inside = (head < Q_HEADS)[:, None] & (column < HEAD_DIM)[None, :]
        source = q + token * q_token + head[:, None] * q_head
        value = _turned(source, q_weight, inside, column, partner, cos_row, sin_row, eps, HEAD_DIM, NORM)
        into = q_out + (token * Q_HEADS + head[:, None]) * HEAD_DIM + column[None, :]
        tl.store(into, value.to(q_out.dtype.element_ty), mask=inside)
    else:
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        inside = (head < KV_HEADS)[:, None] & (column < HEAD_DIM)[None, :]
        source = k + token * k_token + head[:, None] * k_head
        value = _turned(source, k_weight, inside, column, partner, cos_row, sin_row, eps, HEAD_DIM, NORM)
        if STORE:
            slot = tl.load(slots + token).to(tl.int64)
            place = slot // PAGE * pool_page + slot % PAGE * pool_slot + head[:, None] * pool_head + column[None, :]
            # What the pool keeps is rounded as if k had been a tensor of the model's dtype first.
            tl.store(k_pool + place, _kept(value.to(k.dtype.element_ty), k_pool, LIMIT), mask=inside)
            taken = tl.load(v + token * v_token + head[:, None] * v_head + column[None, :], mask=inside, other=0.0)
            tl.store(v_pool + place, _kept(taken, v_pool, LIMIT), mask=inside)
        else:
            into = k_out + (token * KV_HEADS + head[:, None]) * HEAD_DIM + column[None, :]
            tl.store(into, value.to(k_out.dtype.element_ty), mask=inside)


@triton.jit
def write_kv_kernel(
    k,
    v,
    k_pool,
    v_pool,
    slots,
    k_token,
    k_head,
    v_token,
    v_head,
    pool_page,
    pool_slot,
    pool_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """k, v [T, KV_HEADS, HEAD_DIM], views, to their `slots` (int32 [T]) of the pools; grid [T, ceil(KV_HEADS / HEADS)].

    Converts to the pools' dtype; what is larger than LIMIT becomes it, if that is not 0.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    inside = (head < KV_HEADS)[:, None] & (column < HEAD_DIM)[None, :]
    slot = tl.load(slots + token).to(tl.int64)
    place = slot // PAGE * pool_page + slot % PAGE * pool_slot + head[:, None] * pool_head + column[None, :]
    key = tl.load(k + token * k_token + head[:, None] * k_head + column[None, :], mask=inside, other=0.0)
    tl.store(k_pool + place, _kept(key, k_pool, LIMIT), mask=inside)
    value = tl.load(v + token * v_token + head[:, None] * v_head + column[None, :], mask=inside, other=0.0)
    tl.store(v_pool + place, _kept(value, v_pool, LIMIT), mask=inside)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, heads, head_dim], k [T, kv_heads, head_dim], views; cos, sin float32 [T, rotary_dim / 2]. New tensors."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q.shape[0]:
        _launch(q, k, None, q_out, k_out, None, cos, sin, norms, page_size=1)
    return q_out, k_out


def rope_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """`rope` of q, returned; rotated k, and v, go to `slots` (int32 [T]) of the NHD-shaped pools, maybe views."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0]:
        _launch(q, k, v, q_out, None, (k_pool, v_pool, slots), cos, sin, norms, page_size=k_pool.shape[1])
    return q_out


def write_kv(k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor) -> None:
    """k, v [T, kv_heads, head_dim] to `slots` (int32 [T]) of the NHD-shaped pools, which may be views."""
    assert k.stride(-1) == v.stride(-1) == 1
    assert k_pool.stride() == v_pool.stride()
    tokens, kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    block = power_of_two(head_dim)
    heads = min(max(1, _TILE // block), power_of_two(kv_heads))
    launch(
        write_kv_kernel,
        (tokens, triton.cdiv(kv_heads, heads)),
        k,
        v,
        k_pool,
        v_pool,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_pool.stride(0),
        k_pool.stride(1),
        k_pool.stride(2),
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE=k_pool.shape[1],
        HEADS=heads,
        BLOCK=block,
        LIMIT=saturation(k_pool.dtype),
        num_warps=warps_for(heads * block),
    )


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None,
    pools: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: HeadNorms | None,
    *,
    page_size: int,
) -> None:
    assert q.stride(-1) == k.stride(-1) == 1
    assert v is None or v.stride(-1) == 1
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    k_pool, v_pool, slots = pools or (None, None, None)
    if k_pool is not None and v_pool is not None:
        assert k_pool.stride() == v_pool.stride()
    block = power_of_two(q.shape[2])
    heads = min(max(1, _TILE // block), power_of_two(q.shape[1]))
    launch(
        rope_kernel,
        (q.shape[0], triton.cdiv(q.shape[1], heads) + triton.cdiv(k.shape[1], heads)),
        q,
        k,
        v,
        None if norms is None else norms.q_weight,
        None if norms is None else norms.k_weight,
        q_out,
        k_out,
        k_pool,
        v_pool,
        slots,
        cos,
        sin,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        0 if v is None else v.stride(0),
        0 if v is None else v.stride(1),
        0 if k_pool is None else k_pool.stride(0),
        0 if k_pool is None else k_pool.stride(1),
        0 if k_pool is None else k_pool.stride(2),
        0.0 if norms is None else norms.eps,
        Q_HEADS=q.shape[1],
        KV_HEADS=k.shape[1],
        HEAD_DIM=q.shape[2],
        HALF=cos.shape[1],
        PAGE=page_size,
        HEADS=heads,
        BLOCK=block,
        NORM=norms is not None,
        STORE=pools is not None,
        LIMIT=0 if k_pool is None else saturation(k_pool.dtype),
        num_warps=warps_for(heads * block),
    )
