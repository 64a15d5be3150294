"""The gate of a feed-forward block: silu(gate) * up (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tgi_model_server.kernels.launch import launch, power_of_two, warps_for

_BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate_up, out, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up [rows, 2 * WIDTH] of stride (row_stride, 1) -> out [rows, WIDTH], contiguous.

    Grid [rows, ceil(WIDTH / BLOCK)]; computed in float32.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    start = gate_up + row * row_stride + column
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + WIDTH, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + column, gated.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2n] -> [T, n], contiguous."""
    assert gate_up.stride(-1) == 1
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(_BLOCK, power_of_two(width))
        launch(
            silu_mul_kernel,
            (rows, triton.cdiv(width, block)),
            gate_up,
            out,
            gate_up.stride(0),
            WIDTH=width,
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return out
