"""The device contract on a GPU: every kernel against the float32 reference, graphs against eager steps."""

from __future__ import annotations

import pytest
import torch

from tgi_contract_tests.device import DeviceContract
from tgi_model_server.device import Device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


class TestCudaDevice(DeviceContract):
    dtypes = ("bfloat16", "float16", "float32")

    def make_device(self) -> Device:
        from tgi_backend_cuda.device import CudaDevice

        return CudaDevice()
