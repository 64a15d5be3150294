"""What exceeds the limits is refused, what just fits is served, and capacity is counted honestly."""

from __future__ import annotations

from dataclasses import replace

from tgi_contract_tests.base import ContractBase
from tgi_contract_tests.engine import Answer, Engine
from tgi_contract_tests.rules import Rule, demand
from tgi_gateway.types import Failed, Request, StepEvents


class Limits(ContractBase):
    def _check_refused(self, engine: Engine, request: Request, what: str, rule: Rule = "limits") -> None:
        answer = engine.run_one(request)
        ending = answer.ending
        refused = isinstance(ending, Failed) and ending.error_type == "validation" and bool(ending.message)
        demand(refused, rule, f"{what} ended in {ending} after {len(answer.tokens)} tokens")
        engine.wait_whole("capacity", f"after {what} was refused")

    def test_a_prompt_over_the_limit_is_refused(self, engine: Engine) -> None:
        length = engine.model.max_input_tokens + 1
        self._check_refused(engine, self.request(self.prompt(engine, length), 1), f"a prompt of {length} tokens")

    def test_an_empty_prompt_is_refused(self, engine: Engine) -> None:
        self._check_refused(engine, self.request(()), "an empty prompt")

    def test_an_answer_over_the_limit_is_refused(self, engine: Engine) -> None:
        prompt = self.prompt(engine)
        most = engine.model.max_total_tokens - len(prompt) + 1
        self._check_refused(engine, self.request(prompt, most), f"{len(prompt)} + {most} tokens")

    def test_an_answer_of_no_tokens_is_refused(self, engine: Engine) -> None:
        self._check_refused(engine, self.request(self.prompt(engine), 0), "max_new_tokens = 0")

    def test_a_token_outside_the_vocabulary_is_refused(self, engine: Engine) -> None:
        prompt = (*self.prompt(engine), engine.model.vocab_size)
        self._check_refused(engine, self.request(prompt), f"a prompt with token {engine.model.vocab_size}")

    def test_the_longest_prompt_is_served(self, engine: Engine) -> None:
        prompt = self.prompt(engine, engine.model.max_input_tokens)
        self.check_served(engine.run_one(self.request(prompt, 1)), "limits")

    def test_the_longest_answer_is_served(self, engine: Engine) -> None:
        prompt = self.prompt(engine, 2)
        request = self.request(prompt, engine.model.max_total_tokens - len(prompt))
        self.check_served(engine.run_one(request), "limits")

    def test_a_bad_request_leaves_its_neighbours_alone(self, engine: Engine) -> None:
        good = [self.request(self.prompt(engine, seed=seed)) for seed in range(2)]
        alone = [engine.run_one(request) for request in good]
        bad = [
            self.request(()),
            self.request(self.prompt(engine, engine.model.max_input_tokens + 1)),
            self.request((*self.prompt(engine), engine.model.vocab_size)),
        ]
        answers = self.together(engine, self.again(good[0]), *bad, self.again(good[1]))
        engine.wait_ended(*answers)
        first, *_, last = answers
        for before, beside in zip(alone, (first, last), strict=True):
            self.check_same(before, beside, "isolation", "alone and next to requests that were refused")


class CapacityAndOverload(ContractBase):
    def test_capacity_agrees_with_model_info(self, engine: Engine) -> None:
        now, model = engine.capacity(), engine.model
        demand(
            (now.max_sequences, now.total_kv_tokens) == (model.max_sequences, model.max_batch_total_tokens),
            "capacity",
            f"{now} of an engine that promised {model}",
        )
        engine.wait_whole("capacity", "in an idle engine")

    def test_capacity_counts_what_runs(self, engine: Engine) -> None:
        answer = engine.submit(self.long_request(engine))
        engine.wait_tokens(answer, 1)
        now = engine.capacity()
        was_running = not answer.ended
        engine.cancel(answer.request.request_id)
        engine.wait_ended(answer)
        counted = now.free_sequences < now.max_sequences and now.free_kv_tokens < now.total_kv_tokens
        demand(counted or not was_running, "capacity", f"{now} while a request was running")

    def test_capacity_is_whole_after_a_request_finished(self, engine: Engine) -> None:
        engine.run_one(self.request(self.prompt(engine)))
        engine.wait_whole("capacity", "after a request finished")

    def test_capacity_stays_within_its_bounds_under_load(self, engine: Engine) -> None:
        requests = [self.request(self.prompt(engine, seed=seed), 16) for seed in range(3 * engine.model.max_sequences)]
        answers = self.together(engine, *requests)
        for answer in answers:
            now = engine.capacity()
            demand(
                0 <= now.free_sequences <= now.max_sequences and 0 <= now.free_kv_tokens <= now.total_kv_tokens,
                "capacity",
                f"{now} under load",
            )
            engine.wait_tokens(answer, len(answer.tokens) + 1)
        engine.wait_ended(*answers)

    def test_many_more_requests_than_fit_are_all_served(self, engine: Engine) -> None:
        count = 4 * engine.model.max_sequences + 3
        requests = [self.request(self.prompt(engine, seed=seed), 4) for seed in range(min(count, 200))]
        answers = self.together(engine, *requests)
        engine.wait_ended(*answers, rule="overload")
        for answer in answers:
            self.check_served(answer, "overload")

    def test_an_early_request_is_not_starved_by_later_ones(self, engine: Engine) -> None:
        """Each request that ends is followed by two new ones, so that there is always something younger to run."""
        rows = engine.model.max_sequences
        flood = [self.request(self.prompt(engine, seed=seed), 2) for seed in range(40 * rows)]
        early = self.request(self.prompt(engine, seed=7), 2)
        left, answers, overtaken = flood[2 * rows :], [], True

        def follow(step: StepEvents) -> None:
            nonlocal overtaken
            if left and any(each.request_id == early.request_id for each in step.finished):
                overtaken = False
                left.clear()
            for _ in range(min(2 * len(step.finished), len(left))):
                request = left.pop()
                answers.append(engine.answers.setdefault(request.request_id, Answer(request)))
                engine.backend.submit(request)

        engine.on_emit = follow
        try:
            waited, *first = self.together(engine, early, *flood[: 2 * rows])
            engine.wait_ended(waited, rule="overload")
            engine.wait_ended(*first, *answers, rule="overload")
        finally:
            engine.on_emit = None
        demand(not overtaken, "overload", f"{len(flood) - 2 * rows} requests that came later entered before it")

    def test_the_promised_kv_tokens_can_all_be_used(self, engine: Engine) -> None:
        """Requests whose lengths add up to the promise run at the same time, each to its last token."""
        model = engine.model
        new_tokens = model.max_total_tokens // 4  # long enough for all of them to have come in
        left = model.max_batch_total_tokens
        requests: list[Request] = []
        while left > 0 and len(requests) < model.max_sequences:
            total = min(model.max_total_tokens, left)
            if total <= new_tokens:
                break
            prompt = self.prompt(engine, min(model.max_input_tokens, total - new_tokens), len(requests))
            request = self.request(prompt)
            requests.append(replace(request, stop=replace(request.stop, max_new_tokens=total - len(prompt))))
            left -= total
        answers = self.together(engine, *requests)
        engine.wait_ended(*answers, rule="memory")
        for answer in answers:
            self.check_served(answer, "memory")
