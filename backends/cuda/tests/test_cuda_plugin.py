"""The plug-in without a GPU: it is listed, says what is missing, and loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tgi_backend_cuda.plugin import missing
from tgi_gateway import plugins

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_the_plugin_is_found_and_declares_what_it_can_do() -> None:
    plugin = plugins.load("cuda")
    assert "grammar" in plugin.capabilities.features
    assert "lora" not in plugin.capabilities.features


def test_listing_the_plugin_loads_neither_torch_nor_triton() -> None:
    code = "import sys, tgi_backend_cuda.plugin; sys.exit(any(m in sys.modules for m in ('torch', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@WITHOUT_GPU
def test_without_a_driver_the_reason_and_the_way_out_are_told() -> None:
    reason = missing()
    assert reason is None or "libcuda" in reason


@WITHOUT_GPU
def test_without_a_gpu_the_device_says_so() -> None:
    from tgi_backend_cuda.device import CudaDevice
    from tgi_gateway.errors import StartError

    with pytest.raises(StartError, match="no NVIDIA GPU"):
        CudaDevice()
