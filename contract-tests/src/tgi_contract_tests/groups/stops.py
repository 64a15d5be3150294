"""When a request ends: length, end-of-sequence, stop tokens, and what holds them back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tgi_contract_tests.base import IN_A_CLASS, ContractBase
from tgi_contract_tests.engine import Answer, Engine
from tgi_contract_tests.rules import demand
from tgi_gateway.types import Finished, Request, StopRules


class Stops(ContractBase):
    def test_length_is_exact(self, engine: Engine) -> None:
        for length in (1, 2, 7):
            answer = engine.run_one(self.request(self.prompt(engine), length))
            self.check_served(answer, "stop-rules")
            ended_early = answer.finished.reason == "eos_token"
            demand(
                answer.finished.reason == "length" or (ended_early and not self.declares("ignore_eos")),
                "stop-rules",
                f"{length} tokens were asked for and {len(answer.tokens)} came; reason {answer.finished.reason}",
            )

    @pytest.mark.needs("stop_token_ids")
    def test_a_stop_token_ends_the_answer_and_is_its_last_token(self, engine: Engine) -> None:
        answer, at = self._greedy_with_new_token(engine)
        request = self._with_stop_token(answer.request, answer.ids[at])
        stopped = engine.run_one(request)
        self._check_ending(stopped, answer.ids[: at + 1], "stop_sequence", f"stop token {answer.ids[at]}")

    @pytest.mark.needs("stop_token_ids")
    def test_length_comes_before_a_stop_token(self, engine: Engine) -> None:
        answer, at = self._greedy_with_new_token(engine)
        request = self._with_stop_token(answer.request, answer.ids[at])
        request = replace(request, stop=replace(request.stop, max_new_tokens=at + 1))
        stopped = engine.run_one(request)
        self._check_ending(stopped, answer.ids[: at + 1], "length", f"stop token {answer.ids[at]} as the last allowed")

    @pytest.mark.needs("stop_token_ids", "ignore_eos")
    def test_ignore_eos_does_not_ignore_stop_tokens(self, engine: Engine) -> None:
        answer, at = self._greedy_with_new_token(engine)
        request = self._with_stop_token(answer.request, answer.ids[at])
        request = replace(request, stop=replace(request.stop, ignore_eos=True))
        stopped = engine.run_one(request)
        self._check_ending(
            stopped, answer.ids[: at + 1], "stop_sequence", f"stop token {answer.ids[at]} and ignore_eos"
        )

    @pytest.mark.needs("stop_token_ids", "min_new_tokens")
    def test_min_new_tokens_holds_stop_tokens_back(self, engine: Engine) -> None:
        answer, at = self._greedy_with_new_token(engine)
        token_id, least = answer.ids[at], at + 3
        request = self._with_stop_token(answer.request, token_id)
        held = engine.run_one(replace(request, stop=replace(request.stop, min_new_tokens=least)))
        demand(
            len(held.tokens) >= least and token_id not in held.ids[:least],
            "stop-rules",
            f"min_new_tokens {least}, stop token {token_id}: {held.ids}, {held.ending}",
        )

    def test_end_of_sequence_ends_the_answer_and_is_its_last_token(self, engine: Engine) -> None:
        answer = self._answer_with_end(engine)
        demand(
            answer.ids[-1] in engine.model.eos_token_ids and not set(answer.ids[:-1]) & set(engine.model.eos_token_ids),
            "stop-rules",
            f"{answer.ending} after {answer.ids}; eos_token_ids are {engine.model.eos_token_ids}",
        )

    def test_length_comes_before_end_of_sequence(self, engine: Engine) -> None:
        answer = self._answer_with_end(engine)
        stop = StopRules(len(answer.tokens))
        self._check_ending(
            engine.run_one(self.again(answer.request, stop=stop)), answer.ids, "length", "end-of-sequence as the last"
        )

    @pytest.mark.needs("ignore_eos")
    def test_ignore_eos_goes_on_to_the_full_length(self, engine: Engine) -> None:
        answer = self._answer_with_end(engine)
        length = len(answer.tokens) + 4
        longer = engine.run_one(self.again(answer.request, stop=StopRules(length, ignore_eos=True)))
        kept = len(longer.tokens) == length and longer.finished.reason == "length"
        demand(kept, "stop-rules", f"{length} tokens with ignore_eos: {longer.ids}, {longer.ending}")

    @pytest.mark.needs("min_new_tokens")
    def test_min_new_tokens_holds_end_of_sequence_back(self, engine: Engine) -> None:
        answer = self._answer_with_end(engine)
        least = len(answer.tokens) + 2
        held = engine.run_one(self.again(answer.request, stop=StopRules(32, min_new_tokens=least)))
        demand(
            len(held.tokens) >= least and not set(held.ids[:least]) & set(engine.model.eos_token_ids),
            "stop-rules",
            f"min_new_tokens {least}: {held.ids}, {held.ending}; eos_token_ids are {engine.model.eos_token_ids}",
        )

    def _greedy_with_new_token(self, engine: Engine) -> tuple[Answer, int]:
        """A greedy answer, and a place after its first token that holds a token for the first time."""
        for seed in range(8):
            answer = engine.run_one(self.request(self.prompt(engine, seed=seed), 16))
            ends = engine.model.eos_token_ids
            for at in range(1, len(answer.tokens) - 2):
                if answer.ids[at] not in answer.ids[:at] and answer.ids[at] not in ends:
                    return answer, at
        pytest.skip("the model repeats one token, whatever the prompt: nothing to stop at")

    def _answer_with_end(self, engine: Engine) -> Answer:
        """A greedy answer that ended in end-of-sequence, with no other stop rule than a length it did not reach."""
        if not engine.model.eos_token_ids:
            pytest.skip("the model has no end-of-sequence token")
        prompts = [self.end_prompt] if self.end_prompt else [self.prompt(engine, seed=seed) for seed in range(8)]
        for prompt in prompts:
            answer = engine.run_one(self.request(prompt, stop=StopRules(32)))
            if isinstance(answer.ending, Finished) and answer.ending.reason == "eos_token":
                return answer
            if set(answer.ids[:-1]) & set(engine.model.eos_token_ids):
                demand(False, "stop-rules", f"the answer went on after end-of-sequence: {answer.ids}, {answer.ending}")
        pytest.skip(f"no prompt was answered with end-of-sequence within 32 tokens: set `end_prompt` {IN_A_CLASS}")

    def _with_stop_token(self, request: Request, token_id: int) -> Request:
        return self.again(request, stop=replace(request.stop, stop_token_ids=(token_id,)))

    def _check_ending(self, answer: Answer, ids: list[int], reason: str, what: str) -> None:
        demand(
            answer.ids == ids and answer.finished.reason == reason,
            "stop-rules",
            f"{what}: {answer.ids}, {answer.ending}; expected were {ids} and `{reason}`",
        )
