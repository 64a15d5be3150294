"""Attention of rows with one new token, rotation and cache write included: how `attention.cu` is started."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tgi_backend_cuda.native.compile import Kernel
from tgi_backend_cuda.native.launch import Argument, Launcher, pointer
from tgi_model_server.device import HeadNorms

MAX_ROWS = 64
"""Rows that one launch attends for."""
_LOG2E = 1.4426950408889634
_TILE = 16
_MOST_SPLITS = 64


@dataclass(frozen=True, slots=True)
class AttentionTuning:
    """See `attention.cu`."""

    warps: int = 8
    stages: int = 2
    least: int = 8
    """Tiles of 16 keys that make another block worth its part in the reduction."""
    blocks: int = 1
    """Blocks for each multiprocessor that a step of long sequences is divided into, at most."""


_BY_SHARE = {1: AttentionTuning(8, 2), 2: AttentionTuning(4, 3), 3: AttentionTuning(4, 2), 4: AttentionTuning(2, 3)}
"""By the blocks that a multiprocessor has where no row is divided: all of them run at once, and fill its memory.
Measured on H200 with 9 to 64 rows of 640 to 4,000 keys, where others take up to twice the time.
"""


def tuning_for(pairs: int, multiprocessors: int) -> AttentionTuning:
    """For so many pairs of a row and a KV head."""
    return _BY_SHARE[min(max(_BY_SHARE), -(-pairs // multiprocessors))]


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Which keys the rows of a step have, on the device; contiguous. Fixed buffers, so that a graph can be replayed."""

    page_table: torch.Tensor
    """int32 [T, most pages of a row]"""
    kv_lens: torch.Tensor
    """int32 [T], the new token included; 0 for a row that is not there."""
    cache_slots: torch.Tensor
    """int32 [T]: page * page_size + offset of the new token."""


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """An attention layer's sizes."""

    kv_heads: int
    group: int
    """Query heads of a KV head."""
    head_dim: int
    page_size: int
    dtype: torch.dtype
    normed: bool
    tuning: AttentionTuning

    @property
    def kernel(self) -> Kernel:
        constants = {
            "BF16": int(self.dtype == torch.bfloat16),
            "HEAD_DIM": self.head_dim,
            "GROUP": self.group,
            "PAGE": self.page_size,
            "NORM": int(self.normed),
            "WARPS": self.tuning.warps,
            "STAGES": self.tuning.stages,
            "LEAST": self.tuning.least,
            "EVICT_FIRST": 0,
        }
        return Kernel("attention", tuple(constants.items()))

    def fitted(self, shared_bytes: int) -> DecodeShape:
        """With as many stages and then warps as a block's shared memory has room for."""
        fitted = self
        while fitted.shared_bytes(_MOST_SPLITS) > shared_bytes and fitted.tuning.warps > 1:
            tuning = fitted.tuning
            less = {"stages": tuning.stages - 1} if tuning.stages > 2 else {"warps": tuning.warps // 2}
            fitted = replace(self, tuning=replace(tuning, **less))
        return fitted

    def splits(self, rows: int, multiprocessors: int, longest: int) -> int:
        """Blocks that a row and KV head gets at most: as many as run at once, and as `longest` keys need."""
        wanted = self.tuning.blocks * multiprocessors // (rows * self.kv_heads)
        return max(1, min(wanted, -(-longest // (self.tuning.least * _TILE)), _MOST_SPLITS))

    def shared_bytes(self, splits: int) -> int:
        """As `attention` in `attention.cu` divides it."""
        warps, dim = self.tuning.warps, self.head_dim
        ring = warps * self.tuning.stages * 2 * _TILE * dim * 2
        heads = (self.group + 2) * dim * 2
        floats = warps * dim + warps * self.group * 2 + max(warps, splits) * self.group
        return -(-(ring + heads + 4 * floats + 4) // 16) * 16


class Attention:
    """Starts one shape's kernels; keeps what their blocks leave each other, for rows in any number up to `MAX_ROWS`.

    Launches on one stream only: the next one finds the counters as this one leaves them.
    """

    def __init__(self, launcher: Launcher, shape: DecodeShape, device: torch.device) -> None:
        self._launcher = launcher
        self._shape = shape
        # Fewer rows may have more splits, but never more parts than the chip has room for, and one for each pair.
        parts = MAX_ROWS * shape.kv_heads + shape.tuning.blocks * launcher.multiprocessors
        words = shape.group * shape.head_dim
        self._parts = torch.empty(parts * words, dtype=torch.float32, device=device)
        self._sums = torch.empty(parts * shape.group * 2, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(MAX_ROWS * shape.kv_heads, dtype=torch.int32, device=device)

    def __call__(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        rows: DecodeRows,
        *,
        scale: float,
        window: int | None,
        norms: HeadNorms | None,
        out: torch.Tensor,
    ) -> None:
        """Fill `out` [T, heads * head_dim]; see `NativeOps.rope_attention`."""
        shape = self._shape
        tokens = qkv.shape[0]
        assert tokens <= MAX_ROWS
        assert k_pool.stride() == v_pool.stride()
        assert k_pool.stride(3) == 1
        columns = rows.page_table.shape[1]
        splits = shape.splits(tokens, self._launcher.multiprocessors, columns * shape.page_size)
        half = cos.shape[1]
        assert 2 * half <= shape.head_dim
        q_norm, k_norm, eps = (norms.q_weight, norms.k_weight, norms.eps) if norms else (None, None, 0.0)
        arguments: Sequence[Argument] = (
            pointer(qkv),
            pointer(cos),
            pointer(sin),
            pointer(q_norm),
            pointer(k_norm),
            ctypes.c_float(eps),
            pointer(k_pool),
            pointer(v_pool),
            *(ctypes.c_uint64(k_pool.stride(dimension)) for dimension in range(3)),
            pointer(rows.page_table),
            ctypes.c_uint32(columns),
            pointer(rows.kv_lens),
            pointer(rows.cache_slots),
            pointer(out),
            pointer(self._parts),
            pointer(self._sums),
            pointer(self._arrived),
            ctypes.c_float(scale * _LOG2E),
            ctypes.c_uint32(window or 0),
            ctypes.c_uint32(half),
        )
        grid = (splits, shape.kv_heads, tokens)
        threads = 32 * shape.tuning.warps
        self._launcher.launch(shape.kernel, grid, threads, shape.shared_bytes(splits), arguments)


def supports_attention(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether a model's attention can run here: heads of 64 or 128, at most 8 of them to a KV head, and pages of the
    same 16-bit dtype.
    """
    return (
        head_dim in (64, 128)
        and heads % kv_heads == 0
        and heads // kv_heads <= 8
        and dtype in (torch.bfloat16, torch.float16)
        and kv_dtype == dtype
    )
