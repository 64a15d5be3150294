"""The llama.cpp backend keeps the contract, on the demo model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tgi_contract_tests import BackendContract
from tgi_gateway.backend import Backend
from tgi_gateway.hub import demo_model
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_model_server.runner import DeviceLost
from tgi_model_server.stepped import SteppedBackend

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: see `make test`")


class TestLlamaContract(BackendContract):
    backend = "llamacpp"
    options: ClassVar[dict[str, Any]] = {"extra": {"n_threads": 1}}
    # What the demo model says to a greeting is short.
    end_prompt = tuple(
        Tokenizer.from_folder(demo_model())
        .encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
        .ids
    )

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _model(cls, demo_gguf: Path) -> None:
        cls.model = demo_gguf

    def text_of(self, token_ids: Sequence[int]) -> str:
        return Tokenizer.from_folder(demo_model()).decode(list(token_ids))

    def kill(self, backend: Backend) -> None:
        assert isinstance(backend, SteppedBackend)
        assert backend._loaded is not None

        def lost(_plan: object) -> object:
            raise DeviceLost("pulled out by the test")

        backend._loaded.runner.run = lost  # type: ignore[method-assign, assignment]
