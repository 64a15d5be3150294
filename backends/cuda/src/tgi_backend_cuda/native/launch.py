"""Starting compiled kernels on torch's current stream, each allowed to begin before the one ahead of it has ended."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tgi_backend_cuda.native.compile import Kernel, build, build_all
from tgi_gateway.errors import StartError

Argument = ctypes.c_void_p | ctypes.c_uint32 | ctypes.c_int64 | ctypes.c_float


class Launcher(Protocol):
    """What starts kernels; the tests have one that needs no GPU."""

    @property
    def multiprocessors(self) -> int: ...

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Blocks of `threads` with `shared_bytes` of dynamic shared memory, in stream order."""
        ...


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class CudaLauncher:
    """Compiles and loads a kernel when it is first wanted: so use each once before a graph is captured, or `load` it.

    With `overlap` (programmatic dependent launch) the blocks of a kernel start as soon as those of the kernel before
    it let them, and wait for its results themselves; chips before sm_90 know nothing of it.
    """

    def __init__(self, device: torch.device, *, overlap: bool = True, cache: Path | None = None) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._device = device
        self._cache = cache
        self._multiprocessors = int(properties.multi_processor_count)
        # Code for sm_90a may use all that the chip has; from sm_100 on the plain names do.
        self._arch = f"sm_{properties.major}{properties.minor}" + ("a" if properties.major == 9 else "")
        self._overlap = overlap and properties.major >= 9
        self._functions: dict[Kernel, Any] = {}
        self._modules: list[Any] = []

    @property
    def multiprocessors(self) -> int:
        return self._multiprocessors

    def load(self, kernels: Iterable[Kernel]) -> None:
        """Compile, several at a time, and load what is not there yet."""
        missing = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._functions]
        for kernel, code in build_all(missing, self._arch, self._cache).items():
            self._add(kernel, code)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        driver = _driver()
        function = self._functions.get(kernel)
        if function is None:
            function = self._add(kernel, build(kernel, self._arch, self._cache))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream(self._device).cuda_stream)
        if self._overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        values = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        _check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(values), 0), f"starting {kernel.name}")

    def _add(self, kernel: Kernel, code: bytes) -> Any:
        driver = _driver()
        what = f"loading {kernel.name}"
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().query()  # torch has made its context this thread's
            image = ctypes.create_string_buffer(code)
            (module,) = _check(driver.cuModuleLoadData(ctypes.addressof(image)), what)
            (function,) = _check(driver.cuModuleGetFunction(module, kernel.name.encode()), what)
            attribute = driver.CUfunction_attribute
            (static,) = _check(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function), what)
            limit = int(torch.cuda.get_device_properties(self._device).shared_memory_per_block_optin) - int(static)
            most = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(function, most, limit), what)
            # The same for all, since a multiprocessor must run empty before it divides its memory in another way.
            carveout = attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _check(driver.cuFuncSetAttribute(function, carveout, 100), what)
        self._modules.append(module)
        self._functions[kernel] = function
        return function


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as e:
        raise StartError(f"The CUDA kernels need the package cuda-bindings: {e}") from e
    return driver


def _check(result: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    error, *values = result
    if error != 0:
        raise RuntimeError(f"CUDA, {what}: {error.name}")
    return tuple(values)
