"""Registers the CUDA backend. Imports nothing heavy: listing backends must not load torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec

from tgi_gateway.backend import ALL_FEATURES, Backend, BackendPlugin, Capabilities, Check, EngineOptions
from tgi_gateway.hooks import hookimpl

CAPABILITIES = Capabilities(
    features=ALL_FEATURES - {"lora"},
    prefix_cache=True,
    # The matrix library chooses its kernels by the number of rows, and they round differently.
    batch_invariant=False,
    tolerance=0.1,
)


def create(options: EngineOptions) -> Backend:
    """The torch engine on this machine's first GPUs, one per shard."""
    from tgi_backend_cuda.device import CudaDevice
    from tgi_model_server.backend import TorchBackend

    return TorchBackend(CudaDevice, options, CAPABILITIES)


def missing() -> str | None:
    for module in ("torch", "triton"):
        if find_spec(module) is None:
            return f"{module} is not installed: pip install 'tgi-gateway[cuda]'"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "the NVIDIA driver (libcuda.so.1) was not found: install it, or pass the GPU to the container"
    return None


def checks() -> Sequence[Check]:
    """For `tgi-gateway doctor cuda`."""
    from tgi_backend_cuda.checks import checks as all_checks

    return all_checks()


@hookimpl
def tgi_backend() -> BackendPlugin:
    return BackendPlugin("cuda", "PyTorch on NVIDIA GPUs", CAPABILITIES, create, missing, checks=checks)
