"""An adapter changes the requests that name it and no other; one that nobody loaded is refused."""

from __future__ import annotations

import pytest

from tgi_contract_tests.base import ContractBase
from tgi_contract_tests.engine import Answer, Engine
from tgi_contract_tests.rules import demand
from tgi_gateway.types import Failed, Request


class Loras(ContractBase):
    """Needs `adapter` on the class under test: a real adapter that changes greedy answers."""

    @pytest.mark.needs("lora")
    def test_an_adapter_changes_the_answer(self, engine: Engine) -> None:
        plain, adapted = (engine.run_one(request) for request in self._pair(engine))
        self.check_served(adapted, "lora")
        demand(plain.ids != adapted.ids, "lora", f"with and without the adapter: {plain.ids}")

    @pytest.mark.needs("lora")
    def test_an_adapter_reaches_no_other_request_of_the_batch(self, engine: Engine) -> None:
        plain, adapted = self._pair(engine)
        alone = [engine.run_one(request) for request in (plain, adapted)]
        mixed = [plain, adapted, plain, adapted]
        answers = self.together(engine, *(self.again(request) for request in mixed))
        engine.wait_ended(*answers)
        for at, answer in enumerate(answers):
            what = "with" if at % 2 else "without"
            self.check_same(alone[at % 2], answer, "lora", f"{what} the adapter, alone and in a mixed batch")

    @pytest.mark.needs("lora", "prefix_cache")
    def test_an_adapter_shares_no_prefix_with_the_model(self, engine: Engine) -> None:
        plain, adapted = self._pair(engine, engine.model.max_input_tokens * 3 // 4)
        alone = engine.run_one(self.again(adapted, cache_salt="adapter first"))
        engine.run_one(self.again(plain, cache_salt="model first"))
        after: Answer = engine.run_one(self.again(adapted, cache_salt="model first"))
        self.check_same(alone, after, "lora", "the adapter alone and after the model itself had the same prompt")
        demand(after.finished.usage.cached_tokens == 0, "lora", f"the model's own prefix was used: {after.finished}")

    @pytest.mark.needs("lora")
    def test_an_unknown_adapter_is_refused(self, engine: Engine) -> None:
        answer = engine.run_one(self.request(self.prompt(engine), adapter_id="nobody-loaded-this"))
        ending = answer.ending
        refused = isinstance(ending, Failed) and ending.error_type == "validation"
        demand(refused, "lora", f"an adapter that nobody loaded: {ending} after {len(answer.tokens)} tokens")

    def _pair(self, engine: Engine, length: int = 8) -> tuple[Request, Request]:
        """The same request of the model itself and of the adapter."""
        if self.adapter is None:
            pytest.skip("no LoRA adapter is named: tgi-contract --adapter NAME=PATH, or `adapter` of the test class")
        plain = self.request(self.prompt(engine, length, seed=31), 16)
        return plain, self.again(plain, adapter_id=self.adapter[0])
