"""What `emit` gets: one ending per request, well-formed steps, honest counts."""

from __future__ import annotations

import math
import threading
import time

import pytest

from tgi_contract_tests.base import ContractBase
from tgi_contract_tests.engine import Answer, Engine
from tgi_contract_tests.rules import demand
from tgi_gateway.types import Finished, StepEvents


class Events(ContractBase):
    def _mixed_load(self, engine: Engine) -> list[Answer]:
        """Served, refused, waiting and cancelled requests together."""
        requests = [self.request(self.prompt(engine, 4 + seed, seed)) for seed in range(engine.model.max_sequences + 3)]
        requests.insert(1, self.request(self.prompt(engine, engine.model.max_input_tokens + 1)))
        cancelled = [self.long_request(engine, 100), self.long_request(engine, 101)]
        answers = [engine.submit(request) for request in [cancelled[0], *requests, cancelled[1]]]
        engine.wait_tokens(answers[0], 2)
        for request in cancelled:
            engine.cancel(request.request_id)
            engine.cancel(request.request_id)
        engine.wait_ended(*answers)
        # What a second ending or a late token would need to arrive: one more request from start to end.
        engine.run_one(self.request(self.prompt(engine)))
        return answers

    def test_every_request_ends_exactly_once(self, engine: Engine) -> None:
        for answer in self._mixed_load(engine):
            demand(
                len(answer.endings) == 1,
                "one-ending",
                f"request {answer.request.request_id} ended {len(answer.endings)} times: {answer.endings}",
            )

    def test_no_token_follows_the_ending(self, engine: Engine) -> None:
        for answer in self._mixed_load(engine):
            demand(not answer.late, "one-ending", f"after {answer.ending} came {answer.late}")

    def test_no_event_names_an_unknown_request(self, engine: Engine) -> None:
        self._mixed_load(engine)
        demand(not engine.strangers, "events", f"nobody submitted the requests of {engine.strangers[:4]}")

    def test_steps_are_well_formed(self, engine: Engine) -> None:
        self._mixed_load(engine)
        for step in engine.steps:
            rows = len(step.request_ids)
            demand(bool(step), "events", "an empty StepEvents was emitted")
            demand(
                rows == len(step.token_ids) == len(step.logprobs) and all(0 <= row < rows for row in step.top),
                "events",
                f"columns of unequal length, or a `top` row that does not exist: {step}",
            )
            in_vocabulary = all(0 <= token_id < engine.model.vocab_size for token_id in step.token_ids)
            demand(in_vocabulary, "events", f"tokens outside the vocabulary of {engine.model.vocab_size}: {step}")

    def test_steps_are_emitted_one_at_a_time(self, engine: Engine) -> None:
        running = engine.submit(self.long_request(engine))
        engine.wait_tokens(running, 1)
        with engine.held_emit(running):
            engine.submit(self.request(self.prompt(engine), 4))
            time.sleep(0.02)  # for an emit that should not come: one that is late goes unnoticed, no more
        engine.wait_ended(running)
        demand(engine.overlaps == 0, "events", f"{engine.overlaps} emits began before the one before had returned")

    @pytest.mark.needs("batching")
    def test_a_step_holds_the_tokens_of_all_who_ran(self, engine: Engine) -> None:
        first = len(engine.steps)
        requests = [self.request(self.prompt(engine, seed=seed), 16) for seed in range(2)]
        engine.wait_ended(*self.together(engine, *requests))
        shared = max(len(set(step.request_ids)) for step in engine.steps[first:])
        demand(shared >= 2, "events", "two requests that ran together shared no StepEvents; `batching` is declared")

    def test_usage_agrees_with_what_was_emitted(self, engine: Engine) -> None:
        answers = self._mixed_load(engine)
        for answer in answers:
            ending = answer.ending
            if not isinstance(ending, Finished):
                continue
            usage, prompt = ending.usage, len(answer.request.input_ids)
            demand(usage.prompt_tokens == prompt, "counts", f"{usage} for a prompt of {prompt} tokens")
            demand(
                usage.generated_tokens == len(answer.tokens),
                "counts",
                f"{usage}, but {len(answer.tokens)} tokens were emitted; {ending.reason}",
            )
            demand(0 <= usage.cached_tokens <= prompt, "counts", f"{usage}: more cached than there is prompt")
            demand(0 <= ending.queue_s < math.inf, "counts", f"queue_s is {ending.queue_s}")


class Threads(ContractBase):
    def test_submit_and_cancel_return_while_emit_is_busy(self, engine: Engine) -> None:
        running = engine.submit(self.long_request(engine))
        engine.wait_tokens(running, 1)
        with engine.held_emit(running):
            other = engine.submit(self.request(self.prompt(engine)))
            engine.capacity()
            engine.cancel(running.request.request_id)
        engine.wait_ended(running, other)

    def test_requests_may_come_from_several_threads(self, engine: Engine) -> None:
        requests = [self.request(self.prompt(engine, seed=seed), 4) for seed in range(16)]
        answers: list[Answer] = []
        threads = [
            threading.Thread(target=lambda part=part: answers.extend(map(engine.submit, part)), daemon=True)
            for part in (requests[at::4] for at in range(4))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(self.patience_s)
        demand(len(answers) == 16, "threads", f"{len(answers)} of 16 submits from four threads returned")
        engine.wait_ended(*answers, rule="threads")
        for answer in answers:
            self.check_served(answer, "threads")

    def test_emit_may_submit_and_cancel(self, engine: Engine) -> None:
        followers = [self.request(self.prompt(engine, seed=seed)) for seed in range(3)]
        waiting, answers = list(followers), []
        running = self.long_request(engine)

        def on_emit(step: StepEvents) -> None:
            if waiting and running.request_id in step.request_ids:
                request = waiting.pop()
                answers.append(engine.answers.setdefault(request.request_id, Answer(request)))
                engine.backend.submit(request)
                if not waiting:
                    engine.backend.cancel(running.request_id)

        engine.on_emit = on_emit
        try:
            engine.wait_ended(engine.submit(running), rule="threads")
            engine.wait_ended(*answers, rule="threads")
        finally:
            engine.on_emit = None
        demand(len(answers) == len(followers), "threads", f"{len(answers)} of {len(followers)} steps were emitted")
