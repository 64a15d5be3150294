"""Which rows a step gets, in which order, on which pages."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest

from tgi_gateway.types import Request, SamplingParams, StepEvents, StopRules
from tgi_model_server.batcher import FEW_DECODE_ROWS, Batcher, BatchLimits, Step
from tgi_model_server.plan import PREVIOUS_TOKEN, StepResult


class Slots:
    """Remembers who is in which slot."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.log: list[tuple[int, list[int]]] = []

    def admit(self, slot: int, request: Request, output_ids: Seq[int], constraint: object = None) -> None:
        assert constraint is None
        assert slot not in self.held
        self.held[slot] = request.request_id
        self.log.append((request.request_id, list(output_ids)))

    def release(self, slot: int) -> None:
        del self.held[slot]


VOCABULARY = 1000


def make(**changes: int | bool) -> tuple[Batcher, Slots]:
    values: dict[str, int | bool] = {
        "page_size": 4,
        "num_pages": 101,
        "max_sequences": 4,
        "max_step_tokens": 16,
        "max_input_tokens": 300,
        "max_total_tokens": 400,
        "vocab_size": VOCABULARY,
    }
    slots = Slots()
    return Batcher(BatchLimits(**(values | changes)), slots, [2]), slots  # type: ignore[arg-type]


def add(batcher: Batcher, request_id: int, prompt: list[int], new: int = 10, **fields: object) -> None:
    batcher.add(Request(request_id, tuple(prompt), SamplingParams(), StopRules(new), **fields), 0.0)  # type: ignore[arg-type]


def planned(batcher: Batcher) -> Step:
    step = batcher.plan()
    assert step is not None
    return step


def finish(batcher: Batcher, step: Step, token: int = 7) -> StepEvents:
    rows = len(step.sampled)
    targets = {row: [-1.0] * len(wanted) for row, wanted in step.plan.prompt_targets.items()}
    result = StepResult([token] * rows, [0.0] * rows, prompt_logprobs=targets)
    result.prompt_top = {row: [((9, -1.0),)] * len(targets[row]) for row in step.plan.prompt_top}
    batcher.complete(step, result)
    batcher.check()
    return batcher.take_events()


def ids(step: Step) -> list[int]:
    return [sequence.request.request_id for sequence in step.rows]


def test_decode_rows_come_first_then_running_prefills_then_newcomers() -> None:
    batcher, _ = make()
    add(batcher, 1, [11] * 5)
    finish(batcher, planned(batcher))
    add(batcher, 2, [12] * 20)
    finish(batcher, planned(batcher))
    add(batcher, 3, [13] * 30)
    step = planned(batcher)
    assert ids(step) == [1, 2, 3]
    assert step.plan.query_lens == [1, 5, 10]
    assert step.plan.kv_lens == [7, 20, 10]
    assert step.plan.sample_rows == [0, 1]
    assert step.plan.num_tokens == 16
    assert step.plan.token_ids == [7, *[12] * 5, *[13] * 10]


def test_a_long_prompt_leaves_room_for_a_short_one_behind_it() -> None:
    batcher, _ = make()
    add(batcher, 1, [11] * 200)
    add(batcher, 2, [12] * 100)
    finish(batcher, planned(batcher))
    add(batcher, 3, [13] * 5)
    step = planned(batcher)
    assert (ids(step), step.plan.query_lens) == ([1, 2, 3], [8, 3, 5])
    assert [sequence.request.request_id for sequence in step.sampled] == [3]


def test_a_long_prompt_that_must_wait_itself_does_not_hold_up_a_short_one() -> None:
    batcher, _ = make()
    add(batcher, 1, [11] * 100)
    finish(batcher, planned(batcher))
    add(batcher, 2, [12] * 100)
    add(batcher, 3, [13] * 5)
    step = planned(batcher)
    assert (ids(step), step.plan.query_lens) == ([1, 3], [11, 5]), "the first is nearer to its end than the second"
    finish(batcher, step)
    assert planned(batcher).plan.query_lens == [1, 15]


def test_no_budget_is_kept_for_a_newcomer_that_finds_no_pages() -> None:
    batcher, _ = make(num_pages=1 + 30)
    add(batcher, 1, [11] * 100)
    finish(batcher, planned(batcher))
    add(batcher, 2, [12] * 50)
    assert planned(batcher).plan.query_lens == [16]


def test_a_plan_ahead_of_the_result_says_previous_token() -> None:
    batcher, _ = make()
    add(batcher, 1, [11] * 5, new=2)
    first = planned(batcher)
    second = planned(batcher)
    assert second.plan.token_ids == [PREVIOUS_TOKEN]
    assert second.plan.output_lens == [1]
    assert batcher.plan() is None, "max_new_tokens are on their way: no third row"
    finish(batcher, first)
    events = finish(batcher, second)
    assert [end.reason for end in events.finished] == ["length"]


