"""Log-probabilities obey their identities, for generated tokens and for the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from tgi_contract_tests.base import ContractBase
from tgi_contract_tests.engine import Engine
from tgi_contract_tests.rules import demand
from tgi_gateway.types import Request, SamplingParams, Token

ROUNDING = 1e-3
"""Of float32 sums, and of exp."""


def check_one_per_token(values: Sequence[object], length: int, what: str = "log-probabilities") -> None:
    demand(len(values) == length, "logprobs", f"{len(values)} {what} for a prompt of {length} tokens")


class Logprobs(ContractBase):
    def _first_token(self, engine: Engine, request: Request) -> Token:
        answer = engine.run_one(request)
        self.check_served(answer, "logprobs")
        return answer.tokens[0]

    @pytest.mark.needs("logprobs")
    def test_logprobs_are_at_most_zero(self, engine: Engine) -> None:
        answer = engine.run_one(self.request(self.prompt(engine), 16, logprobs=True))
        for token in answer.tokens:
            demand(-math.inf < token.logprob <= ROUNDING, "logprobs", f"a log-probability is {token.logprob}")

    @pytest.mark.needs("logprobs", "top_n_tokens")
    def test_top_tokens_are_sorted_distinct_and_sum_to_at_most_one(self, engine: Engine) -> None:
        n = min(5, self.capabilities().max_top_n_tokens)
        answer = engine.run_one(self.request(self.prompt(engine), 16, logprobs=True, top_n_tokens=n))
        for token in answer.tokens:
            ids, logprobs = [each[0] for each in token.top], [each[1] for each in token.top]
            demand(len(set(ids)) == n, "logprobs", f"top_n_tokens is {n}, but `top` is {token.top}")
            demand(logprobs == sorted(logprobs, reverse=True), "logprobs", f"`top` is not sorted: {token.top}")
            total = sum(map(math.exp, logprobs))
            demand(total <= 1 + ROUNDING, "logprobs", f"probabilities of `top` add up to {total:.4f}: {token.top}")

    @pytest.mark.needs("logprobs", "top_n_tokens")
    def test_the_greedy_token_is_the_most_likely(self, engine: Engine) -> None:
        answer = engine.run_one(self.request(self.prompt(engine), 16, logprobs=True, top_n_tokens=1))
        for token in answer.tokens:
            best = token.top[0] if token.top else None
            demand(
                best is not None and best[1] - token.logprob <= ROUNDING,
                "logprobs",
                f"greedy chose {token.token_id} at {token.logprob}, but the most likely token is {best}",
            )
            demand(
                best is None or best[0] != token.token_id or abs(best[1] - token.logprob) <= ROUNDING,
                "logprobs",
                f"token {token.token_id} has log-probability {token.logprob}, and {best} in its own `top`",
            )

    @pytest.mark.needs("logprobs", "top_n_tokens")
    def test_logprobs_do_not_depend_on_how_the_token_is_chosen(self, engine: Engine) -> None:
        """The first token's distribution is the model's own, whatever temperature and penalties make of it."""
        choices = {"greedy": SamplingParams()}
        if self.declares("sampling"):
            choices["temperature 3"] = SamplingParams(do_sample=True, temperature=3.0, seed=1)
        if self.declares("repetition_penalty"):
            choices["repetition_penalty 5"] = SamplingParams(repetition_penalty=5.0)
        n = min(5, self.capabilities().max_top_n_tokens)
        prompt, allowed = self.prompt(engine, seed=21), max(ROUNDING, self.capabilities().tolerance)
        found = {
            name: dict(self._first_token(engine, self.request(prompt, 1, sampling, logprobs=True, top_n_tokens=n)).top)
            for name, sampling in choices.items()
        }
        for name, top in found.items():
            off = max((abs(top[each] - value) for each, value in found["greedy"].items() if each in top), default=0.0)
            same = off <= allowed and bool(top.keys() & found["greedy"].keys())
            demand(same, "logprobs", f"most likely first tokens: {found['greedy']} when greedy, {top} with {name}")

    @pytest.mark.needs("prefill_logprobs")
    def test_prompt_logprobs_are_one_per_token(self, engine: Engine) -> None:
        for length in (1, 2, engine.model.max_input_tokens):
            # Twice: a prompt in the prefix cache needs its log-probabilities all the same.
            for _ in range(2):
                prompt = self.prompt(engine, length)
                found = engine.run_one(self.request(prompt, 1, prefill_logprobs=True)).finished.prefill_logprobs
                check_one_per_token(found, length)
                demand(math.isnan(found[0]), "logprobs", f"the first token of a prompt has log-probability {found[0]}")
                wrong = [value for value in found[1:] if not -math.inf < value <= ROUNDING]
                demand(not wrong, "logprobs", f"log-probabilities of a prompt: {wrong[:4]}")

    def test_prompt_logprobs_come_only_when_asked_for(self, engine: Engine) -> None:
        found = engine.run_one(self.request(self.prompt(engine))).finished.prefill_logprobs
        demand(found == (), "logprobs", f"nobody asked for prompt log-probabilities: {found[:4]}")

    @pytest.mark.needs("logprobs", "prefill_logprobs")
    def test_prompt_logprobs_repeat_those_of_generation(self, engine: Engine) -> None:
        written = engine.run_one(self.request(self.prompt(engine), 12, logprobs=True))
        self.check_served(written, "logprobs")
        prompt = (*written.request.input_ids, *written.ids)
        read = engine.run_one(self.request(prompt, 1, prefill_logprobs=True)).finished.prefill_logprobs
        check_one_per_token(read, len(prompt))
        allowed = max(ROUNDING, self.capabilities().tolerance)
        for at, (token, value) in enumerate(zip(written.tokens, read[-len(written.tokens) :], strict=True)):
            demand(
                abs(token.logprob - value) <= allowed,
                "logprobs",
                f"token {at} had log-probability {token.logprob} when generated and {value} as part of a prompt",
            )

    @pytest.mark.needs("prefill_logprobs", "prefill_top_n_tokens")
    def test_top_tokens_of_a_prompt_agree_with_its_logprobs(self, engine: Engine) -> None:
        n = min(5, self.capabilities().max_top_n_tokens)
        for length in (1, 2, engine.model.max_input_tokens):
            asked = self.request(self.prompt(engine, length), 1, prefill_logprobs=True, prefill_top_n_tokens=n)
            told = engine.run_one(asked).finished
            top = told.prefill_top
            check_one_per_token(told.prefill_logprobs, length)
            check_one_per_token(top, length, "lists of top tokens")
            demand(top[0] == (), "logprobs", f"the first token of a prompt has top tokens: {top[0]}")
            positions = zip(asked.input_ids[1:], told.prefill_logprobs[1:], top[1:], strict=True)
            for token_id, logprob, best in positions:
                values = dict(best)
                demand(len(values) == n, "logprobs", f"prefill_top_n_tokens is {n}, but a token's are {best}")
                ranked = [value for _, value in best]
                demand(ranked == sorted(ranked, reverse=True), "logprobs", f"a prompt's top is not sorted: {best}")
                total = sum(map(math.exp, ranked))
                demand(total <= 1 + ROUNDING, "logprobs", f"probabilities add up to {total:.4f}: {best}")
                same = abs(values.get(token_id, logprob) - logprob) <= ROUNDING
                demand(same, "logprobs", f"token {token_id} has {logprob}, and {values.get(token_id)} in its own top")
                demand(
                    token_id in values or logprob <= ranked[-1] + ROUNDING,
                    "logprobs",
                    f"token {token_id} has {logprob} and is missing among the {n} most likely: {best}",
                )

    @pytest.mark.needs("top_n_tokens", "prefill_logprobs", "prefill_top_n_tokens")
    def test_top_tokens_of_a_prompt_repeat_those_of_generation(self, engine: Engine) -> None:
        n = min(5, self.capabilities().max_top_n_tokens)
        written = engine.run_one(self.request(self.prompt(engine), 12, logprobs=True, top_n_tokens=n))
        self.check_served(written, "logprobs")
        prompt = (*written.request.input_ids, *written.ids)
        asked = self.request(prompt, 1, prefill_logprobs=True, prefill_top_n_tokens=n)
        read = engine.run_one(asked).finished.prefill_top
        check_one_per_token(read, len(prompt), "lists of top tokens")
        allowed = max(ROUNDING, self.capabilities().tolerance)
        for at, (token, top) in enumerate(zip(written.tokens, read[-len(written.tokens) :], strict=True)):
            one, other = dict(token.top), dict(top)
            off = [abs(one[token_id] - other[token_id]) for token_id in one.keys() & other.keys()]
            same = bool(off) and max(off) <= allowed
            demand(same, "logprobs", f"token {at} had {token.top} when generated, {top} as part of a prompt")
