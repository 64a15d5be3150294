"""Reader: parts of a checkpoint's tensors into memory, by several threads, through a few buffers where need be.

Tensors in the host's memory that keep the file's dtype are read in place. All others go through staging buffers, which
some threads fill while the device empties others. Memory is bounded by these buffers.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tgi_model_server.weights.checkpoint import Checkpoint, Entry
from tgi_model_server.weights.uploads import Uploads

CHUNK_BYTES = 8 << 20
"""Of one read and one buffer: enough to keep a bus busy, few enough that a buffer's memory is soon free again."""
SMALL_BYTES = 256 << 10
"""Less than this is read by the calling thread: another one would take longer to wake up."""
MIN_THREADS, MAX_THREADS = 4, 16
"""Disks want several reads at a time however few cores there are; more copying threads do not speed up memory."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a tensor's bytes: `rows` pieces of `width` bytes in a file, `stride` bytes from one to the next."""

    file: Path
    dtype: torch.dtype
    offset: int
    rows: int
    stride: int
    width: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * self.width


def part_of(entry: Entry, dtype: torch.dtype, dim: int, start: int, size: int) -> Part:
    """What lies at ``start .. start + size`` along `dim` of a tensor."""
    inner = torch.Size(entry.shape[dim + 1 :]).numel() * dtype.itemsize
    rows, stride = torch.Size(entry.shape[:dim]).numel(), inner * (entry.shape[dim] if entry.shape else 1)
    return Part(entry.file, dtype, entry.begin + start * inner, rows, stride, size * inner)


class Reader:
    """One at a time, every `read` uses all threads. Made and used by the thread that loads."""

    def __init__(self, checkpoint: Checkpoint, uploads: Uploads, *, ranks: int = 1) -> None:
        """`ranks` read at the same time on this machine."""
        self._checkpoint = checkpoint
        self._uploads = uploads
        self._threads = min(max((os.cpu_count() or 1) // ranks, MIN_THREADS), MAX_THREADS)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="weights")
        # Half as many again as threads: those are being emptied.
        self._unmade = self._threads + self._threads // 2
        self._buffers: deque[_Buffer] = deque()
        """What is not being filled, emptied longest ago first."""

    def read(self, part: Part, target: torch.Tensor) -> Iterator[int]:
        """Fill `target`, which has the part's shape. Yields the bytes read so far; the last time, all are on their way.

        What the device does afterwards finds them there. Raises `ModelError`.
        """
        if part.width == part.stride and target.is_contiguous():
            part = Part(part.file, part.dtype, part.offset, 1, part.size, part.size)
        matrix = target.view(part.rows, -1)
        in_place = target.device.type == "cpu" and target.dtype is part.dtype
        done, under_way = 0, deque[_Piece]()
        for piece in _pieces(part, matrix):
            if in_place:
                host = _bytes_of(piece.target)
            else:
                if len(under_way) == self._threads:
                    done += self._arrived(under_way.popleft())
                    yield done
                piece.buffer = self._free_buffer()
                host = piece.buffer.memory.numpy()[: piece.size].reshape(piece.part.rows, -1)
            if piece.size < SMALL_BYTES:
                self._fetch(piece.part, host)
            else:
                piece.filled = self._pool.submit(self._fetch, piece.part, host)
            under_way.append(piece)
        while under_way:
            done += self._arrived(under_way.popleft())
            yield done
        self._uploads.settle()

    def close(self) -> None:
        """Everything that was read is where it belongs."""
        self._pool.shutdown()
        for buffer in self._buffers:
            buffer.emptied()
        self._buffers.clear()

    def _fetch(self, part: Part, host: np.ndarray) -> None:
        """The bytes of `part` into `host`, uint8 [rows, width]."""
        if part.rows == 1:
            self._checkpoint.read(part.file, part.offset, memoryview(host[0]))
            return
        mapped = self._checkpoint.map(part.file)
        begin = part.offset // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_WILLNEED"):
            mapped.madvise(mmap.MADV_WILLNEED, begin, part.offset - begin + (part.rows - 1) * part.stride + part.width)
        source: np.ndarray = np.ndarray(host.shape, np.uint8, mapped, part.offset, (part.stride, 1))
        np.copyto(host, source)

    def _arrived(self, piece: _Piece) -> int:
        """Send the piece on, once its bytes are here; returns how many these are."""
        if piece.filled is not None:
            piece.filled.result()
        if piece.buffer is not None:
            source = piece.buffer.memory[: piece.size].view(piece.part.dtype).view(piece.target.shape)
            piece.buffer.emptied = self._uploads.copy(source, piece.target)
            self._buffers.append(piece.buffer)
        return piece.size

    def _free_buffer(self) -> _Buffer:
        if self._unmade:
            self._unmade -= 1
            return _Buffer(self._uploads.staging(CHUNK_BYTES))
        buffer = self._buffers.popleft()
        buffer.emptied()
        return buffer


@dataclass(slots=True)
class _Buffer:
    memory: torch.Tensor
    emptied: Callable[[], None] = lambda: None
    """Waits until the device has read it."""


@dataclass(slots=True)
class _Piece:
    """What one thread reads at a time."""

    part: Part
    target: torch.Tensor
    """[rows, numbers of a row]"""
    buffer: _Buffer | None = None
    filled: Future[None] | None = None

    @property
    def size(self) -> int:
        return self.part.size


def _pieces(part: Part, matrix: torch.Tensor) -> Iterator[_Piece]:
    """`part` in pieces that fit a buffer. `matrix` is its target, [rows, numbers of a row]."""
    if part.rows > 1 and part.width <= CHUNK_BYTES:
        count = CHUNK_BYTES // part.width
        for row in range(0, part.rows, count):
            rows = min(count, part.rows - row)
            offset = part.offset + row * part.stride
            yield _Piece(Part(part.file, part.dtype, offset, rows, part.stride, part.width), matrix[row : row + rows])
        return
    numbers = CHUNK_BYTES // part.dtype.itemsize
    for row in range(part.rows):
        for column in range(0, matrix.shape[1], numbers):
            target = matrix[row : row + 1, column : column + numbers]
            width = target.shape[1] * part.dtype.itemsize
            offset = part.offset + row * part.stride + column * part.dtype.itemsize
            yield _Piece(Part(part.file, part.dtype, offset, 1, width, width), target)


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a host tensor [rows, numbers], uint8 [rows, bytes]."""
    array: np.ndarray = tensor.view(torch.uint8).numpy()
    return array
