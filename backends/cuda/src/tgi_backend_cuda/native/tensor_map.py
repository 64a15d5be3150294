"""Tensor maps: how Hopper's copying engine sees a tensor in memory, as the driver encodes them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

_BYTES = 128
_ALIGNMENT = 64
_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLE_128B = 3
_PROMOTION = 0


@dataclass(frozen=True, slots=True)
class Tiling:
    """A tensor of 16-bit numbers and the boxes that are copied of it; dimensions from the innermost outwards."""

    address: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    """Bytes, of all dimensions but the innermost, which is contiguous; multiples of 16."""
    box: tuple[int, ...]
    """At most 256 each; the innermost makes 128 bytes, which are swizzled. What is outside of `sizes` reads as zero."""


class TensorMap(ctypes.Structure):
    """What a kernel gets by value as ``__grid_constant__``: a recorded graph keeps it."""

    _fields_ = (("words", ctypes.c_uint64 * (_BYTES // 8)),)


@lru_cache(maxsize=8192)
def encode(tiling: Tiling) -> TensorMap:
    """By `cuTensorMapEncodeTiled`, once for equal tilings: nothing in it depends on what is in memory.

    Raises `RuntimeError` where the driver does not take it.
    """
    rank = len(tiling.sizes)
    buffer = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
    aligned = -(-ctypes.addressof(buffer) // _ALIGNMENT) * _ALIGNMENT
    error = _library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        ctypes.c_int(_TYPES[tiling.dtype]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(tiling.address),
        (ctypes.c_uint64 * rank)(*tiling.sizes),
        (ctypes.c_uint64 * max(1, rank - 1))(*tiling.strides),
        (ctypes.c_uint32 * rank)(*tiling.box),
        (ctypes.c_uint32 * rank)(*(1 for _ in tiling.sizes)),
        ctypes.c_int(0),  # not interleaved
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_PROMOTION),
        ctypes.c_int(0),  # zeros outside
    )
    if error:
        raise RuntimeError(f"CUDA, describing a tensor to the copying engine: error {error} for {tiling}")
    return TensorMap.from_buffer_copy(ctypes.string_at(aligned, _BYTES))


@lru_cache
def _library() -> Any:
    """The driver itself: `cuda.bindings` does not align its structure as the driver wants it."""
    return ctypes.CDLL("libcuda.so.1")
