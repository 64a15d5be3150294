"""Registers the llama.cpp backend. Imports nothing heavy: listing backends must not load native code."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tgi_backend_llamacpp.options import FLAGS
from tgi_gateway.backend import (
    ALL_FEATURES,
    Backend,
    BackendPlugin,
    Capabilities,
    Check,
    EngineOptions,
    ModelFiles,
)
from tgi_gateway.hooks import hookimpl

CAPABILITIES = Capabilities(
    features=ALL_FEATURES - {"watermark"},
    prefix_cache=True,
    # Its kernels add up in another order for one row than for several.
    batch_invariant=False,
    tolerance=0.1,
)


def create(options: EngineOptions) -> Backend:
    """llama.cpp in this process."""
    from tgi_backend_llamacpp.engine import LlamaBackend

    return LlamaBackend(options, CAPABILITIES)


def prepare(options: EngineOptions, folder: Path) -> ModelFiles:
    """A GGUF file and the folder of its tokenizer, made where they are not there."""
    from tgi_backend_llamacpp.prepare import prepare as prepare_model

    return prepare_model(options, folder)


def convert(source: Path, target: Path, kind: str | None) -> None:
    """A safetensors model of the Llama family as a GGUF file."""
    from tgi_backend_llamacpp.convert import convert as convert_model

    convert_model(source, target, kind)


def missing() -> str | None:
    if find_spec("llama_cpp") is None:
        return (
            "llama-cpp-python is not installed; it is compiled when it is installed, which needs a C++ compiler: "
            "pip install 'tgi-gateway[llamacpp]'"
        )
    return None


def checks() -> Sequence[Check]:
    """For `tgi-gateway doctor llamacpp`."""
    from tgi_backend_llamacpp.checks import checks as all_checks

    return all_checks()


@hookimpl
def tgi_backend() -> BackendPlugin:
    return BackendPlugin(
        "llamacpp",
        "llama.cpp: GGUF models on CPU cores and on its GPUs",
        CAPABILITIES,
        create,
        missing,
        FLAGS,
        prepare=prepare,
        weights=("gguf", "safetensors"),
        converters={"gguf": convert},
        api_version=1,
        checks=checks,
    )
