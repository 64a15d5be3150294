"""The CPU backend and its device keep their contracts, on a small random Llama."""

from __future__ import annotations

from typing import ClassVar, NoReturn

import pytest

from tgi_backend_cpu.device import CpuDevice
from tgi_contract_tests import BackendContract
from tgi_contract_tests.device import DeviceContract
from tgi_gateway.backend import Backend
from tgi_model_server.backend import TorchBackend
from tgi_model_server.device import Device
from tgi_model_server.step import DeviceLost
from tgi_model_server.testing.models import SMALL, save_ascii_tokenizer, save_random_model

# With one token in ten an end of sequence, greedy answers do end.
CONFIG = {**SMALL, "eos_token_id": list(range(0, SMALL["vocab_size"], 10))}


class TestCpuContract(BackendContract):
    backend = "cpu"
    options: ClassVar[dict[str, str]] = {"dtype": "float32"}

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _model(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.model = save_random_model(tmp_path_factory.mktemp("model"), CONFIG)
        save_ascii_tokenizer(cls.model, CONFIG["vocab_size"], CONFIG["eos_token_id"])

    def kill(self, backend: Backend) -> None:
        assert isinstance(backend, TorchBackend)
        assert backend._engine is not None
        backend._engine.run = _lost  # type: ignore[assignment]


def _lost(_plan: object) -> NoReturn:
    raise DeviceLost("pulled out by the test")


class TestCpuDeviceContract(DeviceContract):
    def make_device(self) -> Device:
        return CpuDevice(threads=1)