def test_pages_and_slot_of_a_sequence_in_flight_come_back_only_with_its_step() -> None:
    batcher, slots = make(prefix_caching=False)
    add(batcher, 1, [11] * 5)
    first, second = planned(batcher), planned(batcher)
    finish(batcher, first, token=2)
    assert batcher.pages.free_pages < batcher.pages.total
    assert slots.held
    assert batcher.available_pages == batcher.pages.total
    finish(batcher, second)
    assert batcher.pages.free_pages == batcher.pages.total
    assert not slots.held
    assert batcher.stats.surplus_tokens == 1


def test_eos_is_allowed_once_min_new_tokens_exist() -> None:
    batcher, _ = make()
    batcher.add(Request(1, (5,), SamplingParams(), StopRules(5, min_new_tokens=2)), 0.0)
    allowed = []
    for _ in range(4):
        step = planned(batcher)
        allowed += step.plan.allow_eos
        finish(batcher, step)
    assert allowed == [False, False, True, True]


def test_a_prompt_is_cut_by_the_budget_and_sampled_in_its_last_chunk() -> None:
    batcher, _ = make()
    add(batcher, 1, list(range(3, 43)))
    lens, sampled = [], []
    for _ in range(3):
        step = planned(batcher)
        lens += step.plan.query_lens
        sampled.append(step.plan.sample_rows)
        finish(batcher, step)
    assert lens == [16, 16, 8]
    assert sampled == [[], [], [0]]


def test_without_chunked_prefill_only_prompts_over_the_budget_are_cut() -> None:
    batcher, _ = make(chunked_prefill=False)
    add(batcher, 1, [11] * 10)
    add(batcher, 2, [12] * 10)
    step = planned(batcher)
    assert ids(step) == [1]
    finish(batcher, step)
    step = planned(batcher)
    assert ids(step) == [1, 2]
    assert step.plan.query_lens == [1, 10]
    finish(batcher, step)
    add(batcher, 3, [13] * 30)
    step = planned(batcher)
    assert step.plan.query_lens == [1, 1, 14]


def test_prompt_targets_are_the_tokens_that_follow() -> None:
    batcher, _ = make()
    add(batcher, 1, list(range(10, 30)), prefill_logprobs=True)
    first = planned(batcher)
    assert first.plan.prompt_targets == {0: list(range(11, 27))}
    finish(batcher, first)
    second = planned(batcher)
    assert second.plan.prompt_targets == {0: list(range(27, 30))}
    finish(batcher, second)
    assert planned(batcher).plan.prompt_targets == {}


def test_the_youngest_is_preempted_and_comes_back_with_its_output_before_newer_ones() -> None:
    batcher, slots = make(num_pages=1 + 8, prefix_caching=False)
    add(batcher, 1, [11] * 7, new=20)
    add(batcher, 2, [12] * 7, new=20)
    while not batcher.stats.preemptions:
        finish(batcher, planned(batcher))
    assert [sequence.request.request_id for sequence in batcher if sequence.state == "waiting"] == [2]
    add(batcher, 3, [13] * 7, new=20)
    while batcher.running or batcher.waiting:
        finish(batcher, planned(batcher))
    entered = [request_id for request_id, _ in slots.log]
    assert entered[:3] == [1, 2, 2]
    assert entered.index(3) > 2
    again = slots.log[2][1]
    assert again
    assert set(again) == {7}


def test_the_oldest_sequence_gets_every_page_it_needs() -> None:
    batcher, _ = make(num_pages=1 + 10, max_sequences=4, max_step_tokens=64)
    for request_id in range(1, 5):
        add(batcher, request_id, [10 + request_id] * 3, new=37)
    ended: list[int] = []
    steps = 0
    while batcher.running or batcher.waiting:
        step = planned(batcher)
        oldest = min(sequence.request.request_id for sequence in batcher)
        assert oldest in ids(step)
        ended += [end.request_id for end in finish(batcher, step).finished]
        steps += 1
        assert steps < 500
    assert ended == [1, 2, 3, 4]


def test_a_lower_priority_is_preempted_before_an_older_request() -> None:
    batcher, _ = make(num_pages=1 + 8)
    add(batcher, 1, [11] * 7, new=20, priority=1)
    add(batcher, 2, [12] * 7, new=20, priority=0)
    while not batcher.stats.preemptions:
        finish(batcher, planned(batcher))
    assert [sequence.request.request_id for sequence in batcher if sequence.state == "waiting"] == [1]


