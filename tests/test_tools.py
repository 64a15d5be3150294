"""Tools on the real engine: the demo model, which was trained to use them, through OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from huggingface_hub import InferenceClient
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from servers import Server

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ODD: Any = {
    "type": "function",
    "function": {
        "name": "set_light",
        "parameters": {
            "type": "object",
            "properties": {
                "level": {"type": "integer", "minimum": 0, "maximum": 9},
                "colour": {"enum": ["red", "grün"]},
                "rooms": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,5}$"}, "maxItems": 2},
            },
            "required": ["level", "colour", "rooms"],
            "additionalProperties": False,
        },
    },
}
QUESTION: Any = {"role": "user", "content": "What is the weather in Rome?"}


@pytest.fixture
def client(demo_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0, timeout=60) as it:
        yield it


def ask(client: openai.OpenAI, **more: Any) -> Any:
    create: Any = client.chat.completions.create
    return create(
        **{"model": "tgi", "messages": [QUESTION], "tools": [WEATHER], "max_tokens": 200, "temperature": 0} | more
    )


def the_call(answer: Any) -> ChatCompletionMessageFunctionToolCall:
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    return call


def test_the_model_calls_a_tool_and_answers_with_its_result(client: openai.OpenAI) -> None:
    first = ask(client)
    call = the_call(first)
    assert first.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    messages = [
        QUESTION,
        first.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 31, "sky": "sunny"}'},
    ]
    second = ask(client, messages=messages)
    assert second.choices[0].finish_reason == "stop"
    assert second.choices[0].message.tool_calls is None
    assert "31" in second.choices[0].message.content
    assert "sunny" in second.choices[0].message.content


def test_auto_lets_the_model_answer_in_words(client: openai.OpenAI) -> None:
    answer = ask(client, messages=[{"role": "user", "content": "Hello!"}])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


def test_a_streamed_call_is_put_together_by_the_client(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tgi", messages=[QUESTION], tools=[WEATHER], max_tokens=200, temperature=0
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.role == "assistant"
    assert final.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.name == "get_weather"
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Rome"}
    kinds = [event.type for event in events]
    assert kinds.count("tool_calls.function.arguments.delta") > 1
    assert "tool_calls.function.arguments.done" in kinds


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_calls_that_must_be_made_keep_to_their_schema(client: openai.OpenAI, temperature: float) -> None:
    named = {"type": "function", "function": {"name": "set_light"}}
    for choice, tools in ((named, [WEATHER, ODD]), ("required", [ODD])):
        for seed in range(3):
            answer = ask(
                client,
                tools=tools,
                tool_choice=choice,
                temperature=temperature,
                seed=seed,
                parallel_tool_calls=False,
                messages=[{"role": "user", "content": "Make it bright."}],
            )
            call = the_call(answer)
            assert call.function.name == "set_light"
            jsonschema.validate(json.loads(call.function.arguments), ODD["function"]["parameters"])
            assert answer.choices[0].finish_reason == "tool_calls"


def test_a_wild_model_that_begins_a_call_keeps_to_its_schema(client: openai.OpenAI) -> None:
    answers = [ask(client, temperature=1.5, seed=seed, tools=[WEATHER, ODD]) for seed in range(6)]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, ODD)}
    calls = [call for answer in answers for call in answer.choices[0].message.tool_calls or ()]
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


def test_a_schema_that_cannot_be_held_is_told(client: openai.OpenAI) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}
    with pytest.raises(openai.APIStatusError, match=r"grammar is not valid: .*strin"):
        ask(client, tools=[bad], tool_choice="required")


def test_inference_client_calls_a_tool(demo_server: Server) -> None:
    client = InferenceClient(base_url=demo_server.url)
    asked: Any = {"messages": [QUESTION], "tools": [WEATHER], "max_tokens": 200, "temperature": 0}
    (call,) = client.chat_completion(**asked).choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    deltas = [chunk.choices[0].delta for chunk in client.chat_completion(**asked, stream=True)]
    grown = [each.function for delta in deltas for each in delta.tool_calls or ()]
    assert grown[0].name == "get_weather"
    assert json.loads("".join(each.arguments for each in grown)) == {"city": "Rome"}


def test_an_answer_in_json_or_a_call_of_a_tool(client: openai.OpenAI) -> None:
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "boolean"}}}},
    }
    answer = ask(client, response_format=wanted)
    message = answer.choices[0].message
    if message.tool_calls:
        assert the_call(answer).function.name == "get_weather"
    else:
        json.loads(message.content)
