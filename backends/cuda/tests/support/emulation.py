"""The kernels as C++ on this machine: `EmulatedLauncher` starts what `CudaLauncher` would, on CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from tgi_backend_cuda.native.compile import Kernel
from tgi_backend_cuda.native.launch import Argument
from tgi_backend_cuda.native.tensor_map import TensorMap, Tiling

_HERE = Path(__file__).parent
_PRELUDE = (_HERE / "emulated.h").read_text()
_COMPILE = ("g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{_HERE}", "-x", "c++")


class EmulatedLauncher:
    """Each launch has another order of blocks and threads; the same `seed` gives the same orders."""

    def __init__(self, folder: Path, multiprocessors: int = 3, seed: int = 0) -> None:
        self.multiprocessors = multiprocessors
        self.shared_bytes = 227 * 1024
        self.hopper = True
        self._folder = folder
        self._seeds = itertools.count(seed)
        self._libraries: dict[Kernel, ctypes.CDLL] = {}

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        cluster: int = 1,
    ) -> None:
        assert shared_bytes % 16 == 0
        values = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        start = getattr(self._library(kernel), f"launch_{kernel.name}")
        start(*grid, threads, shared_bytes, cluster, next(self._seeds), values)

    def tensor_map(self, tiling: Tiling) -> TensorMap:
        """As `emulated.h` has it."""
        rank = len(tiling.sizes)
        padded = (*tiling.sizes, *(0 for _ in range(4 - rank)), *tiling.strides, *(0 for _ in range(4 - rank)))
        words = struct.pack("<9Q4I", tiling.address, rank, *padded, *tiling.box, *(1 for _ in range(4 - rank)))
        return TensorMap.from_buffer_copy(words.ljust(ctypes.sizeof(TensorMap), b"\0"))

    def guarded(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` behind whose end nothing may be read."""
        library = next(iter(self._libraries.values()), None) or self._library(Kernel("argmax", ()))
        library.guarded.restype = ctypes.c_void_p
        size = tensor.numel() * tensor.element_size()
        memory = (ctypes.c_char * size).from_address(library.guarded(ctypes.c_uint64(size)))
        copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    def _library(self, kernel: Kernel) -> ctypes.CDLL:
        if kernel not in self._libraries:
            source = kernel.source(_PRELUDE) + f"\nEMULATE({kernel.name})\n"
            file = self._folder / f"{kernel.name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.so"
            if not file.exists():
                command = [*_COMPILE, "-o", str(file), "-"]
                done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr[:5000]
            self._libraries[kernel] = ctypes.CDLL(str(file))
        return self._libraries[kernel]