def test_prompt_logprobs_start_anew_when_a_prefill_is_preempted() -> None:
    batcher, _ = make(num_pages=1 + 21, max_step_tokens=3)
    add(batcher, 1, [11] * 3, new=60)
    finish(batcher, planned(batcher))
    add(batcher, 2, [12] * 60, prefill_logprobs=True, prefill_top_n_tokens=1, new=2)
    while not batcher.stats.preemptions:
        finish(batcher, planned(batcher))
    (younger,) = (sequence for sequence in batcher if sequence.state == "waiting")
    assert 1 < len(younger.prompt_logprobs) < 60
    told = []
    while batcher.running or batcher.waiting:
        ended = finish(batcher, planned(batcher)).finished
        told += [(len(end.prefill_logprobs), len(end.prefill_top)) for end in ended]
    assert told == [(0, 0), (60, 60)]


def test_pages_on_their_way_back_are_waited_for_before_another_is_preempted() -> None:
    batcher, _ = make(num_pages=1 + 12, prefix_caching=False)
    for request_id in (1, 2, 3):
        add(batcher, request_id, [10 + request_id] * 3, new=40)
    in_flight = [planned(batcher)]
    while not batcher.stats.preemptions:
        step = batcher.plan()
        in_flight += [step] if step is not None else []
        finish(batcher, in_flight.pop(0))
    # The third was in flight, so its pages are not back yet: the others stall for a step rather than lose theirs.
    assert [sequence.state for sequence in batcher] == ["running", "running", "waiting"]
    assert batcher.stats.preemptions == 1


def test_newcomers_leave_the_running_ones_room_to_grow() -> None:
    batcher, _ = make(num_pages=1 + 10)
    add(batcher, 1, [11] * 15, new=20)
    finish(batcher, planned(batcher))
    add(batcher, 2, [12] * 11, new=20)  # 3 pages, of 6 that are free and 4 that are kept back
    assert ids(planned(batcher)) == [1]
    add(batcher, 3, [13] * 3, new=20)
    assert batcher.waiting == 2, "nobody overtakes"


def test_a_request_id_in_use_is_refused() -> None:
    batcher, _ = make()
    add(batcher, 1, [11])
    add(batcher, 1, [12])
    assert [failed.error_type for failed in batcher.take_events().failed] == ["validation"]


@pytest.mark.parametrize(
    ("prompt", "sampling", "stops", "what"),
    [
        ([VOCABULARY], SamplingParams(), (), "input_ids"),
        ([1, -1], SamplingParams(), (), "input_ids"),
        ([1], SamplingParams(logit_bias=((VOCABULARY, 1.0),)), (), "logit_bias"),
        ([1], SamplingParams(logit_bias=((-1, 1.0),)), (), "logit_bias"),
        ([1], SamplingParams(), (VOCABULARY + 5,), "stop_token_ids"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(
    prompt: list[int], sampling: SamplingParams, stops: tuple[int, ...], what: str
) -> None:
    batcher, _ = make()
    batcher.add(Request(1, tuple(prompt), sampling, StopRules(3, stop_token_ids=stops)), 0.0)
    (failed,) = batcher.take_events().failed
    assert failed.error_type == "validation"
    assert failed.message == f"{what} holds a token id outside 0 .. {VOCABULARY - 1}."


@pytest.mark.parametrize(("decoding", "tokens"), [(0, 64), (1, 16), (FEW_DECODE_ROWS, 16), (FEW_DECODE_ROWS + 1, 8)])
def test_prompts_get_less_of_a_step_the_more_sequences_wait_for_its_end(decoding: int, tokens: int) -> None:
    limits = replace(make(max_step_tokens=64)[0].limits, max_mixed_tokens=8)
    assert limits.step_tokens(decoding) == tokens
    assert replace(limits, max_step_tokens=10).step_tokens(decoding) == min(tokens, 10)


def test_tokens_after_a_long_context_count_for_more_of_a_step() -> None:
    batcher, _ = make(even_context=20)
    add(batcher, 1, [11] * 100)
    chunks: list[tuple[int, int]] = []
    while not chunks or sum(chunks[-1]) < 100:
        step = planned(batcher)
        (new,), (length,) = step.plan.query_lens, step.plan.kv_lens
        chunks.append((length - new, new))
        finish(batcher, step)
    assert chunks[:4] == [(0, 16), (16, 16), (32, 10), (42, 7)]
    assert all(batcher.limits.cost(new, context) <= 16 for context, new in chunks)
    assert [sequence.request.request_id for sequence in step.sampled] == [1], "the last chunk is not cut ever smaller"


@pytest.mark.parametrize("context", [0, 19, 20, 21, 33, 1000])
def test_what_a_rest_costs_pays_for_all_of_it(context: int) -> None:
    limits = make(even_context=20)[0].limits
    for tokens in range(1, 50):
        assert tokens <= limits.affordable(limits.cost(tokens, context), context) <= limits.cost(tokens, context)
        assert limits.affordable(tokens, context) >= 1, "there is always progress"
    assert limits.affordable(0, context) == 0
