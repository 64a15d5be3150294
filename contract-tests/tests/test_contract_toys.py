"""The toy engines keep the contract."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from tgi_contract_tests import BackendContract
from tgi_gateway.backend import Backend, Feature
from tgi_gateway.testing import EchoBackend, Script, ScriptedBackend, toy_model
from tgi_gateway.testing.scripted import SCRIPTED_CAPABILITIES

MODEL = toy_model(vocab_size=1000, eos_token_ids=(2,), max_total_tokens=256, max_sequences=4)


class TestEcho(BackendContract):
    backend = "echo"
    patience_s = 10.0
    end_prompt = (5, 6, 2, 7)

    def make(self) -> Backend:
        return EchoBackend(MODEL, step_s=0.0003)

    def kill(self, backend: Backend) -> None:
        assert isinstance(backend, EchoBackend)
        backend.submit(None)  # type: ignore[arg-type]


class TestScripted(BackendContract):
    backend = "scripted"
    patience_s = 10.0
    end_prompt = (5, 6)
    features: frozenset[Feature] = frozenset()
    known_failures: ClassVar[dict[str, str]] = {
        "test_tokens_come_in_the_order_of_generation": "a script begins anew, whatever the prompt says so far",
    }

    def make(self) -> Backend:
        scripts = [
            Script.of(11, 12, 13, prompt=(5, 6)),
            Script.of(prompt=(999, 999, 999), then="crash"),
            Script.of(prompt=(998, 998, 998), then="hang"),
            Script.of(*range(20, 60), then="repeat"),
        ]
        capabilities = replace(SCRIPTED_CAPABILITIES, features=SCRIPTED_CAPABILITIES.features | self.features)
        return ScriptedBackend(scripts, MODEL, step_s=0.0003, capabilities=capabilities, health_timeout_s=1.0)

    def kill(self, backend: Backend) -> None:
        backend.submit(self.request((999, 999, 999)))

    def hang(self, backend: Backend) -> None:
        backend.submit(self.request((998, 998, 998)))


class TestScriptedWithMoreFeatures(TestScripted):
    """A file may declare more features and vouch for them; then they are accepted, as a contract test notices."""

    features: frozenset[Feature] = frozenset({"sampling", "seed"})
    known_failures: ClassVar[dict[str, str]] = TestScripted.known_failures | {
        "test_different_seeds_give_different_tokens": "a script says the same whatever the seed",
    }
