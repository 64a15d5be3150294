from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tgi_gateway.testing.echo import ECHO_CAPABILITIES, EchoBackend
from tgi_gateway.testing.worker import FIRST_BYTE, Worker, byte_toy, error_text

COMPLETIONS = "/v1/completions"


def body(prompt: object = "abc", **parameters: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0} | parameters


def texts(answer: Any) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


async def test_a_text_is_completed_in_openais_form(worker: Worker) -> None:
    answer = await worker.answer(COMPLETIONS, body(max_tokens=4, model="tgi"))
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1.7e9
    assert answer.pop("system_fingerprint")
    assert answer == {
        "object": "text_completion",
        "model": "echo",
        "choices": [{"index": 0, "text": "abca", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_several_prompts_are_answered_in_their_order(worker: Worker) -> None:
    answer = await worker.answer(COMPLETIONS, body(["abcdefgh", "x", "yz"], max_tokens=3))
    assert texts(answer) == ["abc", "xxx", "yzy"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == 11
    assert answer["usage"]["completion_tokens"] == 9


async def test_n_choices_of_each_prompt_stand_together_and_share_its_tokens(worker: Worker) -> None:
    wanted = body(["ab", "cd"], n=2, max_tokens=2, echo=True)
    answer = await worker.answer(COMPLETIONS, wanted)
    assert texts(answer) == ["abab", "abab", "cdcd", "cdcd"]
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 8
    events = await worker.events(COMPLETIONS, wanted | {"stream": True, "stream_options": {"include_usage": True}})
    assert events[-2]["usage"]["prompt_tokens"] == 4
    assert events[-2]["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("prompt", [[FIRST_BYTE + 40, FIRST_BYTE + 41], [[FIRST_BYTE + 40, FIRST_BYTE + 41]]])
async def test_token_ids_are_a_prompt_too(worker: Worker, prompt: object) -> None:
    answer = await worker.answer(COMPLETIONS, body(prompt, max_tokens=3, echo=True))
    assert texts(answer) == ["IJIJI"]


async def test_token_ids_outside_the_vocabulary_are_refused(worker: Worker) -> None:
    assert "names token 4000000000" in await worker.error(COMPLETIONS, body([4_000_000_000]))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "Empty array detected. Do not use an empty array for the prompt."),
        (["a", 1], "mixes texts and token ids"),
        ({"a": 1}, "Expected"),
        (None, "Expected"),
    ],
)
async def test_other_prompts_are_rejected(worker: Worker, prompt: object, message: str) -> None:
    response = await worker.post(COMPLETIONS, body(prompt))
    assert response.status_code == 422
    assert error_text(response.json()).startswith("Failed to deserialize the JSON body into the target type: ")
    assert message in response.text


@pytest.mark.parametrize("suffix", ["", "x"])
async def test_a_suffix_is_refused_before_the_number_of_prompts(worker: Worker, suffix: str) -> None:
    response = await worker.post(COMPLETIONS, body(["a"] * 9, suffix=suffix, stream=True))
    assert response.status_code == 422
    assert error_text(response.json()) == "Suffix is not supported and can be achieved by preprocessing the prompt."
    assert response.json()["error_type"] == "suffix not supported"


async def test_too_many_prompts_are_refused(worker: Worker) -> None:
    response = await worker.post(COMPLETIONS, body(["a"] * 5))
    assert response.status_code == 422
    assert error_text(response.json()) == "Number of prompts exceeds the maximum allowed batch size of 4"


async def test_a_stop_string_is_removed(worker: Worker) -> None:
    answer = await worker.answer(COMPLETIONS, body("abcdef", stop=["de"]))
    assert texts(answer) == ["abc"]
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_logprobs_tell_tokens_and_offsets(worker: Worker) -> None:
    wanted = body("ab</s>", logprobs=2)
    (choice,) = (await worker.answer(COMPLETIONS, wanted))["choices"]
    assert choice["text"] == "ab"
    told = choice["logprobs"]
    assert told["tokens"] == ["a", "b", "</s>"]
    assert told["text_offset"] == [0, 1, 2]
    assert all(value < 0 for value in told["token_logprobs"])
    assert list(told["top_logprobs"][0]) == ["a", "b"]
    events = await worker.events(COMPLETIONS, wanted | {"stream": True})
    streamed = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert [each["tokens"] for each in streamed] == [["a"], ["b"], ["</s>"]]
    assert [each["text_offset"] for each in streamed] == [[0], [1], [2]]


async def test_logprobs_zero_tells_no_alternatives(worker: Worker) -> None:
    (choice,) = (await worker.answer(COMPLETIONS, body(max_tokens=1, logprobs=0)))["choices"]
    assert choice["logprobs"]["top_logprobs"] is None
    assert len(choice["logprobs"]["token_logprobs"]) == 1


async def test_best_of_returns_the_likeliest_in_order(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(max_best_of=8)
    wanted = body(["abcdef", "xyz"], max_tokens=12, temperature=9.0, seed=3)
    all_of_them = await worker.answer(COMPLETIONS, wanted | {"n": 8, "logprobs": 0})
    best = await worker.answer(COMPLETIONS, wanted | {"n": 2, "best_of": 8})
    expected: list[str] = []
    for first in (0, 8):
        group = all_of_them["choices"][first : first + 8]
        ranked = sorted(group, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
        expected += [choice["text"] for choice in ranked[:2]]
    assert texts(best) == expected
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == 2 * 8 * 12
    assert "`best_of` must be <= 8" in await worker.error(COMPLETIONS, wanted | {"best_of": 9})
    assert "`best_of` must be >= `n`" in await worker.error(COMPLETIONS, wanted | {"n": 3, "best_of": 2})
    refused = await worker.error(COMPLETIONS, wanted | {"best_of": 2, "stream": True}, 400)
    assert "`best_of` (2) above `n` (1) cannot be streamed, as at OpenAI" in refused


async def test_echo_with_logprobs_scores_the_prompt(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(enable_prefill_logprobs=True)
    (choice,) = (await worker.answer(COMPLETIONS, body("aba", max_tokens=2, echo=True, logprobs=0)))["choices"]
    assert choice["text"] == "abaab"
    told = choice["logprobs"]
    assert told["tokens"] == list("abaab")
    assert told["text_offset"] == [0, 1, 2, 3, 4]
    assert told["token_logprobs"][0] is None
    assert all(value < 0 for value in told["token_logprobs"][1:])
    assert told["top_logprobs"] is None


async def test_echo_with_logprobs_tells_the_prompts_alternatives(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(enable_prefill_logprobs=True)
    wanted = body("aba", max_tokens=2, echo=True, logprobs=2)
    (choice,) = (await worker.answer(COMPLETIONS, wanted))["choices"]
    told = choice["logprobs"]
    first, *others = told["top_logprobs"]
    assert first is None
    # An echo expects an "a" after each "a" of the prompt; "b" is the next likely, and what is there comes in any case.
    assert [list(each) for each in others] == [["a", "b"], ["a", "b"], ["a", "b"], ["b", "c"]]
    for token, value, top in zip(told["tokens"][1:], told["token_logprobs"][1:], others, strict=True):
        assert top[token] == value
    events = (await worker.events(COMPLETIONS, wanted | {"stream": True}))[:-1]
    assert [texts(event) for event in events] == [["aba"], ["a"], ["b"]]
    for name, values in told.items():
        streamed = [event["choices"][0]["logprobs"][name] for event in events]
        assert [value for part in streamed for value in part] == values


async def test_a_token_that_is_there_is_told_beside_the_likeliest(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(enable_prefill_logprobs=True)
    (choice,) = (await worker.answer(COMPLETIONS, body("ac", max_tokens=1, echo=True, logprobs=1)))["choices"]
    assert [list(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [["a", "c"], ["a"]]


async def test_too_many_alternatives_of_a_prompt_are_refused(
    start_worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_gateway.prompt.validate.MAX_PROMPT_ALTERNATIVES", 100)
    worker: Worker = await start_worker(enable_prefill_logprobs=True)
    await worker.answer(COMPLETIONS, body("x" * 20, max_tokens=0, echo=True, logprobs=5))
    refused = await worker.error(COMPLETIONS, body("x" * 21, max_tokens=0, echo=True, logprobs=5))
    assert "5 alternatives of each of 21 prompt tokens are 105; allowed are 100" in refused


@pytest.mark.parametrize(
    ("lacking", "message"),
    [("prefill_logprobs", "no log-probabilities of prompts"), ("prefill_top_n_tokens", "no alternatives of a prompt")],
)
async def test_an_engine_that_cannot_score_prompts_says_so(
    start_worker: Callable[..., Any], lacking: str, message: str
) -> None:
    able = replace(ECHO_CAPABILITIES, features=ECHO_CAPABILITIES.features - {lacking})
    worker: Worker = await start_worker(EchoBackend(byte_toy(), capabilities=able), enable_prefill_logprobs=True)
    assert message in await worker.error(COMPLETIONS, body(echo=True, logprobs=1), 400)


async def test_max_tokens_zero_scores_the_prompt_and_writes_nothing(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(enable_prefill_logprobs=True)
    wanted = body("ab</s>", max_tokens=0, echo=True, logprobs=1)
    answer = await worker.answer(COMPLETIONS, wanted)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab</s>", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "</s>"]
    assert [len(values) for values in choice["logprobs"].values()] == [3, 3, 3, 3]
    assert (answer["usage"]["completion_tokens"], answer["usage"]["total_tokens"]) == (0, 3)
    events = (await worker.events(COMPLETIONS, wanted | {"stream": True}))[:-1]
    assert [texts(event) for event in events] == [["ab</s>"], [""]]
    assert events[0]["choices"][0]["logprobs"] == choice["logprobs"]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == 0


async def test_max_tokens_zero_is_an_empty_answer_without_echo(worker: Worker) -> None:
    answer = await worker.answer(COMPLETIONS, body(["a", "</s>"], max_tokens=0))
    assert texts(answer) == ["", ""]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert "`min_tokens` must be <= `max_tokens`" in await worker.error(COMPLETIONS, body(max_tokens=0, min_tokens=1))


async def test_echo_with_logprobs_says_which_flag_it_needs(worker: Worker) -> None:
    for stream in (False, True):
        refused = await worker.error(COMPLETIONS, body(stream=stream, echo=True, logprobs=0), 400)
        assert "--enable-prefill-logprobs" in refused


async def test_tokens_that_are_no_characters_are_told_as_bytes(worker: Worker) -> None:
    (choice,) = (await worker.answer(COMPLETIONS, body("ä", max_tokens=2, logprobs=1)))["choices"]
    assert choice["text"] == "ä"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa4"]
    assert next(iter(choice["logprobs"]["top_logprobs"][0])) == "bytes:\\xc3"


async def test_a_stream_ends_with_reason_usage_and_done(worker: Worker) -> None:
    events = await worker.events(COMPLETIONS, body("ab", max_tokens=3, stream=True))
    assert events[-1] == "[DONE]"
    assert [texts(event) for event in events[:-1]] == [["a"], ["b"], ["a"]]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, "length"]
    assert ["usage" in event for event in events[:-1]] == [False, False, True]
    assert events[-2]["usage"]["total_tokens"] == 5


async def test_a_stream_tells_the_sum_of_its_usage_on_request(worker: Worker) -> None:
    wanted = body(["ab", "c"], max_tokens=3, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = await worker.events(COMPLETIONS, wanted)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == ([], 3, 6)
    streamed = ["", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == ["aba", "ccc"]


async def test_a_stream_may_begin_with_the_prompt(worker: Worker) -> None:
    events = await worker.events(COMPLETIONS, body("ab", max_tokens=1, stream=True, echo=True))
    assert [texts(event) for event in events[:-1]] == [["ab"], ["a"]]


async def test_a_special_token_is_no_text(worker: Worker) -> None:
    answer = await worker.answer(COMPLETIONS, body("ab</s>"))
    assert texts(answer) == ["ab"]
    events = await worker.events(COMPLETIONS, body("ab</s>", stream=True))
    assert [texts(event) for event in events[:-1]] == [["a"], ["b"], [""]]


async def test_headers_are_sums_without_compute_time(worker: Worker) -> None:
    response = await worker.post(COMPLETIONS, body(["abc", "de"], max_tokens=2))
    assert response.headers["x-compute-characters"] == "5"
    assert response.headers["x-prompt-tokens"] == "5"
    assert response.headers["x-generated-tokens"] == "4"
    assert "x-compute-time" not in response.headers
