"""Products of more rows than `linear.cu` takes: how `wide.cu` is divided among the chip, and the norm before it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from tgi_backend_cuda.native.compile import Kernel
from tgi_backend_cuda.native.launch import Launcher, pointer
from tgi_backend_cuda.native.linear import Epilogue, LinearTuning

MAX_TOKENS = 32
_CHUNK = 64
_CHUNK_BYTES = 128
_MOST_SPLITS = 4
_NORM_WARPS = 16

DEFAULT_TUNING = LinearTuning(warps=4, stages=4, tiles=4, blocks=1)


@dataclass(frozen=True, slots=True)
class Wide:
    """A product of one shape, compiled and divided among blocks."""

    tokens: int
    columns: int
    rows: int
    """Outputs per token."""
    dtype: torch.dtype
    epilogue: Epilogue
    tuning: LinearTuning = DEFAULT_TUNING

    @property
    def kernel(self) -> Kernel:
        """The same for every number of columns and rows."""
        constants = {
            "BF16": int(self.dtype == torch.bfloat16),
            "TOKENS": self.tokens,
            "EPILOGUE": int(self.epilogue),
            "WARPS": self.tuning.warps,
            "STAGES": self.tuning.stages,
            "TILES": self.tuning.tiles,
            "EVICT_FIRST": int(self.tuning.evict_first),
        }
        return Kernel("wide", tuple(constants.items()))

    @property
    def shared_bytes(self) -> int:
        """As `wide` in `wide.cu` divides it."""
        weight_rows = 16 * self.tuning.tiles
        ring = self.tuning.stages * (weight_rows + self.tokens) * _CHUNK_BYTES
        return self.tuning.warps * (ring + self.tokens * (weight_rows + 4) * 4)

    @property
    def groups(self) -> int:
        return -(-self.rows // ((8 if self.epilogue == Epilogue.GATED else 16) * self.tuning.tiles))

    def splits(self, multiprocessors: int) -> int:
        """Parts of each group's columns: few, but so many that no multiprocessor waits long for the others."""
        slots = multiprocessors * self.tuning.blocks
        chunks = -(-self.columns // _CHUNK)

        def cost(splits: int) -> float:
            rounds = -(-self.groups * splits // slots)
            return rounds * slots / (self.groups * splits) + 0.03 * (splits - 1)

        most = max(1, min(_MOST_SPLITS, chunks // (2 * self.tuning.warps)))
        return min(range(1, most + 1), key=cost)

    def part_words(self, multiprocessors: int) -> int:
        """float32 numbers that the blocks of split groups leave each other; 0 if there are none."""
        splits = self.splits(multiprocessors)
        return 0 if splits == 1 else self.groups * splits * self.tokens * 16 * self.tuning.tiles

    def start(
        self,
        launcher: Launcher,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        parts: torch.Tensor | None,
        arrived: torch.Tensor | None,
    ) -> None:
        """`parts` float32 [part_words] and `arrived` int32 [groups], zero, are wanted where groups are split."""
        splits = self.splits(launcher.multiprocessors)
        arguments = (
            pointer(x),
            pointer(weight),
            pointer(bias),
            pointer(out),
            ctypes.c_uint32(self.columns),
            ctypes.c_uint32(self.rows),
            ctypes.c_uint32(splits),
            pointer(parts),
            pointer(arrived),
        )
        blocks = min(self.groups * splits, launcher.multiprocessors * self.tuning.blocks)
        launcher.launch(self.kernel, (blocks, 1, 1), 32 * self.tuning.warps, self.shared_bytes, arguments)


def rms_norm_kernel(columns: int, dtype: torch.dtype) -> Kernel:
    pieces = -(-columns // (8 * 32 * _NORM_WARPS))
    constants = {"BF16": int(dtype == torch.bfloat16), "WARPS": _NORM_WARPS, "PIECES": pieces, "EVICT_FIRST": 0}
    return Kernel("rms_norm", tuple(constants.items()))


def rms_norm(launcher: Launcher, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """rms_norm of each row of x [rows, columns] into `out`."""
    rows, columns = x.shape
    arguments = (pointer(x), pointer(weight), ctypes.c_float(eps), pointer(out), ctypes.c_uint32(columns))
    shared_bytes = 4 * _NORM_WARPS
    launcher.launch(rms_norm_kernel(columns, x.dtype), (rows, 1, 1), 32 * _NORM_WARPS, shared_bytes, arguments)
