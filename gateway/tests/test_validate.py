from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tgi_gateway.errors import ValidationError
from tgi_gateway.prompt import validate as subject
from tgi_gateway.prompt.validate import Limits, Parameters, Valid
from tgi_gateway.types import Grammar, SamplingParams

LIMITS = Limits(
    max_best_of=2,
    max_stop_sequences=4,
    max_top_n_tokens=5,
    max_client_batch_size=4,
    max_input_tokens=20,
    max_total_tokens=30,
    vocab_size=1000,
    grammar=True,
    prefill_logprobs=False,
)


@dataclass
class Encoded:
    ids: Sequence[int]


@dataclass
class Words:
    """One token per word, its id the word's length; remembers what it was asked."""

    calls: list[tuple[str, bool]] = field(default_factory=list)

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> Encoded:
        self.calls.append((text, add_special_tokens))
        return Encoded([len(word) for word in text.split()])


async def valid(inputs: str | Sequence[int] = "one two", limits: Limits = LIMITS, **parameters: Any) -> Valid:
    return await subject.validate(inputs, Parameters(**parameters), limits, Words())


async def refusal(inputs: str | Sequence[int] = "one two", limits: Limits = LIMITS, **parameters: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        await valid(inputs, limits, **parameters)
    return caught.value.detail


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
        ({"temperature": -1.0}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"presence_penalty": 2.1}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"min_p": 1.5}, "`min_p` must be >= 0.0 and <= 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_k": -3}, "`top_k` must be strictly positive"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"stop": ["a" * 1025]}, "`stop` sequences may have up to 1024 characters. Given: one of 1025"),
        ({"seed": 1, "best_of": 2, "do_sample": True}, "`seed` must not be set when `best_of` > 1"),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"logit_bias": {1000: 1.0}}, "`logit_bias` names token 1000; this model has 1000 tokens"),
        ({"stop_token_ids": [-1]}, "`stop_token_ids` names token -1; this model has 1000 tokens"),
        ({"logit_bias": {1: 101.0}}, "`logit_bias` values must be >= -100.0 and <= 100.0"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 20. Given: 0"),
        ({"truncate": 21}, "`truncate` must be strictly positive and less than 20. Given: 21"),
        (
            {"max_new_tokens": 29},
            "`inputs` tokens + `max_new_tokens` must be <= 30. Given: 2 `inputs` tokens and 29 `max_new_tokens`",
        ),
        ({"min_new_tokens": 4, "max_new_tokens": 3}, "`min_new_tokens` must be <= `max_new_tokens`. Given: 4 and 3"),
    ],
)
async def test_a_broken_rule_is_told_in_tgis_words(parameters: dict[str, Any], message: str) -> None:
    assert await refusal(**parameters) == message


async def test_best_of_is_refused_by_name_where_the_operator_allows_none() -> None:
    only_one = replace(LIMITS, max_best_of=1)
    assert (
        await refusal(limits=only_one, best_of=2, do_sample=True) == "`best_of` != 1 is not allowed for this endpoint"
    )
    await valid(limits=only_one, best_of=1)


async def test_the_first_broken_rule_of_the_list_is_told() -> None:
    wrong: dict[str, Any] = {
        "temperature": 0.0,
        "repetition_penalty": 0.0,
        "frequency_penalty": 3.0,
        "top_p": 2.0,
        "typical_p": 2.0,
        "top_k": 0,
        "max_new_tokens": 0,
        "stop": ["x"] * 5,
        "top_n_tokens": 9,
    }
    told = []
    while wrong:
        message = await refusal("", **wrong)
        broken = message.split("`")[1]
        told.append(broken)
        del wrong[broken]
    assert told == [
        "temperature",
        "repetition_penalty",
        "frequency_penalty",
        "top_p",
        "typical_p",
        "top_k",
        "max_new_tokens",
        "stop",
        "top_n_tokens",
    ]
    assert await refusal("", truncate=0) == "`inputs` cannot be empty"
    assert (await refusal(" ".join("a" * 40), truncate=0)).startswith("`truncate`")
    assert (await refusal(" ".join("a" * 40), max_new_tokens=1)).startswith("`inputs` tokens + `max_new_tokens`")


async def test_cheap_rules_are_checked_before_the_text_is_tokenized() -> None:
    words = Words()
    for parameters in (Parameters(top_k=0), Parameters(truncate=0), Parameters(stop=["a"] * 9)):
        with pytest.raises(ValidationError):
            await subject.validate("a b", parameters, LIMITS, words)
    assert words.calls == []


@pytest.mark.parametrize(("inputs", "message"), [("", "`inputs` cannot be empty"), ("   ", "`inputs` cannot be empty")])
async def test_a_prompt_without_tokens_is_refused(inputs: str, message: str) -> None:
    assert await refusal(inputs) == message


async def test_a_prompt_may_be_as_long_as_the_limit_and_no_longer() -> None:
    assert len((await valid(" ".join("a" * 20))).request.input_ids) == 20
    assert await refusal(" ".join("a" * 21)) == "`inputs` must have less than 20 tokens. Given: 21"


