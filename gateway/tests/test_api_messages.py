"""Anthropic's Messages API: conversations in, blocks and events out, its own errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tgi_gateway.testing.recorded import HERMES, PLAIN
from tgi_gateway.testing.scripted import Script, ScriptedBackend
from tgi_gateway.testing.worker import FIRST_BYTE, Worker, byte_toy, parse_named_events

MESSAGES = "/v1/messages"
TEMPLATE = HERMES + "{# </think> #}"
TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = '<think>Hm.</think>One moment.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400, "temperature": 0}
THINK = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


async def test_an_answer_is_blocks(says: Callable[..., Any]) -> None:
    worker: Worker = await says(CALL, TEMPLATE)
    answer = await worker.answer(MESSAGES, ASKED | THINK | {"tools": [TOOL]})
    assert answer["type"] == "message"
    assert answer["id"].startswith("msg_")
    assert answer["stop_reason"] == "tool_use"
    thought, words, call = answer["content"]
    assert thought == {"type": "thinking", "thinking": "Hm.", "signature": ""}
    assert words == {"type": "text", "text": "One moment."}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Zürich"})
    usage = answer["usage"]
    assert usage["input_tokens"] > 0
    assert usage["cache_read_input_tokens"] == 0


async def test_a_stream_tells_the_same(says: Callable[..., Any]) -> None:
    worker: Worker = await says(CALL, TEMPLATE)
    body = ASKED | THINK | {"tools": [TOOL]}
    whole = await worker.answer(MESSAGES, body)
    events = parse_named_events((await worker.post(MESSAGES, body | {"stream": True})).text)
    kinds = [event["type"] for event in events]
    assert [kind for at, kind in enumerate(kinds) if kinds[at - 1] != kind] == [
        "message_start",
        *["content_block_start", "content_block_delta", "content_block_stop"] * 3,
        "message_delta",
        "message_stop",
    ]
    message = events[0]["message"]
    assert message["content"] == []
    blocks: list[Any] = []
    partial = ""
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            match delta["type"]:
                case "text_delta":
                    blocks[-1]["text"] += delta["text"]
                case "thinking_delta":
                    blocks[-1]["thinking"] += delta["thinking"]
                case "input_json_delta":
                    partial += delta["partial_json"]
    blocks[-1]["input"] = json.loads(partial)
    streamed = message | events[-2]["delta"] | {"content": blocks, "usage": events[-2]["usage"]}
    for document in (streamed, whole):
        document.pop("id")
        document["content"][-1].pop("id")
    assert streamed == whole


async def test_an_answer_without_words_has_no_blocks(says: Callable[..., Any]) -> None:
    worker: Worker = await says("")
    assert (await worker.answer(MESSAGES, ASKED))["content"] == []
    events = parse_named_events((await worker.post(MESSAGES, ASKED | {"stream": True})).text)
    assert [event["type"] for event in events] == ["message_start", "message_delta", "message_stop"]


async def test_thoughts_are_left_out_unless_asked_for(says: Callable[..., Any]) -> None:
    worker: Worker = await says("<think>Hm.</think>Yes.", PLAIN + "{# </think> #}")
    for fields in ({}, {"thinking": {"type": "disabled"}}):
        assert (await worker.answer(MESSAGES, ASKED | fields))["content"] == [{"type": "text", "text": "Yes."}]


async def test_a_conversation_becomes_messages(says: Callable[..., Any]) -> None:
    worker: Worker = await says("Warm.", TEMPLATE)
    body = {
        "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "text", "text": "So."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}},
                    {"type": "tool_use", "id": "t2", "name": "weather", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "30"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "no city", "is_error": True},
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "none"},
    }
    answer = await worker.answer(MESSAGES, body | {"max_tokens": 50, "temperature": 0})
    assert answer["content"] == [{"type": "text", "text": "Warm."}]
    assert answer["stop_reason"] == "end_turn"
    backend: Any = worker.services.backend
    ids = backend.asked[-1].input_ids
    assert worker.services.tokenizer.decode(ids, skip_special_tokens=False) == (
        '<system>Be kind.<user>Hi<assistant>So.<call t1>weather{"city": "Rome"}<call t2>weather{}'
        "<toolt1>30<toolt2>Error: no city<user>Well?"
    )
    counted = await worker.answer(f"{MESSAGES}/count_tokens", body)
    assert counted == {"input_tokens": len(ids)}


async def test_why_it_stopped_is_told(says: Callable[..., Any]) -> None:
    worker: Worker = await says("A long answer")
    cut = await worker.answer(MESSAGES, ASKED | {"max_tokens": 6})
    assert (cut["stop_reason"], cut["content"][0]["text"]) == ("max_tokens", "A long")
    stopped = await worker.answer(MESSAGES, ASKED | {"stop_sequences": ["zz", "ng an"]})
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "ng an")
    assert stopped["content"][0]["text"] == "A lo"


async def test_a_last_turn_of_the_assistant_is_continued(says: Callable[..., Any]) -> None:
    worker: Worker = await says("B)", PLAIN)
    turns = [*ASKED["messages"], {"role": "assistant", "content": "The answer is ("}]
    await worker.answer(MESSAGES, ASKED | {"messages": turns})
    backend: Any = worker.services.backend
    prompt = worker.services.tokenizer.decode(backend.asked[-1].input_ids, skip_special_tokens=False)
    assert prompt == "<user>Hi<assistant>The answer is ("


@pytest.mark.parametrize(
    ("choice", "parallel"),
    [
        ({"type": "any"}, True),
        ({"type": "tool", "name": "weather"}, False),
        ({"type": "any", "disable_parallel_tool_use": True}, False),
    ],
)
async def test_calls_can_be_asked_for(says: Callable[..., Any], choice: dict[str, Any], parallel: bool) -> None:
    worker: Worker = await says(CALL.partition(".\n")[2], TEMPLATE, grammar=True)
    answer = await worker.answer(MESSAGES, ASKED | {"tools": [TOOL], "tool_choice": choice})
    assert [block["type"] for block in answer["content"]] == ["tool_use"]
    backend: Any = worker.services.backend
    assert ("call:" in backend.asked[-1].sampling.grammar.source) is parallel


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 100_000}, "`max_new_tokens` must be <="),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "`tools[0].type` web_search_20250305 is not"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "a block of type image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": 3}]}]},
            "`messages[0].content` must be a text or a list of blocks",
        ),
        ({"container": "c"}, "`container` is not supported"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "Tool with name other not found"),
        ({"max_token": 1}, "Unknown parameter: `max_token`; did you mean `max_tokens`?"),
        ({"messages": []}, "`messages` cannot be empty"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_honoured_is_refused_in_anthropics_form(
    says: Callable[..., Any], fields: dict[str, Any], message: str, stream: bool
) -> None:
    worker: Worker = await says("Hi")
    response = await worker.post(MESSAGES, ASKED | {"stream": stream} | fields)
    assert response.status_code == 400
    told = response.json()
    assert told["type"] == "error"
    assert told["error"]["type"] == "invalid_request_error"
    assert message in told["error"]["message"]
    assert told["request_id"] == response.headers["x-request-id"]


async def test_keys_come_in_a_header_of_their_own(says: Callable[..., Any]) -> None:
    worker: Worker = await says("Hi", api_key="secret")
    refused = await worker.post(MESSAGES, ASKED)
    assert refused.status_code == 401
    assert refused.json()["error"]["type"] == "authentication_error"
    allowed = await worker.client.post(MESSAGES, json=ASKED, headers={"x-api-key": "secret"})
    assert allowed.status_code == 200
    openai = await worker.post("/v1/responses", {"input": "Hi"})
    assert openai.json()["error"]["code"] == "invalid_api_key"


async def test_a_failure_in_the_middle_is_the_last_event(start_worker: Callable[..., Any]) -> None:
    engine = ScriptedBackend([Script.of(FIRST_BYTE + 40, FIRST_BYTE + 41, then="fail")], byte_toy())
    worker: Worker = await start_worker(engine)
    response = await worker.post(MESSAGES, ASKED | {"stream": True})
    last = parse_named_events(response.text)[-1]
    assert last["type"] == "error"
    assert last["error"]["type"] == "api_error"
    assert "the script ends in a failure" in last["error"]["message"]
