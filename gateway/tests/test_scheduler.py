"""Admission as arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tgi_gateway.backend import ALL_FEATURES, Capabilities, Capacity
from tgi_gateway.errors import Unsupported, ValidationError
from tgi_gateway.host.scheduler import (
    GROWTH_TOKENS,
    Room,
    needed_kv_tokens,
    refuse_impossible,
    room,
    room_after,
)
from tgi_gateway.testing import toy_model
from tgi_gateway.types import Request, SamplingParams, StopRules

MODEL = toy_model(vocab_size=100, max_total_tokens=50, max_input_tokens=40, max_sequences=4)
ALL = Capabilities(features=ALL_FEATURES)


def request(prompt_tokens: int = 10, max_new_tokens: int = 10) -> Request:
    return Request(1, (1,) * prompt_tokens, SamplingParams(), StopRules(max_new_tokens))


def test_a_request_needs_its_prompt_and_a_little_output() -> None:
    assert needed_kv_tokens(request(10, 5)) == 15
    assert needed_kv_tokens(request(10, 10_000)) == 10 + GROWTH_TOKENS


def test_room_counts_what_capacity_does_not_show_yet() -> None:
    capacity = Capacity(max_sequences=4, free_sequences=4, total_kv_tokens=100, free_kv_tokens=100)
    assert room(capacity, running=3, unseen_kv_tokens=60) == Room(sequences=1, kv_tokens=40)


def test_room_believes_a_capacity_that_is_smaller_than_expected() -> None:
    capacity = Capacity(max_sequences=4, free_sequences=1, total_kv_tokens=100, free_kv_tokens=20)
    assert room(capacity, running=0, unseen_kv_tokens=0) == Room(sequences=1, kv_tokens=20)


@pytest.mark.parametrize(
    ("free", "enters"), [(Room(1, 20), True), (Room(0, 1000), False), (Room(9, 19), False), (Room(1, 21), True)]
)
def test_a_request_enters_when_a_sequence_and_its_tokens_are_free(free: Room, enters: bool) -> None:
    after = room_after(request(10, 10), free, alone=False)
    assert after == (Room(free.sequences - 1, free.kv_tokens - 20) if enters else None)


def test_alone_a_request_enters_whatever_a_late_capacity_says() -> None:
    assert room_after(request(), Room(0, 0), alone=True) is not None


def test_a_request_that_just_fits_is_not_refused() -> None:
    refuse_impossible(request(40, 10), MODEL, ALL)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request(0, 1), "cannot be empty"),
        (request(1, 0), "`max_new_tokens` must be strictly positive"),
        (request(41, 1), "must have less than 40 tokens. Given: 41"),
        (request(40, 11), "must be <= 50. Given: 40 `inputs` tokens and 11 `max_new_tokens`"),
        (replace(request(), stop=StopRules(5, min_new_tokens=6)), "`min_new_tokens` is 6"),
        (replace(request(), sampling=SamplingParams(logit_bias=((100, 1.0),))), "`logit_bias` has token id 100"),
        (replace(request(), stop=StopRules(5, stop_token_ids=(-3,))), "`stop_token_ids` has token id -3"),
    ],
)
def test_what_can_never_run_is_refused_with_its_reason(wrong: Request, message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("(", r"\(")):
        refuse_impossible(wrong, MODEL, ALL)


def test_a_request_longer_than_the_whole_kv_memory_is_refused() -> None:
    model = replace(MODEL, max_batch_total_tokens=30)
    with pytest.raises(ValidationError, match="must be <= 30"):
        refuse_impossible(request(25, 10), model, ALL)


def test_an_undeclared_feature_is_refused() -> None:
    with pytest.raises(Unsupported, match="`sampling`"):
        refuse_impossible(replace(request(), sampling=SamplingParams(do_sample=True)), MODEL, Capabilities())
