"""RMS norm (Zhang and Sennrich 2019) in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tgi_model_server.kernels.launch import launch, power_of_two, warps_for

_TILE = 1024
"""Numbers of a tile when rows are short, as those of single heads are."""


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x,
    weight,
    out,
    rows,
    x_token,
    x_head,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [tokens, HEADS, WIDTH] of strides (x_token, x_head, 1) -> out, contiguous; grid [ceil(rows / ROWS)].

    `rows` is tokens * HEADS; weight [WIDTH]. Statistics in float32, over a whole row at a time.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    start = (row // HEADS).to(tl.int64) * x_token + (row % HEADS) * x_head
    values = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + eps)
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = values * scale[:, None] * factor[None, :]
    into = out + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(into, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, n] or [T, heads, n], rows anywhere; contiguous result of x's dtype."""
    assert x.dim() in (2, 3), "a norm is over rows or over heads"
    assert x.stride(-1) == 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads, width = (x.shape[1] if x.dim() == 3 else 1), x.shape[-1]
    rows = x.shape[0] * heads
    if rows == 0:
        return out
    block = power_of_two(width)
    together = min(max(1, _TILE // block), power_of_two(rows))
    launch(
        rms_norm_kernel,
        (triton.cdiv(rows, together),),
        x,
        weight,
        out,
        rows,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        eps,
        HEADS=heads,
        WIDTH=width,
        ROWS=together,
        BLOCK=block,
        num_warps=warps_for(together * block),
    )
    return out
