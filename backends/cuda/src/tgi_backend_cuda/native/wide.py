"""Products with 9 to 64 rows on Hopper: how `wide.cu` is started, and the norm that goes before it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import torch

from tgi_backend_cuda.native.compile import Kernel
from tgi_backend_cuda.native.launch import Launcher, pointer
from tgi_backend_cuda.native.linear import MAX_TOKENS, Epilogue
from tgi_backend_cuda.native.tensor_map import Tiling

WIDTHS = (16, 24, 32, 48, 64)
"""Rows of x that kernels are made for; fewer are filled up with zeros."""
MAX_NORMED = 16384
"""Columns of a row that one block normalizes in its registers."""
_CHUNK = 64
_CHUNK_BYTES = 128
_MOST_BLOCKS = 8
"""Of a cluster, on every Hopper chip."""


@dataclass(frozen=True, slots=True)
class WideTuning:
    """See `wide.cu`; which values are best is measured."""

    groups: int = 1
    stages: int = 16
    """At most; as many as fit."""
    rotate: int = 5


@dataclass(frozen=True, slots=True)
class WideTunings:
    """One for each place in a decoder; measured on H200 with whole steps of an 8B model, 16 to 64 tokens."""

    linear: WideTuning = WideTuning()
    linear_add: WideTuning = WideTuning()
    gated: WideTuning = WideTuning(groups=2)
    head: WideTuning = WideTuning(groups=2)

    def of(self, epilogue: Epilogue) -> WideTuning:
        return {
            Epilogue.STORE: self.linear,
            Epilogue.STORE_FLOAT: self.head,
            Epilogue.ADD: self.linear_add,
            Epilogue.GATED: self.gated,
        }[epilogue]


@dataclass(frozen=True, slots=True)
class Wide:
    """A product of one shape, compiled and divided among blocks."""

    width: int
    columns: int
    rows: int
    """Outputs per token."""
    dtype: torch.dtype
    epilogue: Epilogue
    tuning: WideTuning

    @property
    def kernel(self) -> Kernel:
        tuning = self.tuning
        constants = {
            "BF16": int(self.dtype == torch.bfloat16),
            "HOPPER": 1,
            "EVICT_FIRST": 0,
            "N": self.width,
            "EPILOGUE": int(self.epilogue),
            "GROUPS": tuning.groups,
            "STAGES": tuning.stages,
            "ROTATE": tuning.rotate,
        }
        return Kernel("wide", tuple(constants.items()))

    @property
    def tile(self) -> int:
        """Weight rows that a block multiplies at once."""
        return 64 * self.tuning.groups

    def shared_bytes(self, cluster: int) -> int:
        """As `wide` in `wide.cu` divides it."""
        stages = self.tuning.stages
        parts = self.tile * self.width * 4 if cluster > 1 else 0
        return stages * (self.tile + self.width) * _CHUNK_BYTES + parts + 2 * stages * 8

    def fitted(self, shared_bytes: int) -> Wide:
        """With as many stages as fit into a block's shared memory, two at least."""
        fitted = self
        while fitted.shared_bytes(_MOST_BLOCKS) > shared_bytes and fitted.tuning.stages > 2:
            fitted = replace(fitted, tuning=replace(fitted.tuning, stages=fitted.tuning.stages - 1))
        return fitted

    def division(self, multiprocessors: int) -> tuple[int, int]:
        """Clusters, and blocks of each. A multiprocessor with fewer blocks than others is no loss, one with more is."""
        outputs = self.tile // 2 if self.epilogue == Epilogue.GATED else self.tile
        tiles, chunks = -(-self.rows // outputs), -(-self.columns // _CHUNK)
        most = min(_MOST_BLOCKS, chunks, 4 * self.tuning.groups, multiprocessors // tiles)
        if most > 1:
            return tiles, 1 << most.bit_length() - 1
        return -(-tiles // -(-tiles // multiprocessors)), 1

    def weight_tiling(self, weight: torch.Tensor) -> Tiling:
        pitch = 2 * self.columns
        if self.epilogue == Epilogue.GATED:
            sizes, strides = (self.columns, 8, 2, self.rows // 8), (pitch, self.rows * pitch, 8 * pitch)
            return Tiling(weight.data_ptr(), self.dtype, sizes, strides, (_CHUNK, 8, 2, self.tile // 16))
        return Tiling(weight.data_ptr(), self.dtype, (self.columns, self.rows), (pitch,), (_CHUNK, self.tile))

    def start(
        self, launcher: Launcher, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        tokens = x.shape[0]
        x_tiling = Tiling(x.data_ptr(), self.dtype, (self.columns, tokens), (2 * self.columns,), (_CHUNK, self.width))
        arguments = (
            launcher.tensor_map(self.weight_tiling(weight)),
            launcher.tensor_map(x_tiling),
            pointer(bias),
            pointer(out),
            ctypes.c_uint32(tokens),
            ctypes.c_uint32(self.columns),
            ctypes.c_uint32(self.rows),
        )
        clusters, cluster = self.division(launcher.multiprocessors)
        grid, threads = (clusters * cluster, 1, 1), 128 * self.tuning.groups + 32
        launcher.launch(self.kernel, grid, threads, self.shared_bytes(cluster), arguments, cluster)


def width_for(tokens: int) -> int | None:
    """Rows of the kernel that takes `tokens`, if one does."""
    return next((width for width in WIDTHS if MAX_TOKENS < tokens <= width), None)


@dataclass(frozen=True, slots=True)
class Normalization:
    """RMS norm of rows of one length."""

    columns: int
    dtype: torch.dtype

    @property
    def _warps(self) -> int:
        return min(8, -(-self.columns // 256))

    @property
    def kernel(self) -> Kernel:
        constants = {
            "BF16": int(self.dtype == torch.bfloat16),
            "EVICT_FIRST": 0,
            "WARPS": self._warps,
            "PIECES": -(-self.columns // (256 * self._warps)),
        }
        return Kernel("rms_norm", tuple(constants.items()))

    def start(self, launcher: Launcher, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        arguments = (pointer(x), pointer(weight), ctypes.c_float(eps), pointer(out), ctypes.c_uint32(self.columns))
        launcher.launch(self.kernel, (x.shape[0], 1, 1), 32 * self._warps, 64, arguments)