async def test_without_room_for_a_token_the_message_tells_of_one() -> None:
    tight = replace(LIMITS, max_total_tokens=20)
    assert await refusal(" ".join("a" * 20), tight) == (
        "`inputs` tokens + `max_new_tokens` must be <= 20. Given: 20 `inputs` tokens and 1 `max_new_tokens`"
    )


async def test_without_max_new_tokens_the_answer_may_fill_the_room() -> None:
    assert (await valid("a b c")).request.stop.max_new_tokens == 27
    assert (await valid("a b c", max_new_tokens=27)).request.stop.max_new_tokens == 27


async def test_truncation_keeps_the_end_of_the_prompt_and_counts_before_the_length_rules() -> None:
    prompt = " ".join("x" * length for length in range(1, 41))
    assert (await valid(prompt, truncate=3)).request.input_ids == (38, 39, 40)
    assert (await valid("a bb", truncate=3)).request.input_ids == (1, 2)


async def test_token_ids_are_taken_as_they_are_if_the_model_has_them() -> None:
    assert (await valid([5, 999])).request.input_ids == (5, 999)
    assert await refusal([5, 1000]) == "`inputs` names token 1000; this model has 1000 tokens"
    assert await refusal([]) == "`inputs` cannot be empty"


async def test_special_tokens_are_added_unless_the_template_has_them() -> None:
    words = Words()
    await subject.validate("a", Parameters(), LIMITS, words)
    await subject.validate("a", Parameters(), LIMITS, words, add_special_tokens=False)
    assert words.calls == [("a", True), ("a", False)]


async def test_without_parameters_everything_is_neutral() -> None:
    request = (await valid()).request
    assert replace(request.sampling, seed=0) == SamplingParams()
    assert (request.logprobs, request.top_n_tokens, request.prefill_logprobs) == (False, 0, False)


@pytest.mark.parametrize(
    "parameters",
    [
        {"do_sample": True},
        {"temperature": 0.5},
        {"top_k": 1},
        {"top_p": 0.5},
        {"typical_p": 0.5},
        {"min_p": 0.5},
    ],
)
async def test_a_parameter_that_only_matters_for_sampling_turns_it_on(parameters: dict[str, Any]) -> None:
    found = await valid(**parameters)
    assert found.request.sampling.do_sample
    assert found.seed == found.request.sampling.seed


async def test_a_greedy_request_tells_no_seed() -> None:
    assert (await valid(temperature=1.0, seed=7)).seed is None


async def test_a_missing_seed_is_drawn_anew_each_time() -> None:
    seeds = {(await valid(do_sample=True)).seed for _ in range(5)}
    assert len(seeds) == 5
    assert all(seed is not None and 0 <= seed < 2**64 for seed in seeds)


async def test_values_beyond_float32_become_its_indistinguishable_bounds() -> None:
    assert (await valid(temperature=1e300)).request.sampling.temperature == 1e6
    assert (await valid(temperature=1e-300)).request.sampling.temperature == 1e-6
    assert (await valid(repetition_penalty=1e-300)).request.sampling.repetition_penalty == 1e-6


async def test_prompt_logprobs_are_only_computed_where_the_operator_allows_them() -> None:
    allowed = replace(LIMITS, prefill_logprobs=True)
    assert not (await valid(prefill=True)).request.prefill_logprobs
    assert (await valid(limits=allowed, prefill=True)).request.prefill_logprobs


async def test_a_grammar_is_refused_last_where_the_operator_forbids_it() -> None:
    grammar = Grammar("regex", "a+")
    without = replace(LIMITS, grammar=False)
    assert (await valid(grammar=grammar)).request.sampling.grammar == grammar
    assert await refusal(limits=without, grammar=grammar) == "grammar is not supported"
    assert (await refusal("a " * 21, without, grammar=grammar)).startswith("`inputs` must have")


def test_a_stream_delivers_neither_several_answers_nor_the_prompt() -> None:
    for count in (0, 2):
        with pytest.raises(ValidationError, match="`best_of` != 1 is not supported when streaming tokens"):
            subject.check_streaming(Parameters(best_of=count))
    with pytest.raises(ValidationError, match="`decoder_input_details` == true is not supported when streaming tokens"):
        subject.check_streaming(Parameters(prefill=True))
    subject.check_streaming(Parameters(best_of=1))


async def test_copies_differ_in_their_seed_alone() -> None:
    first = await valid(do_sample=True, seed=2**64 - 1)
    _, second, third = subject.copies(first, 3, seeds_follow=True)
    assert [second.seed, third.seed] == [0, 1]
    assert replace(second.request, sampling=first.request.sampling) == first.request
    drawn = subject.copies(first, 3, seeds_follow=False)
    assert len({copy.request.sampling.seed for copy in drawn}) == 3


async def test_copies_of_a_greedy_request_tell_no_seed() -> None:
    assert [copy.seed for copy in subject.copies(await valid(), 2, seeds_follow=False)] == [None, None]


def test_the_mean_ignores_what_is_unknown() -> None:
    assert subject.mean_logprob([-1.0, math.nan, -3.0]) == -2.0
    assert subject.mean_logprob([]) == -math.inf
    assert subject.mean_logprob([math.nan]) == -math.inf
