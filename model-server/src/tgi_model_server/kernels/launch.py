"""What launching needs: sizes of tiles, whether kernels are compiled or interpreted, and compiling alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl

LOG2E: Final = 1.4426950408889634
SMALLEST_DOT: Final = 16
"""Rows, columns and sums that a matrix unit takes at least."""
_HEAD_BYTES = 256
"""Of a head that `Tuning` is for."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Tile sizes and depths of the attention kernels, for heads of 128 16-bit numbers; larger ones get smaller tiles.

    Devices choose their own; AMD's chips have shared memory for two stages.
    """

    decode_keys: int = 64
    """Keys that a decode program loads at a time."""
    decode_warps: int = 4
    shared_queries: int = 64
    """Rows of a tile that reads keys shared by several sequences: sequences times the heads that share a KV head."""
    decode_stages: int = 3
    """Depth of the software pipeline; each stage holds one tile of keys and one of values in shared memory."""
    shared_keys: int = 8192
    """Keys that several sequences' rows need not read, in all, for the one more launch a layer to pay."""
    lonely_keys: int = 4096
    """Keys before a prompt's new tokens that pay for the same launch where prompts are too few to fill the chip."""
    prefill_queries: int = 128
    """Rows of a prefill tile: tokens times the heads that share a KV head."""
    prefill_keys: int = 64
    prefill_warps: int = 8
    prefill_stages: int = 3
    max_splits: int = 32
    """Most programs that share one row of decode attention."""
    split_keys: int = 256
    """Keys that make another split worth its reduction."""


_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """`kernel` over `grid`, in stream order; in `compiling` nothing runs."""
    if _compiles_only.get():
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


@contextmanager
def compiling() -> Iterator[None]:
    """Kernels that this thread starts here are compiled instead, on all cores, and ready behind it. Tensors may be of
    any device, "meta" included: only their dtypes and alignment matter.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1, "triton") as pool, triton.AsyncCompileMode(pool):
        before = _compiles_only.set(True)
        try:
            yield
        finally:
            _compiles_only.reset(before)


@triton.jit
def _probe():
    tl.program_id(0)


def interpreted() -> bool:
    """Kernels run in Triton's interpreter, which gets products of 16-bit numbers wrong: widen them first."""
    return not isinstance(_probe, triton.runtime.JITFunction)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`: tiles have such sizes."""
    return 1 << max(0, size - 1).bit_length()


def shrink(head_dim: int, dtype: torch.dtype) -> int:
    """By what to divide a tile's rows, so that it fits shared memory and registers. float32 needs twice the registers
    that its size says: its products are summed without matrix units.
    """
    factor = max(1, power_of_two(head_dim) * dtype.itemsize // _HEAD_BYTES)
    return factor * 2 if dtype.itemsize > 2 else factor


def warps_for(elements: int) -> int:
    """Warps for a tile that is read once: about 8 numbers for each thread, at most 16 warps."""
    return max(1, min(16, power_of_two(elements) // 256))
