"""Starting compiled kernels on torch's current stream, each allowed to begin before the one ahead of it has ended."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from tgi_backend_cuda.native.compile import Kernel, build
from tgi_backend_cuda.native.tensor_map import TensorMap, Tiling, encode
from tgi_gateway.errors import StartError

Argument = ctypes.c_void_p | ctypes.c_uint32 | ctypes.c_uint64 | ctypes.c_float | ctypes.Structure


class Launcher(Protocol):
    """What starts kernels; the tests have one that needs no GPU."""

    @property
    def multiprocessors(self) -> int: ...

    @property
    def shared_bytes(self) -> int:
        """Of shared memory, that one block can have."""
        ...

    @property
    def hopper(self) -> bool:
        """Whether kernels may use what `hopper.cuh` has."""
        ...

    def tensor_map(self, tiling: Tiling) -> TensorMap: ...

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        cluster: int = 1,
    ) -> None:
        """Blocks of `threads` with `shared_bytes` of dynamic shared memory, in stream order; on Hopper perhaps in
        clusters of some blocks along the grid's first dimension.
        """
        ...


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class CudaLauncher:
    """Compiles and loads a kernel when it is first wanted, so use each once before a graph is captured; `prepare` says
    early which ones those will be.

    With `overlap` (programmatic dependent launch) the blocks of a kernel start as soon as those of the kernel before
    it let them, and wait for its results themselves; chips before sm_90 know nothing of it.
    """

    def __init__(self, device: torch.device, *, overlap: bool = True, cache: Path | None = None) -> None:
        driver = _driver()
        properties = torch.cuda.get_device_properties(device)
        self._device = device
        self._cache = cache
        # Code for sm_90a may use all that the chip has; from sm_100 on the plain names do.
        self._arch = f"sm_{properties.major}{properties.minor}" + ("a" if properties.major == 9 else "")
        self._overlap = overlap and properties.major >= 9
        self.hopper = properties.major == 9
        self.multiprocessors = int(properties.multi_processor_count)
        optin = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # torch has made its context this thread's
            (current,) = _check(driver.cuCtxGetDevice(), "asking for the device")
            (shared_bytes,) = _check(driver.cuDeviceGetAttribute(optin, current), "asking for its shared memory")
        self.shared_bytes = int(shared_bytes)
        self._builds: dict[Kernel, Future[bytes]] = {}
        self._functions: dict[Kernel, Any] = {}
        self._modules: list[Any] = []

    def prepare(self, kernels: Iterable[Kernel]) -> None:
        """Begin to compile `kernels` beside the caller's work, on all cores; `launch` waits for the one it needs."""
        missing = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._builds]
        if missing:
            pool = ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1), "nvrtc")
            self._builds |= {kernel: pool.submit(build, kernel, self._arch, self._cache) for kernel in missing}
            pool.shutdown(wait=False)  # once all are done

    def tensor_map(self, tiling: Tiling) -> TensorMap:
        return encode(tiling)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        cluster: int = 1,
    ) -> None:
        driver = _driver()
        function = self._functions.get(kernel) or self._load(kernel)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream(self._device).cuda_stream)
        names, attributes = driver.CUlaunchAttributeID, []
        if self._overlap:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        if cluster > 1:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attributes[-1].value.clusterDim
            size.x, size.y, size.z = cluster, 1, 1
        config.attrs, config.numAttrs = attributes, len(attributes)
        values = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        _check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(values), 0), f"starting {kernel.name}")

    def _load(self, kernel: Kernel) -> Any:
        self.prepare([kernel])
        image = ctypes.create_string_buffer(self._builds[kernel].result())
        driver, what = _driver(), f"loading {kernel.name}"
        attribute = driver.CUfunction_attribute
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().query()
            (module,) = _check(driver.cuModuleLoadData(ctypes.addressof(image)), what)
            (function,) = _check(driver.cuModuleGetFunction(module, kernel.name.encode()), what)
            most = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(function, most, self.shared_bytes), what)
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
