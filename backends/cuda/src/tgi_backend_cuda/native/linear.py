"""Products with few rows: which variant of `linear.cu` to start, and with how much of everything."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from tgi_backend_cuda.native.compile import Kernel
from tgi_backend_cuda.native.launch import Launcher, pointer

MAX_TOKENS = 8
"""Rows of x that one product takes: columns of the matrix unit's right operand."""
SHARED_BYTES = 227 * 1024
"""Of one block, at most, on the chips these kernels are for."""
_CHUNK = 64
_CHUNK_BYTES = 128


class Epilogue(IntEnum):
    """What becomes of the sums."""

    STORE = 0
    STORE_FLOAT = 1
    ADD = 2
    GATED = 3


@dataclass(frozen=True, slots=True)
class LinearTuning:
    """See `linear.cu`; which values are best is measured."""

    warps: int = 8
    stages: int = 4
    tiles: int = 1
    blocks: int = 2
    """Blocks at most for each multiprocessor; they share the rows of the weight."""
    prefetch: int = 0
    launch_left: int = 1 << 30
    evict_first: bool = True


@dataclass(frozen=True, slots=True)
class LinearTunings:
    """One for each place in a decoder."""

    norm_linear: LinearTuning = field(default_factory=lambda: LinearTuning(blocks=3, prefetch=8192, launch_left=4))
    linear: LinearTuning = field(default_factory=lambda: LinearTuning(prefetch=8192, launch_left=4))
    linear_add: LinearTuning = field(default_factory=lambda: LinearTuning(prefetch=8192, launch_left=4))
    norm_gated: LinearTuning = field(default_factory=lambda: LinearTuning(prefetch=8192, launch_left=4))
    head: LinearTuning = field(default_factory=lambda: LinearTuning(prefetch=8192, launch_left=4))


@dataclass(frozen=True, slots=True)
class Linear:
    """A product of one shape, compiled and divided among blocks."""

    tokens: int
    columns: int
    rows: int
    """Outputs per token."""
    dtype: torch.dtype
    normed: bool
    epilogue: Epilogue
    tuning: LinearTuning

    @property
    def kernel(self) -> Kernel:
        tuning = self.tuning
        constants = {
            "BF16": int(self.dtype == torch.bfloat16),
            "TOKENS": self.tokens,
            "NORM": int(self.normed),
            "EPILOGUE": int(self.epilogue),
            "WARPS": tuning.warps,
            "STAGES": tuning.stages,
            "TILES": tuning.tiles,
            "PREFETCH": tuning.prefetch,
            "LAUNCH_LEFT": tuning.launch_left,
            "EVICT_FIRST": int(tuning.evict_first),
        }
        return Kernel("linear", tuple(constants.items()))

    @property
    def shared_bytes(self) -> int:
        """As `linear` in `linear.cu` divides it."""
        tuning = self.tuning
        chunks = -(-self.columns // _CHUNK)
        stage = (16 * tuning.tiles + (0 if self.normed else self.tokens)) * _CHUNK_BYTES
        sums = 2 * tuning.warps * 16 * tuning.tiles * self.tokens * 4
        norm = chunks * (self.tokens + 1) * _CHUNK_BYTES + 4 * self.tokens * tuning.warps if self.normed else 0
        return tuning.warps * tuning.stages * stage + sums + -(-norm // 16) * 16

    def blocks(self, multiprocessors: int) -> int:
        groups = -(-self.rows // ((8 if self.epilogue == Epilogue.GATED else 16) * self.tuning.tiles))
        return min(groups, multiprocessors * self.tuning.blocks)

    def start(
        self,
        launcher: Launcher,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        norm_weight: torch.Tensor | None,
        eps: float,
    ) -> None:
        arguments = (
            pointer(x),
            pointer(norm_weight),
            ctypes.c_float(eps),
            pointer(weight),
            pointer(bias),
            pointer(out),
            ctypes.c_uint32(self.columns),
            ctypes.c_uint32(self.rows),
        )
        grid = (self.blocks(launcher.multiprocessors), 1, 1)
        launcher.launch(self.kernel, grid, 32 * self.tuning.warps, self.shared_bytes, arguments)


def supports_linear(tokens: int, columns: int, dtype: torch.dtype, *, normed: bool) -> bool:
    """Whether a product of these sizes can run here: few tokens, 16-bit numbers, rows of whole 16-byte pieces, and for
    a normalized x, which is kept in shared memory, a width that fits there.
    """
    if not 1 <= tokens <= MAX_TOKENS or columns < 8 or columns % 8 or dtype not in (torch.bfloat16, torch.float16):
        return False
    tunings = LinearTunings()
    for tuning in (tunings.norm_linear, tunings.norm_gated, tunings.head) if normed else (tunings.linear_add,):
        shape = Linear(tokens, columns, 16, dtype, normed, Epilogue.STORE, tuning)
        if shape.shared_bytes > SHARED_BYTES:
            return False
    return True
