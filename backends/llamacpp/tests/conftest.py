"""The demo model as GGUF, and who needs llama.cpp itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgi_backend_llamacpp.convert import convert
from tgi_gateway.hub import demo_model


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in one file, its weights in float16."""
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    convert(demo_model(), path, "f16")
    return path
