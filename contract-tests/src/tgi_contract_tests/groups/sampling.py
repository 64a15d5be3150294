"""The same request gives the same tokens; declared sampling parameters do what they say."""

from __future__ import annotations

import pytest

from tgi_contract_tests.base import ContractBase
from tgi_contract_tests.engine import Answer, Engine
from tgi_contract_tests.rules import demand
from tgi_gateway.types import SamplingParams

TIE = 0.01
"""Tokens whose log-probabilities differ by less may be drawn for each other, also at a temperature of a thousandth."""


class Sampling(ContractBase):
    def _answer(self, engine: Engine, sampling: SamplingParams | None = None, length: int = 24) -> Answer:
        answer = engine.run_one(self.request(self.prompt(engine), length, sampling))
        self.check_served(answer, "sampling")
        return answer

    def test_a_greedy_request_gives_the_same_tokens_again(self, engine: Engine) -> None:
        self.check_same(self._answer(engine), self._answer(engine), "determinism", "twice the same greedy request")

    @pytest.mark.needs("sampling", "seed")
    def test_the_same_seed_gives_the_same_tokens(self, engine: Engine) -> None:
        for seed in (0, 1, 2**64 - 1):
            drawn = [self._answer(engine, SamplingParams(do_sample=True, temperature=1.5, seed=seed)) for _ in range(2)]
            self.check_same(drawn[0], drawn[1], "sampling", f"twice with seed {seed}")

    @pytest.mark.needs("sampling", "seed")
    def test_different_seeds_give_different_tokens(self, engine: Engine) -> None:
        answers = {
            tuple(self._answer(engine, SamplingParams(do_sample=True, temperature=2.0, seed=seed)).ids)
            for seed in range(4)
        }
        demand(len(answers) > 1, "sampling", f"seeds 0 to 3 at temperature 2 all gave {answers.pop()}")

    @pytest.mark.needs("sampling")
    def test_a_low_temperature_is_greedy(self, engine: Engine) -> None:
        self._check_greedy(engine, SamplingParams(do_sample=True, temperature=1e-3), "temperature 0.001")

    @pytest.mark.needs("sampling", "top_k")
    def test_top_k_of_one_is_greedy(self, engine: Engine) -> None:
        self._check_greedy(engine, SamplingParams(do_sample=True, temperature=2.0, top_k=1), "top_k 1")

    @pytest.mark.needs("sampling", "top_p")
    def test_a_tiny_top_p_is_greedy(self, engine: Engine) -> None:
        self._check_greedy(engine, SamplingParams(do_sample=True, temperature=2.0, top_p=1e-6), "top_p 0.000001")

    @pytest.mark.needs("sampling", "min_p")
    def test_min_p_of_nearly_one_is_greedy(self, engine: Engine) -> None:
        self._check_greedy(engine, SamplingParams(do_sample=True, temperature=1.0, min_p=0.9999), "min_p 0.9999")

    @pytest.mark.needs("frequency_penalty")
    def test_a_large_frequency_penalty_never_repeats_a_token(self, engine: Engine) -> None:
        self._check_distinct(engine, SamplingParams(frequency_penalty=1e4), "frequency_penalty 10000")

    @pytest.mark.needs("presence_penalty")
    def test_a_large_presence_penalty_never_repeats_a_token(self, engine: Engine) -> None:
        self._check_distinct(engine, SamplingParams(presence_penalty=1e4), "presence_penalty 10000")

    @pytest.mark.needs("repetition_penalty")
    def test_a_large_repetition_penalty_avoids_prompt_and_output(self, engine: Engine) -> None:
        answer = self._check_distinct(engine, SamplingParams(repetition_penalty=1e4), "repetition_penalty 10000")
        again = set(answer.ids) & set(answer.request.input_ids)
        demand(not again, "sampling", f"repetition_penalty 10000: tokens {sorted(again)} of the prompt came again")

    @pytest.mark.needs("logit_bias")
    def test_a_large_logit_bias_forces_its_token(self, engine: Engine) -> None:
        token_id = self.prompt(engine, 1, seed=5)[0]
        answer = self._answer(engine, SamplingParams(logit_bias=((token_id, 1e4),)), 4)
        demand(set(answer.ids) == {token_id}, "sampling", f"logit_bias +10000 on {token_id} gave {answer.ids}")

    def _check_greedy(self, engine: Engine, sampling: SamplingParams, what: str) -> None:
        """But for tokens that are as likely: which of them is drawn is nobody's fault, and what follows differs."""
        greedy, drawn = self._answer(engine), self._answer(engine, sampling)
        for at, (one, other) in enumerate(zip(greedy.tokens, drawn.tokens, strict=False)):
            if one.token_id != other.token_id and abs(one.logprob - other.logprob) < TIE:
                greedy.tokens[at:], drawn.tokens[at:] = [], []
                break
        self.check_same(greedy, drawn, "sampling", f"greedy and {what}")

    def _check_distinct(self, engine: Engine, sampling: SamplingParams, what: str) -> Answer:
        answer = self._answer(engine, sampling, 12)
        demand(len(set(answer.ids)) == len(answer.ids), "sampling", f"{what}: a token came twice in {answer.ids}")
        return answer


class Isolation(ContractBase):
    def test_greedy_tokens_do_not_depend_on_the_batch(self, engine: Engine) -> None:
        self._check_batch(engine, [None] * 5)

    @pytest.mark.needs("sampling", "seed")
    def test_sampled_tokens_do_not_depend_on_the_batch(self, engine: Engine) -> None:
        self._check_batch(engine, [SamplingParams(do_sample=True, temperature=1.5, seed=seed) for seed in range(5)])

    @pytest.mark.needs("repetition_penalty", "frequency_penalty")
    def test_penalties_do_not_reach_the_neighbours(self, engine: Engine) -> None:
        self._check_batch(
            engine, [None, SamplingParams(repetition_penalty=2.0), None, SamplingParams(frequency_penalty=2.0)]
        )

    def _check_batch(self, engine: Engine, samplings: list[SamplingParams | None]) -> None:
        """Each request of its own length, alone and then all at once."""
        requests = [
            self.request(self.prompt(engine, 3 + 5 * at, at), 12, sampling) for at, sampling in enumerate(samplings)
        ]
        alone = [engine.run_one(request) for request in requests]
        together = self.together(engine, *(self.again(request) for request in requests))
        engine.wait_ended(*together)
        for one, other in zip(alone, together, strict=True):
            self.check_served(other, "isolation")
            self.check_same(one, other, "isolation", "alone and in a batch")
