"""A cancel ends its request, gives back what it held, and disturbs nobody."""

from __future__ import annotations

import pytest

from tgi_contract_tests.base import ContractBase
from tgi_contract_tests.engine import Answer, Engine
from tgi_contract_tests.rules import demand
from tgi_gateway.types import Finished, StepEvents


class Cancels(ContractBase):
    def test_cancel_of_a_running_request_frees_its_capacity(self, engine: Engine) -> None:
        self._cancel_running(engine)
        engine.wait_whole("cancel", "after the cancel of a running request")

    def test_a_cancelled_request_ends_as_cancelled(self, engine: Engine) -> None:
        answer, _ = self._cancel_running(engine)
        self._check_cancelled(answer)

    def test_no_more_than_the_steps_under_way_follow_a_cancel(self, engine: Engine) -> None:
        answer, seen = self._cancel_running(engine)
        more = len(answer.tokens) - seen
        demand(
            more <= self.tokens_after_cancel,
            "cancel",
            f"{more} tokens came after `cancel` had returned; {self.tokens_after_cancel} may be under way",
        )

    def test_capacity_is_back_within_the_steps_under_way(self, engine: Engine) -> None:
        """Counted in the steps of a neighbour, from the one that tells the end of the cancelled request."""
        if engine.model.max_sequences < 2:
            pytest.skip("the engine runs one request at a time")
        victim, beside = self.long_request(engine, 5), self.long_request(engine, 6)
        running = engine.submit(beside)
        cancelled = engine.submit(victim)
        engine.wait_tokens(cancelled, 2)
        free: list[int] = []

        def look(step: StepEvents) -> None:
            if free or any(each.request_id == victim.request_id for each in step.finished):
                free.append(engine.backend.capacity().free_sequences)

        engine.on_emit = look
        try:
            engine.cancel(victim.request_id)
            engine.wait_ended(cancelled, rule="cancel")
            seen = len(running.tokens)
            engine.wait_tokens(running, seen + 2 * self.tokens_after_cancel + 2)
            was_running = not running.ended
            engine.cancel(beside.request_id)
            engine.wait_ended(running, rule="cancel")
        finally:
            engine.on_emit = None
        wanted = engine.model.max_sequences - 1
        late = next((at for at, count in enumerate(free) if count >= wanted), len(free))
        demand(
            late <= self.tokens_after_cancel or not was_running,
            "cancel",
            f"free sequences in the steps after a cancelled request had ended: {free[:20]}; {wanted} should be free",
        )

    def test_cancel_before_the_first_token_frees_its_capacity(self, engine: Engine) -> None:
        prompt = self.prompt(engine, engine.model.max_input_tokens - 8)
        answer = engine.submit(self.request(prompt))
        engine.cancel(answer.request.request_id)
        engine.wait_ended(answer, rule="cancel")
        engine.wait_whole("cancel", "after a cancel right behind its `submit`")

    def test_cancel_of_a_waiting_request_ends_it(self, engine: Engine) -> None:
        running = [engine.submit(self.long_request(engine, seed)) for seed in range(engine.model.max_sequences)]
        waiting = engine.submit(self.long_request(engine, 99))
        engine.wait_tokens(running[0], 1)
        engine.cancel(waiting.request.request_id)
        engine.wait_ended(waiting, rule="cancel")
        for answer in running:
            engine.cancel(answer.request.request_id)
        engine.wait_ended(*running, rule="cancel")
        engine.wait_whole("cancel", "after the cancel of waiting and running requests")

    def test_cancel_of_an_unknown_or_ended_request_is_ignored(self, engine: Engine) -> None:
        ended = engine.run_one(self.request(self.prompt(engine)))
        endings = len(ended.endings)
        beside = engine.submit(self.request(self.prompt(engine), 16))
        engine.cancel(2**63)
        engine.cancel(ended.request.request_id)
        engine.wait_ended(beside, rule="cancel")
        self.check_served(beside, "cancel")
        strange = [event for event in engine.strangers if event.request_id == 2**63]
        demand(not strange, "cancel", f"the cancel of an unknown id was answered by {strange}")
        more = ended.endings[endings:]
        demand(not more, "cancel", f"the cancel of an ended request was answered by {more}")

    def test_a_cancel_leaves_the_others_alone(self, engine: Engine) -> None:
        request = self.request(self.prompt(engine, seed=3), 24)
        alone = engine.run_one(request)
        cancelled = engine.submit(self.long_request(engine, 4))
        beside = engine.submit(self.again(request))
        engine.wait_tokens(beside, 2)
        engine.cancel(cancelled.request.request_id)
        engine.wait_ended(cancelled, beside, rule="cancel")
        self.check_same(alone, beside, "isolation", "alone and next to a cancelled request")

    def test_a_storm_of_cancels_ends_them_all_and_frees_everything(self, engine: Engine) -> None:
        answers: list[Answer] = []
        for wave in range(4):
            answers += [
                engine.submit(self.long_request(engine, 10 * wave + at)) for at in range(engine.model.max_sequences + 2)
            ]
            if wave % 2:
                engine.wait_tokens(answers[0], 1)
            for answer in answers:
                engine.cancel(answer.request.request_id)
        engine.wait_ended(*answers, rule="cancel")
        engine.wait_whole("cancel", f"after {len(answers)} cancels")
        self.check_served(engine.run_one(self.request(self.prompt(engine))), "cancel")

    def _cancel_running(self, engine: Engine) -> tuple[Answer, int]:
        """A request cancelled half-way, and how many tokens it had when `cancel` returned."""
        for seed in range(5):
            answer = engine.submit(self.long_request(engine, seed))
            engine.wait_tokens(answer, 2)
            engine.cancel(answer.request.request_id)
            seen = len(answer.tokens)
            engine.wait_ended(answer, rule="cancel")
            if len(answer.tokens) < answer.request.stop.max_new_tokens:
                return answer, seen
        pytest.skip(
            "the engine is through before a cancel can reach it: raise max_total_tokens, by --set or in `options`"
        )

    def _check_cancelled(self, answer: Answer) -> None:
        ending = answer.ending
        cancelled = isinstance(ending, Finished) and ending.reason in ("cancelled", "eos_token")
        demand(cancelled, "cancel", f"after {len(answer.tokens)} tokens and a cancel came {ending}")
