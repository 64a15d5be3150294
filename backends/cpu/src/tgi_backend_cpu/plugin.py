"""Registers the CPU backend. Imports nothing heavy: listing backends must not load torch."""

from __future__ import annotations

from importlib.util import find_spec

from tgi_gateway.backend import ALL_FEATURES, Backend, BackendPlugin, Capabilities, Check, EngineOptions
from tgi_gateway.hooks import hookimpl
from tgi_model_server.machine import rounds_alike

_EXACT = rounds_alike()
CAPABILITIES = Capabilities(
    features=ALL_FEATURES - {"lora"},
    prefix_cache=True,
    batch_invariant=_EXACT,
    tolerance=0.0 if _EXACT else 0.05,
)


def create(options: EngineOptions) -> Backend:
    """The torch engine on this machine's cores."""
    from tgi_backend_cpu.device import CpuDevice
    from tgi_model_server.backend import TorchBackend

    return TorchBackend(CpuDevice, options, CAPABILITIES)


def missing() -> str | None:
    if find_spec("torch") is None:
        return "torch is not installed: pip install 'tgi-gateway[cpu]'"
    return None


def checks() -> list[Check]:
    """What decides how fast it is here."""
    import torch

    from tgi_model_server import machine

    available, total = (f"{size / 2**30:.1f} GiB" for size in (machine.available_bytes(), machine.total_bytes()))
    return [
        Check("instructions", torch.backends.cpu.get_cpu_capability()),
        Check("cores", f"{machine.usable_cores()} for the engine"),
        Check("memory", f"{available} available of {total}"),
    ]


@hookimpl
def tgi_backend() -> BackendPlugin:
    return BackendPlugin("cpu", "PyTorch on CPU cores: the reference", CAPABILITIES, create, missing, checks=checks)
