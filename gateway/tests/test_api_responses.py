"""OpenAI's Responses API: conversations in, items and events out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tgi_gateway.testing.recorded import HERMES, PLAIN, Recorded
from tgi_gateway.testing.scripted import Script, ScriptedBackend
from tgi_gateway.testing.worker import FIRST_BYTE, Worker, byte_toy, parse_named_events

RESPONSES = "/v1/responses"
THINKING = PLAIN + "{# </think> #}"
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
CALL = '<think>Hm.</think>One moment.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TEMPLATE = HERMES + "{# </think> #}"


async def test_an_answer_is_items(says: Callable[..., Any]) -> None:
    worker: Worker = await says(CALL, TEMPLATE)
    answer = await worker.answer(RESPONSES, {"input": "Hi", "tools": [TOOL], "temperature": 0, "metadata": {"a": "b"}})
    assert answer["object"] == "response"
    assert answer["status"] == "completed"
    assert answer["id"].startswith("resp_")
    assert answer["store"] is False
    assert answer["metadata"] == {"a": "b"}
    thought, words, call = answer["output"]
    assert thought["type"] == "reasoning"
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert words["content"] == [{"type": "output_text", "text": "One moment.", "annotations": [], "logprobs": []}]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "weather",
        {"city": "Zürich"},
    )
    assert {item["status"] for item in answer["output"]} == {"completed"}
    assert len({item["id"] for item in answer["output"]}) == 3
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]


async def test_a_stream_tells_the_same(says: Callable[..., Any]) -> None:
    worker: Worker = await says(CALL, TEMPLATE)
    body = {"input": "Hi", "tools": [TOOL], "temperature": 0}
    whole = await worker.answer(RESPONSES, body)
    response = await worker.post(RESPONSES, body | {"stream": True})
    events = parse_named_events(response.text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for at, kind in enumerate(kinds) if kinds[at - 1] != kind] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert events[0]["response"]["output"] == []
    final = events[-1]["response"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["output"]
    grown = {"reasoning_text": "", "output_text": "", "function_call_arguments": ""}
    for event in events:
        kind = event["type"].removeprefix("response.").removesuffix(".delta")
        if kind in grown and event["type"].endswith(".delta"):
            grown[kind] += event["delta"]
    assert list(grown.values()) == ["Hm.", "One moment.", final["output"][2]["arguments"]]
    for document in (whole, final):
        for name in ("id", "created_at"):
            document.pop(name)
        for item in document["output"]:
            item.pop("id")
            item.pop("call_id", None)
    assert final == whole


async def test_a_conversation_becomes_messages(says: Callable[..., Any]) -> None:
    worker: Worker = await says("Warm.", TEMPLATE)
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}, {"type": "input_text", "text": "!"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "So."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"Rome"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city":"Oslo"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "30"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "-3"}]},
    ]
    answer = await worker.answer(
        RESPONSES,
        {"instructions": "Be brief.", "input": items, "tools": [TOOL], "tool_choice": "none", "temperature": 0},
    )
    assert answer["output"][0]["content"][0]["text"] == "Warm."
    backend: Any = worker.services.backend
    prompt = worker.services.tokenizer.decode(backend.asked[-1].input_ids, skip_special_tokens=False)
    assert prompt == (
        "<system>Be brief.\n\nBe kind.<user>Hi!<assistant>So."
        '<call c1>weather{"city": "Rome"}<call c2>weather{"city": "Oslo"}<toolc1>30<toolc2>-3'
    )


async def test_an_answer_that_is_cut_short_is_incomplete(says: Callable[..., Any]) -> None:
    worker: Worker = await says("A long answer")
    answer = await worker.answer(RESPONSES, {"input": "Hi", "max_output_tokens": 6, "temperature": 0})
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["content"][0]["text"] == "A long"
    assert answer["output"][0]["status"] == "incomplete"
    streamed = await worker.post(RESPONSES, {"input": "Hi", "max_output_tokens": 6, "temperature": 0, "stream": True})
    assert parse_named_events(streamed.text)[-1]["type"] == "response.incomplete"


async def test_logprobs_are_told_if_included(says: Callable[..., Any]) -> None:
    worker: Worker = await says("Yes")
    body = {"input": "Hi", "temperature": 0, "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    answer = await worker.answer(RESPONSES, body)
    told = answer["output"][0]["content"][0]["logprobs"]
    assert [each["token"] for each in told] == list("Yes")
    assert all(len(each["top_logprobs"]) == 1 for each in told)


async def test_structured_text_is_asked_for_in_this_apis_form(says: Callable[..., Any]) -> None:
    worker: Worker = await says("{}", grammar=True)
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}}
    answer = await worker.answer(RESPONSES, {"input": "Hi", "text": wanted, "temperature": 0})
    backend: Any = worker.services.backend
    assert backend.asked[-1].sampling.grammar.source == '{"type":"object"}'
    assert answer["text"] == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "`previous_response_id` is not supported: this server stores nothing"),
        ({"store": True}, "`store` is not supported: this server stores nothing"),
        ({"background": True}, "`background` is not supported"),
        ({"conversation": "c"}, "`conversation` is not supported"),
        ({"truncation": "middle"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "`include` of `file_search_call.results`"),
        ({"tools": [{"type": "web_search"}]}, "`tools[0].type` web_search is not supported"),
        ({"tool_choice": {"type": "mcp"}}, "`tool_choice` of type mcp"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "Tool with name other not found"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "an item of type item_reference is not supported"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "a part of type input_image is not supported",
        ),
        ({"input": [{"type": "reasoning", "content": 3}]}, "`input[0]` must be a text or a list of parts"),
        ({"seed": 2**64}, "seed"),
        ({"text": {"format": {"type": "xml"}}}, "`text.format` needs a `type`"),
        ({"temprature": 1}, "Unknown parameter: `temprature`; did you mean `temperature`?"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_honoured_is_refused(
    says: Callable[..., Any], fields: dict[str, Any], message: str, stream: bool
) -> None:
    worker: Worker = await says("Hi")
    assert message in await worker.error(RESPONSES, {"input": "Hi", "stream": stream} | fields)


async def test_a_failure_in_the_middle_is_the_last_event(start_worker: Callable[..., Any]) -> None:
    engine = ScriptedBackend([Script.of(FIRST_BYTE + 40, FIRST_BYTE + 41, then="fail")], byte_toy())
    worker: Worker = await start_worker(engine)
    response = await worker.post(RESPONSES, {"input": "Hi", "stream": True, "temperature": 0})
    events = parse_named_events(response.text)
    assert events[-1]["type"] == "error"
    assert events[-1]["sequence_number"] == len(events) - 1
    assert "the script ends in a failure" in events[-1]["message"]


def turns(count: int) -> list[dict[str, Any]]:
    """A system message, then questions of 30 tokens with calls and their results."""
    items: list[dict[str, Any]] = [{"role": "system", "content": "SYS"}]
    for number in range(count):
        items.append({"role": "user", "content": f"question {number:02}".ljust(30, ".")})
        items.append({"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"})
        items.append({"type": "function_call_output", "call_id": f"c{number}", "output": "result"})
    return [*items, {"role": "user", "content": "the last"}]


async def test_truncation_leaves_out_the_oldest_turns_and_no_more(says: Callable[..., Any]) -> None:
    worker: Worker = await says("Fine.", PLAIN)
    limit = worker.services.info.max_total_tokens - 16
    asked = {"input": turns(200), "max_output_tokens": 16, "temperature": 0}
    assert "must be <=" in await worker.error(RESPONSES, asked)
    answer = await worker.answer(RESPONSES, asked | {"truncation": "auto"})
    assert answer["truncation"] == "auto"
    backend = worker.services.backend
    assert isinstance(backend, Recorded)
    ids = backend.asked[-1].input_ids
    prompt = worker.services.tokenizer.decode(ids, skip_special_tokens=False)
    head, first, *_ = prompt.split("<user>")
    assert (head, first[:8]) == ("<system>SYS", "question")
    assert prompt.endswith("<user>the last")
    one_turn = len(prompt[prompt.index("<user>question 150") : prompt.index("<user>question 151")])
    assert limit - one_turn < len(ids) <= limit
    short = await worker.answer(RESPONSES, asked | {"input": turns(2), "truncation": "auto"})
    assert short["usage"]["input_tokens"] < 200


async def test_truncation_cannot_help_a_last_turn_that_does_not_fit(worker: Worker) -> None:
    too_long = [*turns(3), {"role": "user", "content": "x" * 600}]
    refused = await worker.error(RESPONSES, {"input": too_long, "truncation": "auto"})
    assert "Given: 622" in refused


async def test_input_tokens_are_those_that_an_answer_counts(says: Callable[..., Any]) -> None:
    worker: Worker = await says("Fine.", HERMES)
    asked = {"input": turns(2), "instructions": "Short.", "tools": [TOOL]}
    settings = {"temperature": 0, "max_output_tokens": 4}
    counted = await worker.answer(f"{RESPONSES}/input_tokens", asked)
    assert counted["object"] == "response.input_tokens"
    answer = await worker.answer(RESPONSES, asked | settings)
    assert counted["input_tokens"] == answer["usage"]["input_tokens"]
