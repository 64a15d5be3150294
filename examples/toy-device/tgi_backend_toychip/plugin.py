"""Registers the toy chip. Imports nothing heavy: every process of the gateway loads this module."""

from importlib.util import find_spec

from tgi_gateway.backend import ALL_FEATURES, Backend, BackendPlugin, Capabilities, EngineOptions
from tgi_gateway.hooks import hookimpl

CAPABILITIES = Capabilities(
    features=ALL_FEATURES - {"lora", "grammar"}, prefix_cache=True, batch_invariant=False, tolerance=0.02
)


def create(options: EngineOptions) -> Backend:
    from tgi_backend_toychip.device import ToyDevice
    from tgi_model_server.backend import TorchBackend

    return TorchBackend(ToyDevice, options, CAPABILITIES)


def missing() -> str | None:
    return None if find_spec("torch") else "torch is not installed: pip install torch"


@hookimpl
def tgi_backend() -> BackendPlugin:
    return BackendPlugin("toychip", "a chip that does not exist: an example", CAPABILITIES, create, missing)
