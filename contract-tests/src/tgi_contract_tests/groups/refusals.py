"""What is declared is accepted; the mirror: what is not declared is refused, never ignored."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tgi_contract_tests.base import ContractBase
from tgi_contract_tests.engine import Engine
from tgi_contract_tests.rules import demand
from tgi_gateway.backend import Feature, required_features
from tgi_gateway.types import Failed, Finished, Grammar, Request, SamplingParams, StopRules

USES: dict[Feature, dict[str, object]] = {
    "sampling": {"sampling": SamplingParams(do_sample=True)},
    "top_k": {"sampling": SamplingParams(do_sample=True, top_k=5)},
    "top_p": {"sampling": SamplingParams(do_sample=True, top_p=0.9)},
    "min_p": {"sampling": SamplingParams(do_sample=True, min_p=0.1)},
    "typical_p": {"sampling": SamplingParams(do_sample=True, typical_p=0.9)},
    "repetition_penalty": {"sampling": SamplingParams(repetition_penalty=1.3)},
    "frequency_penalty": {"sampling": SamplingParams(frequency_penalty=0.5)},
    "presence_penalty": {"sampling": SamplingParams(presence_penalty=0.5)},
    "logit_bias": {"sampling": SamplingParams(logit_bias=((1, 0.5),))},
    "watermark": {"sampling": SamplingParams(watermark=True)},
    "grammar": {"sampling": SamplingParams(grammar=Grammar("regex", "[0-9]+"))},
    "top_n_tokens": {"top_n_tokens": 2},
    "prefill_logprobs": {"prefill_logprobs": True},
    "prefill_top_n_tokens": {"prefill_logprobs": True, "prefill_top_n_tokens": 2},
    "ignore_eos": {"stop": StopRules(8, ignore_eos=True)},
    "min_new_tokens": {"stop": StopRules(8, min_new_tokens=2)},
    "stop_token_ids": {"stop": StopRules(8, stop_token_ids=(0,))},
    "lora": {"adapter_id": "contract-adapter"},
}
"""How a request uses each feature. `seed` and `logprobs` have no use of their own that could be refused."""
NEEDS_MATERIAL: tuple[Feature, ...] = ("lora", "grammar")
"""Declared, these need an adapter or a tokenizer: `Loras` and `Grammars` test them."""


class Refusals(ContractBase):
    @pytest.mark.parametrize("feature", USES)
    def test_an_undeclared_feature_is_refused(self, engine: Engine, feature: Feature) -> None:
        request = self._using(engine, feature)
        undeclared = required_features(request) - self.capabilities().features
        if not undeclared:
            pytest.skip(f"declared: `{feature}`")
        answer = engine.run_one(request)
        refused = isinstance(answer.ending, Failed) and answer.ending.error_type == "validation"
        demand(
            refused,
            "refusal",
            f"{', '.join(sorted(undeclared))} not declared; the request ended in {answer.ending} "
            f"after {len(answer.tokens)} tokens",
        )

    @pytest.mark.parametrize("feature", USES)
    def test_a_declared_feature_is_accepted(self, engine: Engine, feature: Feature) -> None:
        request = self._using(engine, feature)
        undeclared = required_features(request) - self.capabilities().features
        if undeclared:
            pytest.skip(f"not declared: {', '.join(f'`{each}`' for each in sorted(undeclared))}")
        if feature in NEEDS_MATERIAL:
            pytest.skip(f"`{feature}` has a group of its own")
        answer = engine.run_one(request)
        demand(isinstance(answer.ending, Finished), "refusal", f"`{feature}` is declared, but {answer.ending}")

    def test_more_top_tokens_than_declared_are_refused(self, engine: Engine) -> None:
        capabilities = self.capabilities()
        most = capabilities.max_top_n_tokens if "top_n_tokens" in capabilities.features else 0
        request = self.request(self.prompt(engine), top_n_tokens=most + 1)
        ending = engine.run_one(request).ending
        refused = isinstance(ending, Failed) and ending.error_type == "validation"
        demand(refused, "refusal", f"top_n_tokens {most + 1} of at most {most} ended in {ending}")

    def test_undeclared_logprobs_are_not_made_up(self, engine: Engine) -> None:
        if self.declares("logprobs"):
            pytest.skip("declared: `logprobs`")
        answer = engine.run_one(self.request(self.prompt(engine), logprobs=True))
        made_up = [token.logprob for token in answer.tokens if not math.isnan(token.logprob)]
        demand(not made_up, "refusal", f"`logprobs` is not declared, but tokens came with {made_up}")

    def _using(self, engine: Engine, feature: Feature) -> Request:
        """A request that uses the feature and, but for what sampling needs, no other."""
        plain = Request(0, self.prompt(engine), SamplingParams(), StopRules(8))
        return self.again(replace(plain, **USES[feature]))  # type: ignore[arg-type]
