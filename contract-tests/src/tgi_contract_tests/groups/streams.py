"""Tokens come as they are made, in order, and no faster than the gateway takes them."""

from __future__ import annotations

import time

import pytest

from tgi_contract_tests.base import ContractBase
from tgi_contract_tests.engine import Engine
from tgi_contract_tests.rules import demand


class Streams(ContractBase):
    def test_tokens_come_as_they_are_made(self, engine: Engine) -> None:
        first = len(engine.steps)
        answer = engine.run_one(self.request(self.prompt(engine), 48))
        request_id = answer.request.request_id
        steps = sum(request_id in step.request_ids for step in engine.steps[first:])
        demand(
            steps >= 3 or len(answer.tokens) < 6,
            "events",
            f"{len(answer.tokens)} tokens came in {steps} steps: a client would wait for all of them",
        )

    def test_tokens_come_in_the_order_of_generation(self, engine: Engine) -> None:
        """What was answered so far, as part of the prompt, is answered by the rest."""
        prompt = self.prompt(engine, 6, seed=11)
        whole = engine.run_one(self.request(prompt, 24))
        first = whole.tokens[: len(prompt)]
        if len(first) < len(prompt) or len(whole.tokens) < len(prompt) + 2:
            pytest.skip("the answer ended too early to be continued")
        longer = (*prompt, *(token.token_id for token in first))
        rest = engine.run_one(self.request(longer, 24 - len(first)))
        whole.tokens[:] = whole.tokens[len(first) :]
        self.check_same(whole, rest, "events", "the rest of an answer against the answer to its beginning")

    def test_a_slow_gateway_loses_nothing(self, engine: Engine) -> None:
        """Each emit takes its time; more requests than fit are open."""
        requests = [
            self.request(self.prompt(engine, 4 + seed, seed), 6 + seed)
            for seed in range(engine.model.max_sequences + 2)
        ]
        quick = engine.run(*requests)
        engine.on_emit = lambda _step: time.sleep(0.004)
        try:
            slow = engine.run(*(self.again(request) for request in requests))
        finally:
            engine.on_emit = None
        for one, other in zip(quick, slow, strict=True):
            self.check_served(other, "back-pressure")
            self.check_same(one, other, "back-pressure", "a quick gateway against a slow one")

    def test_an_engine_does_not_run_ahead_of_a_busy_gateway(self, engine: Engine) -> None:
        """While `emit` does not return, no more steps are made than may be under way: the rest would pile up."""
        running = engine.submit(self.long_request(engine))
        engine.wait_tokens(running, 1)
        with engine.held_emit(running):
            seen, ended = len(running.tokens), running.ended
            time.sleep(0.05)  # long enough to run ahead; an engine that is slower still goes unnoticed, no more
            engine.cancel(running.request.request_id)
        engine.wait_ended(running)
        if ended:
            pytest.skip("the engine is through before it can be held: raise max_total_tokens, by --set or in `options`")
        more = len(running.tokens) - seen - 1
        demand(
            more <= self.tokens_after_cancel,
            "back-pressure",
            f"{more} tokens lay ready when a busy gateway turned to them; {self.tokens_after_cancel} may be under way",
        )
