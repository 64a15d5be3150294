"""The step loop on a toy model that gives wrong tokens for wrong pages, at both pipeline depths."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tgi_gateway.errors import Unsupported
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StepEvents, StopRules
from tgi_model_server.batcher import BatchLimits
from tgi_model_server.loop import StepLoop
from tgi_model_server.plan import StepPlan
from tgi_model_server.plan_wire import PlanDecoder, PlanEncoder
from tgi_model_server.step import DeviceLost, StepOutput
from tgi_model_server.testing.runner import ToyRunner, most_likely, toy_answer

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


class Ledger:
    """Collects events and checks the rules that hold for every engine."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.logprobs: dict[int, list[float]] = defaultdict(list)
        self.top: dict[int, list[tuple[tuple[int, float], ...]]] = defaultdict(list)
        self.ends: dict[int, Finished | Failed] = {}
        self.emitted = 0
        self.changed = threading.Condition()

    def __call__(self, events: StepEvents) -> None:
        assert events
        with self.changed:
            self.emitted += 1
            for row, request_id in enumerate(events.request_ids):
                assert request_id not in self.ends, "a token after the end"
                self.tokens[request_id].append(events.token_ids[row])
                self.logprobs[request_id].append(events.logprobs[row])
                self.top[request_id].append(events.top.get(row, ()))
            ends: list[Finished | Failed] = [*events.finished, *events.failed]
            for end in ends:
                assert end.request_id not in self.ends, "two ends"
                self.ends[end.request_id] = end
            self.changed.notify_all()

    def wait_for(self, done: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(done, timeout=30), "the loop hangs"

    def reason(self, request_id: int) -> str:
        end = self.ends[request_id]
        return end.reason if isinstance(end, Finished) else end.error_type


class Relayed(ToyRunner):
    """Runs what another rank would: each plan as it arrives there, which must be the plan that was sent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoder, self.decoder = PlanEncoder(), PlanDecoder()

    def run(self, plan: StepPlan) -> Any:
        arrived = self.decoder.decode(self.encoder.encode(plan))
        assert arrived == replace(plan, pages=[list(pages) for pages in plan.pages])
        return super().run(arrived)


def limits_of(runner: ToyRunner, **changes: int | bool) -> BatchLimits:
    values: dict[str, int | bool] = {
        "page_size": runner.page_size,
        "num_pages": runner.num_pages,
        "max_sequences": runner.max_sequences,
        "max_step_tokens": 16,
        "max_input_tokens": 9_000,
        "max_total_tokens": 10_000,
        "vocab_size": 100,
    }
    return BatchLimits(**(values | changes))  # type: ignore[arg-type]


def make(runner: ToyRunner, **changes: int | bool) -> tuple[StepLoop, Ledger]:
    ledger = Ledger()
    return StepLoop(runner, limits_of(runner, **changes), [runner.eos], ledger), ledger


def drain(loop: StepLoop) -> None:
    """Turn the loop in this thread until nothing is open, checking the books after each turn."""
    while loop.has_work():
        loop.turn()
        loop.batcher.check()


def request(request_id: int, prompt: list[int], new: int, **fields: object) -> Request:
    stop = {
        name: fields.pop(name)
        for name in ("min_new_tokens", "ignore_eos", "stop_token_ids", "stop_strings")
        if name in fields
    }
    sampling = fields.pop("sampling", SamplingParams())
    return Request(request_id, tuple(prompt), sampling, StopRules(new, **stop), **fields)  # type: ignore[arg-type]


def expected(runner: ToyRunner, asked: Request) -> list[int]:
    return toy_answer(asked, vocab=runner.vocab, eos=runner.eos)


def random_requests(draw: random.Random, count: int, largest: int) -> list[Request]:
    """Prompts that share beginnings, with all kinds of stop rules."""
    stems = [[draw.randrange(1, 50) for _ in range(draw.randint(0, 40))] for _ in range(3)]
    requests = []
    for request_id in range(1, count + 1):
        prompt = draw.choice(stems) + [draw.randrange(50) for _ in range(draw.randint(1, 12))]
        new = draw.randint(1, 30)
        prompt = prompt[: largest - new]
        requests.append(
            request(
                request_id,
                prompt,
                new,
                min_new_tokens=draw.choice([0, 0, 3, new]),
                ignore_eos=draw.random() < 0.3,
                stop_token_ids=tuple(draw.sample(range(50), draw.choice([0, 0, 2]))),
                sampling=SamplingParams(do_sample=draw.random() < 0.5, seed=draw.randrange(1000)),
                logprobs=draw.random() < 0.5,
                top_n_tokens=draw.choice([0, 0, 2]),
                prefill_logprobs=(scored := draw.random() < 0.2),
                prefill_top_n_tokens=draw.choice([0, 3]) if scored else 0,
                cache_salt=draw.choice(["", "", "salt"]),
                priority=draw.choice([0, 0, 1]),
            )
        )
    return requests


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(25))
def test_random_workloads_give_every_request_its_own_answer(depth: int, seed: int) -> None:
    """Cancels, preemption in a tiny pool, prefix hits, chunks, stop tokens: the tokens are as for each alone."""
    draw = random.Random(seed)
    runner = ToyRunner(
        page_size=draw.choice([1, 2, 4, 8]),
        max_sequences=draw.choice([1, 3, 8]),
        pipeline_depth=depth,
    )
    runner = Relayed(
        page_size=runner.page_size,
        num_pages=1 + -(-draw.choice([80, 120, 300]) // runner.page_size),
        max_sequences=runner.max_sequences,
        pipeline_depth=depth,
    )
    loop, ledger = make(
        runner,
        max_step_tokens=draw.choice([3, 16, 64]),
        prefix_caching=draw.random() < 0.8,
        chunked_prefill=draw.random() < 0.8,
    )
    requests = random_requests(draw, 40, (runner.num_pages - 1) * runner.page_size)
    cancelled: set[int] = set()
    todo = requests.copy()
    while todo or loop.has_work():
        while todo and draw.random() < 0.4:
            loop.submit(todo.pop(0))
        if draw.random() < 0.05:
            victim = draw.choice(requests).request_id
            if victim not in ledger.ends and all(victim != waiting.request_id for waiting in todo):
                loop.cancel(victim)
                cancelled.add(victim)
        if loop.has_work():
            loop.turn()
            loop.batcher.check()
    for asked in requests:
        answer, tokens = expected(runner, asked), ledger.tokens[asked.request_id]
        end = ledger.ends[asked.request_id]
        assert isinstance(end, Finished)
        assert end.usage.prompt_tokens == len(asked.input_ids)
        assert end.usage.generated_tokens == len(tokens)
        assert end.usage.cached_tokens < len(asked.input_ids)
        if end.reason == "cancelled":
            assert asked.request_id in cancelled
            assert tokens == answer[: len(tokens)]
            continue
        assert tokens == answer
        if len(answer) == asked.stop.max_new_tokens:
            assert end.reason == "length"
        else:
            assert end.reason == ("stop_sequence" if answer[-1] != runner.eos or asked.stop.ignore_eos else "eos_token")
        assert all(math.isnan(value) != asked.logprobs for value in ledger.logprobs[asked.request_id])
        assert [len(top) for top in ledger.top[asked.request_id]] == [asked.top_n_tokens] * len(tokens)
        if asked.prefill_logprobs:
            assert end.usage.cached_tokens == 0
            assert math.isnan(end.prefill_logprobs[0])
            assert end.prefill_logprobs[1:] == tuple(-1.0 - token / 8 for token in asked.input_ids[1:])
        else:
            assert end.prefill_logprobs == ()
        if asked.prefill_top_n_tokens:
            assert end.prefill_top == ((), *(most_likely(token, 3) for token in asked.input_ids[1:]))
        else:
            assert end.prefill_top == ()
    assert loop.batcher.available_pages == runner.num_pages - 1
    assert loop.load.available_pages == runner.num_pages - 1


@DEPTHS
def test_a_tiny_pool_preempts_and_still_answers(depth: int) -> None:
    runner = ToyRunner(page_size=4, num_pages=1 + 20, max_sequences=6, pipeline_depth=depth)
    loop, ledger = make(runner, max_step_tokens=64)
    requests = [request(n, [n] * 10, 60, ignore_eos=True) for n in range(1, 7)]
    for asked in requests:
        loop.submit(asked)
    drain(loop)
    assert loop.stats.preemptions > 0
    assert {n: ledger.tokens[n] for n in range(1, 7)} == {n: expected(runner, requests[n - 1]) for n in range(1, 7)}


@DEPTHS
def test_a_request_that_needs_the_whole_pool_runs(depth: int) -> None:
    runner = ToyRunner(page_size=4, num_pages=1 + 8, pipeline_depth=depth)
    loop, ledger = make(runner)
    asked = request(1, [5] * 20, 13, ignore_eos=True)  # 32 tokens need pages: the last one is never fed back
    loop.submit(asked)
    loop.submit(request(2, [6] * 20, 14))
    drain(loop)
    assert ledger.tokens[1] == expected(runner, asked)
    assert ledger.reason(2) == "validation"


@DEPTHS
def test_a_known_end_wastes_no_row_and_a_stop_token_at_most_one(depth: int) -> None:
    runner = ToyRunner(pipeline_depth=depth)
    loop, ledger = make(runner)
    loop.submit(request(1, [1, 2, 3], 20, ignore_eos=True))
    drain(loop)
    assert loop.stats.surplus_tokens == 0
    answer = ledger.tokens[1]
    stop = next(token for token in answer[3:10] if token not in answer[:3])
    loop.submit(request(2, [1, 2, 3], 20, ignore_eos=True, stop_token_ids=(stop,)))
    drain(loop)
    assert ledger.tokens[2] == answer[: answer.index(stop) + 1]
    assert ledger.reason(2) == "stop_sequence"
    assert loop.stats.surplus_tokens == depth - 1


@DEPTHS
def test_a_second_request_hits_prompt_and_answer_of_the_first(depth: int) -> None:
    runner = ToyRunner(page_size=4, pipeline_depth=depth)
    loop, ledger = make(runner)
    prompt = list(range(1, 20))
    loop.submit(request(1, prompt, 9, ignore_eos=True))
    drain(loop)
    longer = prompt + ledger.tokens[1] + [7]
    loop.submit(request(2, longer, 3))
    drain(loop)
    end = ledger.ends[2]
    assert isinstance(end, Finished)
    # 19 + 9 tokens; the last was never computed, so 27 of them fill 6 pages.
    assert end.usage.cached_tokens == 24
    assert ledger.tokens[2] == expected(runner, request(2, longer, 3))


@DEPTHS
def test_a_fully_cached_prompt_still_computes_one_token(depth: int) -> None:
    runner = ToyRunner(page_size=4, pipeline_depth=depth)
    loop, ledger = make(runner)
    for request_id in (1, 2):
        loop.submit(request(request_id, list(range(1, 17)), 5, ignore_eos=True))
        drain(loop)
    end = ledger.ends[2]
    assert isinstance(end, Finished)
    assert end.usage.cached_tokens == 12
    assert ledger.tokens[2] == ledger.tokens[1]


@DEPTHS
def test_requests_of_different_salts_share_no_prefix(depth: int) -> None:
    runner = ToyRunner(page_size=4, pipeline_depth=depth)
    loop, ledger = make(runner)
    cached = []
    for request_id, salt in enumerate(["", "a", "b", "a", ""]):
        loop.submit(request(request_id, [9] * 10, 2, cache_salt=salt))
        drain(loop)
        end = ledger.ends[request_id]
        assert isinstance(end, Finished)
        cached.append(end.usage.cached_tokens)
    assert cached == [0, 0, 0, 8, 8]


@DEPTHS
def test_simultaneous_requests_share_one_long_prefix(depth: int) -> None:
    runner = ToyRunner(page_size=4, num_pages=300, max_sequences=20, pipeline_depth=depth)
    loop, ledger = make(runner, max_step_tokens=128)
    prefix = [n % 49 + 1 for n in range(800)]
    requests = [request(n, [*prefix, n, n], 4, ignore_eos=True) for n in range(1, 21)]
    for asked in requests:
        loop.submit(asked)
    drain(loop)
    for asked in requests:
        assert ledger.tokens[asked.request_id] == expected(runner, asked)
    assert loop.stats.prefill_tokens == 800 + 20 * 2
    assert loop.stats.preemptions == 0


@DEPTHS
def test_simultaneous_requests_with_a_short_prefix_wait_one_step_rather_than_compute_it_twice(depth: int) -> None:
    runner = ToyRunner(page_size=4, num_pages=300, max_sequences=20, pipeline_depth=depth)
    loop, _ = make(runner, max_step_tokens=512)
    for n in range(1, 11):
        loop.submit(request(n, [9] * 40 + [n, n], 2, ignore_eos=True))
    drain(loop)
    assert loop.stats.prefill_tokens == 40 + 10 * 2


@DEPTHS
def test_a_request_cancelled_in_mid_prefill_leaves_no_page_that_was_not_computed(depth: int) -> None:
    runner = ToyRunner(page_size=4, pipeline_depth=depth)
    loop, ledger = make(runner, max_step_tokens=8)
    prompt = list(range(1, 41))
    loop.submit(request(1, prompt, 5))
    loop.turn()
    loop.cancel(1)
    loop.submit(request(2, prompt, 5, ignore_eos=True))
    drain(loop)
    assert ledger.reason(1) == "cancelled"
    end = ledger.ends[2]
    assert isinstance(end, Finished)
    assert 0 < end.usage.cached_tokens <= 8 * depth
    assert ledger.tokens[2] == expected(runner, request(2, prompt, 5, ignore_eos=True))


@DEPTHS
def test_cancel_gives_pages_back_within_one_step(depth: int) -> None:
    runner = ToyRunner(pipeline_depth=depth)
    loop, ledger = make(runner)
    for n in (1, 2):
        loop.submit(request(n, [n] * 10, 100, ignore_eos=True))
    for _ in range(5):
        loop.turn()
    before = loop.load.available_pages
    loop.cancel(1)
    loop.turn()
    assert ledger.reason(1) == "cancelled"
    loop.turn()
    assert loop.load.available_pages >= before + 3
    loop.cancel(2)
    drain(loop)
    assert loop.load.available_pages == runner.num_pages - 1


@DEPTHS
def test_a_broken_step_fails_its_requests_and_the_loop_goes_on(depth: int) -> None:
    def poison(plan: StepPlan) -> Exception | None:
        return RuntimeError("/secret/path") if 99 in plan.token_ids else None

    runner = ToyRunner(pipeline_depth=depth, break_step=poison)
    loop, ledger = make(runner)
    prompt = list(range(1, 30))
    loop.submit(request(1, [*prompt, 99], 5))
    drain(loop)
    failed = ledger.ends[1]
    assert isinstance(failed, Failed)
    assert failed.error_type == "generation"
    assert "secret" not in failed.message
    assert loop.failure is None
    assert loop.load.available_pages == runner.num_pages - 1
    asked = request(2, [*prompt, 48], 5)
    loop.submit(asked)
    drain(loop)
    assert ledger.tokens[2] == expected(runner, asked)


@DEPTHS
@pytest.mark.parametrize("seed", range(5))
def test_random_broken_steps_never_leave_a_wrong_page(depth: int, seed: int) -> None:
    draw = random.Random(seed)
    last_broken = -10

    def sometimes(_plan: StepPlan) -> Exception | None:
        nonlocal last_broken
        if runner.steps - last_broken > 4 and draw.random() < 0.1:
            last_broken = runner.steps
            return draw.choice([RuntimeError, MemoryError])("bad luck")
        return None

    runner = ToyRunner(num_pages=41, pipeline_depth=depth, break_step=sometimes)
    loop, ledger = make(runner)
    requests = random_requests(draw, 80, 160)
    todo = requests.copy()
    while todo or loop.has_work():
        if todo and draw.random() < 0.5:
            loop.submit(todo.pop(0))
        if loop.has_work():
            loop.turn()
            loop.batcher.check()
    failed = [end for end in ledger.ends.values() if isinstance(end, Failed)]
    assert 0 < len(failed) < len(requests)
    for asked in requests:
        answer, tokens = expected(runner, asked), ledger.tokens[asked.request_id]
        assert tokens == (answer if isinstance(ledger.ends[asked.request_id], Finished) else answer[: len(tokens)])
    assert loop.load.available_pages == runner.num_pages - 1


def test_a_request_that_cannot_be_set_up_fails_alone() -> None:
    class Picky(ToyRunner):
        def admit(self, slot: int, request: Request, output_ids: object, constraint: object = None) -> None:
            if request.request_id == 2:
                raise Unsupported("no such grammar")
            if request.request_id == 3:
                raise RuntimeError("/secret/path")
            super().admit(slot, request, output_ids, constraint)  # type: ignore[arg-type]

    runner = Picky()
    loop, ledger = make(runner)
    for n in range(1, 5):
        loop.submit(request(n, [n] * 5, 4, ignore_eos=True))
    drain(loop)
    assert [ledger.reason(n) for n in range(1, 5)] == ["length", "validation", "generation", "length"]
    broken = ledger.ends[3]
    assert isinstance(broken, Failed)
    assert "secret" not in broken.message
    assert loop.load.available_pages == runner.num_pages - 1


def test_requests_that_cannot_be_set_up_do_not_stand_in_the_way() -> None:
    class Picky(ToyRunner):
        def admit(self, slot: int, request: Request, output_ids: object, constraint: object = None) -> None:
            if request.request_id < 10:
                raise Unsupported("no such grammar")
            super().admit(slot, request, output_ids, constraint)  # type: ignore[arg-type]

    loop, ledger = make(Picky(max_sequences=2))
    for n in range(1, 11):
        loop.submit(request(n, [n] * 5, 2, ignore_eos=True))
    drain(loop)
    assert [ledger.reason(n) for n in range(1, 11)] == ["validation"] * 9 + ["length"]


def test_a_runner_that_breaks_its_word_ends_every_request_and_the_loop() -> None:
    class Forgetful(ToyRunner):
        def run(self, plan: StepPlan) -> StepOutput:  # type: ignore[override]
            output = super().run(plan)
            if self.steps == 3:
                output.wait().token_ids.pop()
            return output

    loop, ledger = make(Forgetful())
    loop.start()
    for n in range(1, 4):
        loop.submit(request(n, [n], 9, ignore_eos=True))
    ledger.wait_for(lambda: len(ledger.ends) == 3)
    loop.stop(0.0)
    assert {ledger.reason(n) for n in range(1, 4)} == {"generation"}
    assert loop.failure == "the step loop broke"


@pytest.mark.parametrize(
    "asked",
    [
        request(1, [], 3),
        request(1, [1], 0),
        request(1, [1] * 50, 60),
        request(1, [1] * 91, 1),
        request(1, [1 << 40], 1),
    ],
)
def test_what_can_never_run_is_refused_at_once(asked: Request) -> None:
    loop, ledger = make(ToyRunner(), max_total_tokens=100, max_input_tokens=90)
    loop.submit(asked)
    loop.turn()
    assert ledger.reason(1) == "validation"


def test_lower_priority_numbers_enter_first() -> None:
    loop, ledger = make(ToyRunner(max_sequences=1))
    for n, priority in [(1, 2), (2, 1), (3, 0)]:
        loop.submit(request(n, [n], 2, ignore_eos=True, priority=priority))
    drain(loop)
    assert list(ledger.ends) == [3, 2, 1]


@DEPTHS
def test_no_step_exceeds_its_token_budget(depth: int) -> None:
    runner = ToyRunner(num_pages=500, pipeline_depth=depth)
    loop, _ = make(runner, max_step_tokens=11)
    for asked in random_requests(random.Random(3), 40, 100):
        loop.submit(asked)
    drain(loop)
    assert runner.largest_step == 11


@DEPTHS
def test_the_thread_serves_many_submitters(depth: int) -> None:
    runner = ToyRunner(num_pages=60, pipeline_depth=depth)
    loop, ledger = make(runner)
    loop.start()
    requests = random_requests(random.Random(9), 60, 200)

    def client(part: int) -> None:
        for asked in requests[part::3]:
            loop.submit(asked)
            if asked.request_id % 7 == 0:
                loop.cancel(asked.request_id)

    clients = [threading.Thread(target=client, args=(part,)) for part in range(3)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    ledger.wait_for(lambda: len(ledger.ends) == 60)
    for asked in requests:
        tokens = ledger.tokens[asked.request_id]
        answer = expected(runner, asked)
        assert tokens == (answer[: len(tokens)] if ledger.reason(asked.request_id) == "cancelled" else answer)
    loop.stop(5.0)
    assert loop.load.available_pages == runner.num_pages - 1


def test_an_idle_loop_does_not_turn() -> None:
    loop, ledger = make(ToyRunner())
    loop.start()
    loop.submit(request(1, [1], 3, ignore_eos=True))
    ledger.wait_for(lambda: 1 in ledger.ends)
    time.sleep(0.05)
    turns = loop.turns
    time.sleep(0.05)
    assert loop.turns == turns
    loop.stop(0.0)


def test_events_are_told_while_the_next_step_is_computed() -> None:
    told, computed = threading.Event(), []

    class Slow(ToyRunner):
        def run(self, plan: StepPlan) -> Any:
            if self.steps == 1:
                computed.append(told.wait(30))  # the second step: the first one's token must come out meanwhile
            return super().run(plan)

    runner = Slow()
    ledger = Ledger()

    def emit(events: StepEvents) -> None:
        ledger(events)
        told.set()

    loop = StepLoop(runner, limits_of(runner), [runner.eos], emit)
    loop.start()
    asked = request(1, [1, 2], 5, ignore_eos=True)
    loop.submit(asked)
    ledger.wait_for(lambda: 1 in ledger.ends)
    loop.stop(0.0)
    assert computed == [True]
    assert ledger.tokens[1] == expected(runner, asked)


@DEPTHS
def test_events_that_cannot_be_handed_on_end_the_loop(depth: int) -> None:
    runner = ToyRunner(pipeline_depth=depth, num_pages=5000)
    taken: list[StepEvents] = []

    def emit(events: StepEvents) -> None:
        taken.append(events)
        if len(taken) == 2:
            raise ConnectionError("nobody is there")

    loop = StepLoop(runner, limits_of(runner), [runner.eos], emit)
    loop.submit(request(1, [1, 2], 9000, ignore_eos=True))
    loop.start()
    loop._thread.join(30)
    assert loop.ended
    assert loop.failure
    assert taken[-1].failed[0].request_id == 1


def test_steps_do_not_run_ahead_of_whoever_is_slow_to_hear_of_them() -> None:
    runner = ToyRunner(num_pages=5000)
    ledger, ahead = Ledger(), []

    def emit(events: StepEvents) -> None:
        time.sleep(0.002)
        ahead.append(runner.steps - ledger.emitted)
        ledger(events)

    loop = StepLoop(runner, limits_of(runner), [runner.eos], emit)
    loop.start()
    asked = request(1, [1, 2], 100, ignore_eos=True)
    loop.submit(asked)
    ledger.wait_for(lambda: 1 in ledger.ends)
    loop.stop(0.0)
    assert ledger.tokens[1] == expected(runner, asked)
    assert max(ahead) == 2  # the one that is told, and the one that was computed meanwhile


@DEPTHS
def test_stop_drains_what_fits_in_the_time(depth: int) -> None:
    runner = ToyRunner(pipeline_depth=depth)
    loop, ledger = make(runner)
    loop.start()
    asked = request(1, [1, 2], 50, ignore_eos=True)
    loop.submit(asked)
    loop.stop(30.0)
    assert ledger.tokens[1] == expected(runner, asked)
    loop.submit(request(2, [1], 1))
    assert ledger.reason(2) == "healthcheck"
    loop.stop(30.0)


@DEPTHS
def test_stop_fails_what_does_not_fit_in_the_time(depth: int) -> None:
    runner = ToyRunner(pipeline_depth=depth, num_pages=5000)
    loop, ledger = make(runner)
    loop.start()
    loop.submit(request(1, [1, 2], 9000, ignore_eos=True))
    ledger.wait_for(lambda: len(ledger.tokens[1]) > 3)
    loop.stop(0.0)
    assert ledger.reason(1) == "incomplete_generation"
    assert loop.load.available_pages == runner.num_pages - 1


def test_a_loop_that_never_started_can_be_stopped() -> None:
    loop, ledger = make(ToyRunner())
    loop.submit(request(1, [1], 1))
    loop.stop(0.0)
    assert ledger.reason(1) == "healthcheck"


@DEPTHS
def test_a_lost_device_ends_the_loop_and_every_request(depth: int) -> None:
    runner = ToyRunner(
        pipeline_depth=depth, max_sequences=1, break_step=lambda _: DeviceLost("gone") if runner.steps == 5 else None
    )
    loop, ledger = make(runner)
    for n in range(1, 4):
        loop.submit(request(n, [n], 100, ignore_eos=True))
    loop.start()
    ledger.wait_for(lambda: len(ledger.ends) == 3)
    assert {ledger.reason(n) for n in range(1, 4)} == {"generation"}
    loop.stop(0.0)
    assert loop.failure is not None
    assert "gone" in loop.failure
    loop.submit(request(4, [1], 1))
    assert ledger.reason(4) == "healthcheck"


def test_steps_that_keep_breaking_end_the_loop() -> None:
    loop, ledger = make(ToyRunner(break_step=lambda _: RuntimeError("always")))
    loop.start()
    for n in range(1, 10):
        loop.submit(request(n, [n], 5))
    ledger.wait_for(lambda: len(ledger.ends) == 9)
    loop.stop(0.0)
    assert loop.failure is None or "in a row" in loop.failure


def test_queue_time_is_from_submission_to_the_first_step() -> None:
    loop, ledger = make(ToyRunner(max_sequences=1))
    for n in (1, 2):
        loop.submit(request(n, [n], 30, ignore_eos=True))
    drain(loop)
    first, second = ledger.ends[1], ledger.ends[2]
    assert isinstance(first, Finished)
    assert isinstance(second, Finished)
    assert 0.0 <= first.queue_s < second.queue_s


def test_one_emit_per_step_carries_all_its_events() -> None:
    runner = ToyRunner()
    loop, ledger = make(runner)
    for n in range(1, 6):
        loop.submit(request(n, [n], 10, ignore_eos=True))
    drain(loop)
    assert ledger.emitted == runner.steps == loop.stats.steps == 10
