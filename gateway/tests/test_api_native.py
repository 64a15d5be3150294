from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tgi_gateway.errors import IncompleteGeneration
from tgi_gateway.testing.echo import ECHO_CAPABILITIES, EchoBackend
from tgi_gateway.testing.scripted import Script, ScriptedBackend, ScriptedToken
from tgi_gateway.testing.worker import EOS, FIRST_BYTE, Worker, byte_toy


def token(char: str) -> int:
    """The id of an ASCII letter, by the order that the byte alphabet has."""
    return FIRST_BYTE + ord(char) - ord("!")


def scripted(*scripts: Script, **more: Any) -> ScriptedBackend:
    return ScriptedBackend(scripts, byte_toy(), **more)


def body(inputs: str = "abc", **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": parameters}


async def test_generate_answers_with_the_text_alone(worker: Worker) -> None:
    assert await worker.answer("/generate", body("abc", max_new_tokens=5)) == {"generated_text": "abcab"}


async def test_parameters_may_be_left_out_and_the_answer_is_greedy(worker: Worker) -> None:
    answer = await worker.answer("/generate", {"inputs": "ab"})
    assert answer["generated_text"] == "ab" * 255


async def test_details_tell_each_token(worker: Worker) -> None:
    answer = await worker.answer("/generate", body("é", max_new_tokens=3, details=True))
    details = answer["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("length", 3, None)
    assert details["prefill"] == []
    assert [each["text"] for each in details["tokens"]] == ["", "é", "\N{REPLACEMENT CHARACTER}"]
    assert all(set(each) == {"id", "text", "logprob", "special"} for each in details["tokens"])
    assert all(each["logprob"] < 0 for each in details["tokens"])


async def test_a_special_token_is_shown_but_is_no_text(worker: Worker) -> None:
    answer = await worker.answer("/generate", body("ab</s>", max_new_tokens=9, details=True))
    assert answer["generated_text"] == "ab"
    details = answer["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("eos_token", 3)
    last = details["tokens"][-1]
    assert (last["id"], last["text"], last["special"]) == (EOS, "</s>", True)


async def test_the_full_text_begins_with_the_prompt(worker: Worker) -> None:
    answer = await worker.answer("/generate", body("abc", max_new_tokens=2, return_full_text=True))
    assert answer["generated_text"] == "abcab"


async def test_the_stop_sequence_stays_in_the_text(worker: Worker) -> None:
    answer = await worker.answer("/generate", body("abcdef", stop=["cd"], details=True))
    assert answer["generated_text"] == "abcd"
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["details"]["generated_tokens"] == 4


async def test_truncation_keeps_the_prompts_end(worker: Worker) -> None:
    assert (await worker.answer("/generate", body("abcdef", truncate=2, max_new_tokens=4)))["generated_text"] == "efef"


async def test_a_given_seed_is_told_and_fixes_the_answer(worker: Worker) -> None:
    wanted = body(max_new_tokens=20, do_sample=True, temperature=20.0, seed=2**64 - 1, details=True)
    first, second = [await worker.answer("/generate", wanted) for _ in range(2)]
    assert first == second
    assert first["details"]["seed"] == 2**64 - 1


async def test_the_most_likely_tokens_are_aligned_with_the_tokens(worker: Worker) -> None:
    details = (await worker.answer("/generate", body("ab", max_new_tokens=3, top_n_tokens=2, details=True)))["details"]
    assert len(details["top_tokens"]) == 3
    assert [[each["text"] for each in row] for row in details["top_tokens"]] == [["a", "b"], ["b", "c"], ["a", "b"]]
    assert details["top_tokens"][0][0] == details["tokens"][0]


async def test_prompt_tokens_are_told_where_the_operator_allows_it(
    worker: Worker, start_worker: Callable[..., Any]
) -> None:
    wanted = body("abc", max_new_tokens=1, decoder_input_details=True)
    closed = await worker.answer("/generate", wanted)
    assert closed["details"]["prefill"] == []
    opened = await (await start_worker(enable_prefill_logprobs=True)).answer("/generate", wanted)
    prefill = opened["details"]["prefill"]
    assert [each["text"] for each in prefill] == ["a", "b", "c"]
    assert prefill[0]["logprob"] is None
    assert all(each["logprob"] < 0 for each in prefill[1:])


async def test_prompt_tokens_are_told_also_where_a_stop_sequence_ended_it(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(enable_prefill_logprobs=True)
    answer = await worker.answer("/generate", body("abc", stop=["b"], decoder_input_details=True))
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert [each["text"] for each in answer["details"]["prefill"]] == ["a", "b", "c"]


async def test_the_best_of_several_answers_is_returned_with_the_others(worker: Worker) -> None:
    wanted = body("abc", best_of=2, do_sample=True, temperature=10.0, max_new_tokens=6, details=True)
    for _ in range(5):
        details = (await worker.answer("/generate", wanted))["details"]
        (other,) = details["best_of_sequences"]
        best_mean, other_mean = (
            sum(each["logprob"] for each in one["tokens"]) / len(one["tokens"]) for one in (details, other)
        )
        assert best_mean >= other_mean
        assert details["seed"] != other["seed"]
        assert set(other) == {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"}


async def test_headers_tell_times_and_counts(worker: Worker) -> None:
    response = await worker.post("/generate", body("héllo", max_new_tokens=4))
    headers = response.headers
    assert headers["x-compute-characters"] == "5"
    assert headers["x-prompt-tokens"] == "6"
    assert headers["x-generated-tokens"] == "4"
    assert headers["x-compute-type"] == "1-none"
    assert float(headers["x-compute-time"]) > 0
    for name in ("total", "validation", "queue", "inference"):
        assert int(headers[f"x-{name}-time"]) >= 0
    assert int(headers["x-time-per-token"]) >= 0


async def test_the_root_route_answers_with_a_list_and_the_full_text(worker: Worker) -> None:
    assert await worker.answer("/", body("abc", max_new_tokens=2)) == [{"generated_text": "abcab"}]
    wanted = body("abc", max_new_tokens=2, return_full_text=False)
    assert await worker.answer("/", wanted) == [{"generated_text": "ab"}]


async def test_the_root_route_streams_on_request(worker: Worker) -> None:
    events = await worker.events("/", body("abc", max_new_tokens=2) | {"stream": True})
    assert [event["generated_text"] for event in events] == [None, "abcab"]


async def test_a_stream_has_one_event_per_token_and_the_text_in_the_last(worker: Worker) -> None:
    events = await worker.events("/generate_stream", body("ab", max_new_tokens=3, details=True))
    assert [event["index"] for event in events] == [1, 2, 3]
    assert [event["token"]["text"] for event in events] == ["a", "b", "a"]
    assert all(list(event) == ["index", "token", "generated_text", "details"] for event in events)
    assert [event["generated_text"] for event in events] == [None, None, "aba"]
    assert [event["details"] for event in events[:-1]] == [None, None]
    assert events[-1]["details"] == {
        "finish_reason": "length",
        "generated_tokens": 3,
        "seed": None,
        "input_length": 2,
    }


async def test_a_stream_tells_details_only_if_asked(worker: Worker) -> None:
    events = await worker.events("/generate_stream", body("ab", max_new_tokens=2))
    assert events[-1]["details"] is None
    assert events[-1]["generated_text"] == "ab"


async def test_a_streams_last_token_carries_what_was_left_of_the_text(worker: Worker) -> None:
    events = await worker.events("/generate_stream", body("é", max_new_tokens=3))
    assert [event["token"]["text"] for event in events] == ["", "é", "\N{REPLACEMENT CHARACTER}"]
    assert events[-1]["generated_text"] == "é\N{REPLACEMENT CHARACTER}"


async def test_a_stream_tells_the_most_likely_tokens_of_each_event(worker: Worker) -> None:
    events = await worker.events("/generate_stream", body("ab", max_new_tokens=2, top_n_tokens=1))
    assert [event["top_tokens"][0]["text"] for event in events] == ["a", "b"]


async def test_a_stream_and_a_whole_answer_agree(worker: Worker) -> None:
    wanted = body('q"\\\u2028é</s>\n\x00', max_new_tokens=9, details=True, do_sample=True, temperature=3.0, seed=4)
    whole = await worker.answer("/generate", wanted)
    events = await worker.events("/generate_stream", wanted)
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert events[-1]["generated_text"] == whole["generated_text"]


async def test_no_event_contains_what_a_reader_might_take_for_a_lines_end(worker: Worker) -> None:
    response = await worker.post("/generate_stream", body("a\u2028b\u2029c\x85d", max_new_tokens=16, details=True))
    for line in response.text.split("\n\n")[:-1]:
        assert line.splitlines() == [line]
    last = json.loads(response.text.split("\n\n")[-2][6:])
    assert last["generated_text"] == "a\u2028b\u2029c\x85da\u2028"


async def test_stream_headers_switch_buffering_off(worker: Worker) -> None:
    response = await worker.post("/generate_stream", body("abc", max_new_tokens=1))
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-compute-characters"] == "3"
    assert "content-length" not in response.headers


async def test_an_error_that_is_known_before_the_stream_begins_has_its_status(worker: Worker) -> None:
    response = await worker.post("/generate_stream", body("abc", best_of=2))
    assert response.status_code == 422
    assert response.json() == {
        "error": "Input validation error: `best_of` != 1 is not supported when streaming tokens",
        "error_type": "validation",
    }


async def test_a_failure_is_424_or_the_streams_last_event(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(scripted(Script.of(token("a"), token("b"), then="fail")))
    response = await worker.post("/generate", body("x"))
    assert response.status_code == 424
    assert response.json()["error_type"] == "generation"
    assert response.json()["error"].startswith("Request failed during generation: ")
    events = await worker.events("/generate_stream", body("x"))
    assert [event["token"]["text"] for event in events[:-1]] == ["a", "b"]
    assert events[-1] == response.json()


async def test_a_failure_before_the_first_token_has_its_status_in_a_stream(
    start_worker: Callable[..., Any],
) -> None:
    # The prompt is legal for the worker, but the engine itself refuses so many tokens.
    engine = scripted(Script.of(token("a")))
    worker: Worker = await start_worker(engine)
    engine.model = replace(engine.model, max_total_tokens=10)
    response = await worker.post("/generate_stream", body("x", max_new_tokens=100))
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"


async def test_a_lost_engine_is_an_incomplete_generation(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(EchoBackend(byte_toy(max_total_tokens=100_000), step_s=0.01))
    answer = asyncio.create_task(worker.post("/generate", body("x")))
    stream = asyncio.create_task(worker.events("/generate_stream", body("x")))
    chat = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    chunks = asyncio.create_task(worker.events("/v1/chat/completions", chat))
    for _ in range(1000):
        await asyncio.sleep(0.01)
        begun = [one.generated_tokens for one in worker.services.generations._open.values()]
        if len(begun) == 3 and all(begun):
            break
    worker.services.generations.close(IncompleteGeneration())
    response = await answer
    assert response.status_code == 500
    assert response.json() == {"error": "Incomplete generation", "error_type": "incomplete_generation"}
    last = (await stream)[-1]
    assert last == {"error": "Incomplete generation stream", "error_type": "incomplete_generation_stream"}
    *_, failure, done = await chunks
    assert done == "[DONE]"
    assert failure == {
        "error": {
            "message": "Incomplete generation",
            "type": "server_error",
            "param": None,
            "code": "incomplete_generation",
            "http_status_code": 500,
        },
        "error_type": "incomplete_generation",
    }
    assert 'tgi_request_failure{err="incomplete"} 3.0' in (await worker.client.get("/metrics")).text


async def test_a_defect_of_ours_is_told_without_its_text_and_logged_once(
    worker: Worker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("an address: 0x7f")

    monkeypatch.setattr(worker.services.tokenizer, "encode_async", broken)
    for path in ("/generate", "/generate_stream", "/tokenize"):
        caplog.clear()
        response = await worker.post(path, body("x"))
        assert response.status_code == 500
        assert response.json()["error"] == "Internal server error"
        tracebacks = [record for record in caplog.records if record.exc_info]
        assert len(tracebacks) == 1
    monkeypatch.undo()
    await worker.answer("/generate", body("x", max_new_tokens=1))


async def test_an_engine_that_dies_ends_answers_and_streams(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(scripted(Script.of(token("a"), then="crash")))
    events = await worker.events("/generate_stream", body("x"))
    assert events[0]["token"]["text"] == "a"
    assert set(events[-1]) == {"error", "error_type"}
    assert (await worker.post("/generate", body("x"))).status_code in (424, 500)


@pytest.mark.parametrize("ignore", [False, True])
async def test_end_of_sequence_may_be_ignored(worker: Worker, ignore: bool) -> None:
    answer = await worker.answer("/generate", body("a</s>", max_new_tokens=4, ignore_eos=ignore))
    assert answer["generated_text"] == ("aa" if ignore else "a")


async def test_what_the_engine_cannot_do_is_refused(start_worker: Callable[..., Any]) -> None:
    plain = EchoBackend(byte_toy(), capabilities=replace(ECHO_CAPABILITIES, features=frozenset()))
    worker: Worker = await start_worker(plain)
    for parameter in (
        {"do_sample": True},
        {"repetition_penalty": 2.0},
        {"watermark": True},
        {"adapter_id": "x"},
        {"grammar": {"type": "regex", "value": "a"}},
        {"top_n_tokens": 1},
    ):
        for path in ("/generate", "/generate_stream"):
            assert "this engine does not support" in await worker.error(path, body("a", **parameter))
    assert (await worker.answer("/generate", body("a", max_new_tokens=1)))["generated_text"] == "a"


async def test_unknown_logprobs_are_null(start_worker: Callable[..., Any]) -> None:
    nan = ScriptedToken(token("a"), logprob=float("nan"))
    infinite = ScriptedToken(token("b"), logprob=float("-inf"))
    worker: Worker = await start_worker(scripted(Script((nan, infinite))))
    events = await worker.events("/generate_stream", body("x"))
    assert [event["token"]["logprob"] for event in events[:2]] == [None, None]
    whole = await worker.answer("/generate", body("x", details=True))
    assert [each["logprob"] for each in whole["details"]["tokens"][:2]] == [None, None]


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({"type": "json", "value": "{"}, "grammar is not valid: "),
        ({"type": "json", "value": 3}, "grammar is not supported"),
        ({"type": "regex", "value": {}}, "grammar is not valid: a regex must be a string"),
        ({"type": "json_schema", "value": {"name": "x"}}, "grammar is not valid: `json_schema` needs an object"),
        ({"type": "json", "value": {"properties": {}}}, "this engine does not support `grammar`"),
        ({"type": "json", "value": '{"properties": {}}'}, "this engine does not support `grammar`"),
        ({"type": "json_schema", "value": {"schema": {}}}, "this engine does not support `grammar`"),
    ],
)
async def test_a_grammar_is_read_before_it_is_refused(worker: Worker, grammar: object, message: str) -> None:
    assert (await worker.error("/generate", body("a", grammar=grammar))).startswith(
        f"Input validation error: {message}"
    )


async def test_a_grammar_is_refused_in_tgis_words_where_the_operator_forbids_it(
    start_worker: Callable[..., Any],
) -> None:
    worker: Worker = await start_worker(disable_grammar_support=True)
    wanted = body("a", grammar={"type": "regex", "value": "a"})
    assert await worker.error("/generate", wanted) == "Input validation error: grammar is not supported"


async def test_more_requests_than_permitted_are_refused_at_once_and_again_accepted_later(
    start_worker: Callable[..., Any],
) -> None:
    worker: Worker = await start_worker(max_concurrent_requests=1)
    response = await worker.post("/generate", body("a", best_of=2, do_sample=True, max_new_tokens=1))
    assert response.status_code == 429
    assert response.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
    assert int(response.headers["retry-after"]) > 0
    with worker.services.permits.hold(1):
        assert (await worker.post("/generate_stream", body("a"))).status_code == 429
    for _ in range(3):
        await worker.answer("/generate", body("a", max_new_tokens=1))
        await worker.events("/generate_stream", body("a", max_new_tokens=1))
        await worker.error("/generate", body(""))
    assert worker.services.permits.taken == 0


async def test_tokenize_tells_bytes_of_the_text(worker: Worker) -> None:
    assert await worker.answer("/tokenize", {"inputs": "a</s>é"}) == [
        {"id": token("a"), "text": "a", "start": 0, "stop": 1},
        {"id": EOS, "text": "</s>", "start": 1, "stop": 5},
        {"id": 129, "text": "é", "start": 5, "stop": 7},
        {"id": 104, "text": "é", "start": 5, "stop": 7},
    ]
    assert await worker.answer("/tokenize", {"inputs": ""}) == []


async def test_tokens_become_their_text_again(worker: Worker) -> None:
    text = "Grüße, 世界 <s>"
    ids = [token["id"] for token in await worker.answer("/tokenize", {"inputs": text})]
    assert await worker.answer("/detokenize", {"tokens": ids}) == {"text": "Grüße, 世界 "}
    assert await worker.answer("/detokenize", {"tokens": ids, "skip_special_tokens": False}) == {"text": text}
    assert await worker.answer("/detokenize", {"tokens": []}) == {"text": ""}
    assert "names token 99999" in await worker.error("/detokenize", {"tokens": [3, 99999]}, 422)


async def test_an_ending_that_comes_a_step_late_still_ends_the_last_event(start_worker: Callable[..., Any]) -> None:
    class Late(EchoBackend):
        """Sends each ending in a step of its own."""

        async def start(self, emit: Callable[..., None]) -> Any:
            def split(events: Any) -> None:
                ends, events = (
                    replace(events, request_ids=[], token_ids=[], logprobs=[], top={}),
                    replace(events, finished=[], failed=[]),
                )
                if events:
                    emit(events)
                if ends:
                    self._loop.call_later(0.01, emit, ends)

            return await super().start(split)

    worker: Worker = await start_worker(Late(byte_toy()))
    for wanted in (body("é", max_new_tokens=3), body("ab</s>", max_new_tokens=9)):
        events = await worker.events("/generate_stream", wanted)
        assert [event["generated_text"] is None for event in events] == [True, True, False]
        assert "".join(e["token"]["text"] for e in events if not e["token"]["special"]) == events[-1]["generated_text"]
