"""Pages as sequences: whatever is shared, evicted or preempted, every sequence has its own past and nothing else."""

from __future__ import annotations

import random

import pytest

from tgi_backend_llamacpp.testing import CellRunner
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StepEvents, StopRules
from tgi_model_server.batcher import BatchLimits
from tgi_model_server.loop import StepLoop
from tgi_model_server.testing.runner import toy_answer


class Served:
    """A step loop over a CellRunner, turned by hand."""

    def __init__(self, runner: CellRunner, *, prefix_caching: bool = True) -> None:
        limits = BatchLimits(
            page_size=runner.page_size,
            num_pages=runner.num_pages,
            max_sequences=runner.max_sequences,
            max_step_tokens=24,
            max_input_tokens=120,
            max_total_tokens=160,
            vocab_size=runner.vocab,
            prefix_caching=prefix_caching,
        )
        self.runner = runner
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Finished | Failed] = {}
        self.loop = StepLoop(runner, limits, [runner.eos], self._take)

    def _take(self, events: StepEvents) -> None:
        for request_id, token in zip(events.request_ids, events.token_ids, strict=True):
            self.tokens.setdefault(request_id, []).append(token)
        ends: list[Finished | Failed] = [*events.finished, *events.failed]
        for end in ends:
            self.ends[end.request_id] = end

    def run(self) -> None:
        while self.loop.has_work() and self.loop.turn():
            self.loop.batcher.check()


def request(request_id: int, prompt: list[int], new: int, seed: int | None = None, **more: object) -> Request:
    sampling = SamplingParams() if seed is None else SamplingParams(do_sample=True, seed=seed)
    return Request(request_id, tuple(prompt), sampling, StopRules(new, ignore_eos=True), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(10))
def test_random_traffic_answers_as_if_each_request_were_alone(seed: int) -> None:
    rng = random.Random(seed)
    served = Served(CellRunner(page_size=4, num_pages=41, max_sequences=4, max_saved=6 if seed % 2 else None))
    roots = [[rng.randrange(50) for _ in range(rng.randrange(5, 60))] for _ in range(3)]
    asked: list[Request] = []
    cancelled: set[int] = set()
    for number in range(120):
        root = rng.choice(roots)
        prompt = root[: rng.randrange(1, len(root) + 1)] + [rng.randrange(50) for _ in range(rng.randrange(12))]
        if asked and rng.random() < 0.3:  # the next turn of a conversation
            before = rng.choice(asked)
            prompt = [*before.input_ids, *served.tokens.get(before.request_id, []), rng.randrange(50)][:110]
        one = request(
            number,
            prompt,
            rng.randrange(1, 25),
            seed=rng.choice([None, number]),
            cache_salt=rng.choice(["", "", "other"]),
            prefill_logprobs=(scored := rng.random() < 0.2),
            prefill_top_n_tokens=rng.choice([0, 2]) if scored else 0,
        )
        asked.append(one)
        served.loop.submit(one)
        if rng.random() < 0.15:
            cancelled.add(number)
            served.loop.cancel(number)
        for _ in range(rng.randrange(6)):
            if served.loop.has_work():
                served.loop.turn()
                served.loop.batcher.check()
    served.run()
    for one in asked:
        answer = toy_answer(one, vocab=50, eos=0)
        got = served.tokens.get(one.request_id, [])
        end = served.ends[one.request_id]
        assert isinstance(end, Finished)
        if end.reason == "cancelled":
            assert one.request_id in cancelled
            assert got == answer[: len(got)]
        else:
            assert got == answer
    assert served.loop.batcher.stats.cached_tokens > 0
    assert served.runner.store.loads > 0
    assert served.runner.store.used == 0


def test_the_turns_of_a_conversation_load_what_the_one_before_left() -> None:
    runner = CellRunner(page_size=4, num_pages=101, max_sequences=2)
    served = Served(runner)
    prompt = list(range(20))
    for turn in range(6):
        served.loop.submit(request(turn, prompt, 6))
        served.run()
        assert runner.store.used == 0
        prompt = [*prompt, *served.tokens[turn], 7]
    end = served.ends[5]
    assert isinstance(end, Finished)
    assert end.usage.cached_tokens >= 4 * ((len(prompt) - 7) // 4 - 2)
    assert runner.store.saves == len(runner.map._saved)


def test_what_a_running_request_has_is_copied_and_not_loaded() -> None:
    runner = CellRunner(page_size=4, num_pages=101, max_sequences=2)
    served = Served(runner)
    served.loop.submit(request(1, list(range(20)), 30))
    for _ in range(5):
        served.loop.turn()
    served.loop.submit(request(2, list(range(20)), 3))
    served.run()
    end = served.ends[2]
    assert isinstance(end, Finished)
    assert end.usage.cached_tokens == 16
    assert runner.store.loads == 0


@pytest.mark.parametrize("most", [0, 3, 10])
def test_no_more_pages_are_saved_than_allowed_and_the_newest_stay(most: int) -> None:
    runner = CellRunner(page_size=4, num_pages=101, max_sequences=2, max_saved=most)
    served = Served(runner)
    for number in range(8):
        served.loop.submit(request(number, [number] * 20, 6))
        served.run()
        assert runner.map.saved_pages == min(most, (number + 1) * 6)
    served.loop.submit(request(9, [7] * 20, 6))
    served.run()
    end = served.ends[9]
    assert isinstance(end, Finished)
    assert end.usage.cached_tokens == min(most, 4) * 4
    assert served.tokens[9] == toy_answer(request(9, [7] * 20, 6), vocab=50, eos=0)
    assert runner.map.saved_pages <= most


def test_without_a_prefix_cache_nothing_stays() -> None:
    runner = CellRunner(page_size=4, num_pages=21, max_sequences=2)
    served = Served(runner, prefix_caching=False)
    for number in range(5):
        served.loop.submit(request(number, list(range(number, number + 20)), 6))
    served.run()
    assert len(served.ends) == 5
    assert runner.store.used == 0


def test_preemption_gives_room_and_loses_nothing() -> None:
    runner = CellRunner(page_size=4, num_pages=17, max_sequences=4)
    served = Served(runner)
    asked = [request(number, [number] * 10, 30) for number in range(4)]
    for one in asked:
        served.loop.submit(one)
    served.run()
    assert served.loop.batcher.stats.preemptions > 0
    for one in asked:
        assert served.tokens[one.request_id] == toy_answer(one, vocab=50, eos=0)
