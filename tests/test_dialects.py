"""OpenAI's Responses API and Anthropic's Messages API, driven by their makers' own clients on the real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pydantic
import pytest
from servers import Server

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city",
    "parameters": PARAMETERS,
    "strict": False,
}
TOOL: Any = {"name": "get_weather", "description": "Get the weather of a city", "input_schema": PARAMETERS}
QUESTION = "What is the weather in Rome?"
RESULT = '{"temperature": 31, "sky": "sunny"}'
CAPITAL: Any = {"role": "user", "content": "What is the capital of France?"}


class Answer(pydantic.BaseModel):
    value: int = pydantic.Field(ge=0, le=99)


@pytest.fixture
def client(demo_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0, timeout=60) as it:
        yield it


@pytest.fixture
def claude(demo_server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=demo_server.url, api_key="none", max_retries=0, timeout=60) as it:
        yield it


def test_a_response_answers_a_text(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tgi", input="What is the capital of France?", temperature=0)
    assert "Paris" in answer.output_text
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_a_response_streams_what_it_answers(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="tgi", input=[CAPITAL], temperature=0)
    with client.responses.stream(model="tgi", input=[CAPITAL], temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == whole.output_text == final.output_text


def test_a_response_calls_a_tool_and_goes_on_with_its_result(client: openai.OpenAI) -> None:
    conversation: Any = [{"role": "user", "content": QUESTION}]
    with client.responses.stream(
        model="tgi", input=conversation, tools=[WEATHER], temperature=0, max_output_tokens=200
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        first = stream.get_final_response()
    (call,) = first.output
    assert call.type == "function_call"
    assert call.name == "get_weather"
    assert json.loads(call.arguments) == json.loads("".join(deltas)) == {"city": "Rome"}
    conversation += [call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}]
    second = client.responses.create(model="tgi", input=conversation, tools=[WEATHER], temperature=0)
    assert "31" in second.output_text
    assert "sunny" in second.output_text


def test_a_response_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model="tgi", input="Say a number.", text_format=Answer, temperature=0)
    assert isinstance(answer.output_parsed, Answer)


def test_a_required_call_of_a_response_keeps_to_its_schema(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "name": "get_weather"}
    answer = client.responses.create(
        model="tgi", input="Hello!", tools=[WEATHER], tool_choice=named, max_output_tokens=200
    )
    (call,) = answer.output
    assert call.type == "function_call"
    assert isinstance(json.loads(call.arguments)["city"], str)


def test_what_would_have_to_be_stored_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="this server stores nothing"):
        client.responses.create(model="tgi", input="Hi", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="this server stores nothing"):
        client.responses.create(model="tgi", input="Hi", store=True)


def test_a_message_is_answered(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="tgi", max_tokens=40, messages=[CAPITAL], system="Answer briefly.")
    assert answer.role == "assistant"
    assert answer.stop_reason == "end_turn"
    (block,) = answer.content
    assert block.type == "text"
    assert block.text
    counted = claude.messages.count_tokens(model="tgi", messages=[CAPITAL], system="Answer briefly.")
    assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


def test_a_message_streams_and_calls_a_tool(claude: anthropic.Anthropic) -> None:
    conversation: Any = [{"role": "user", "content": QUESTION}]
    asked: Any = {"model": "tgi", "max_tokens": 200, "tools": [TOOL], "extra_body": {"temperature": 0}}
    with claude.messages.stream(messages=conversation, **asked) as stream:
        partial = "".join(event.partial_json for event in stream if event.type == "input_json")
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    (call,) = first.content
    assert call.type == "tool_use"
    assert call.name == "get_weather"
    assert call.input == json.loads(partial) == {"city": "Rome"}
    conversation += [
        {"role": "assistant", "content": [call.to_dict()]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": RESULT}]},
    ]
    with claude.messages.stream(messages=conversation, **asked) as stream:
        text = "".join(stream.text_stream)
        second = stream.get_final_message()
    assert second.stop_reason == "end_turn"
    assert "31" in text
    assert "sunny" in text


def test_a_required_call_of_a_message_keeps_to_its_schema(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model="tgi", max_tokens=200, messages=[CAPITAL], tools=[TOOL], tool_choice={"type": "any"}
    )
    assert {block.type for block in answer.content} == {"tool_use"}


def test_anthropics_client_reads_our_errors(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_new_tokens"):
        claude.messages.create(model="tgi", max_tokens=10_000_000, messages=[CAPITAL])


async def test_many_messages_and_responses_share_the_engine(demo_server: Server) -> None:
    import asyncio

    async with (
        anthropic.AsyncAnthropic(base_url=demo_server.url, api_key="none", max_retries=0, timeout=60) as claude,
        openai.AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        asked: Any = {"model": "tgi", "max_tokens": 30, "messages": [CAPITAL], "extra_body": {"temperature": 0}}
        messages = [claude.messages.create(**asked) for _ in range(8)]
        responses = [
            client.responses.create(model="tgi", input=[CAPITAL], temperature=0, max_output_tokens=30) for _ in range(8)
        ]
        answers = await asyncio.gather(*messages)
        told = {block.text for answer in answers for block in answer.content if block.type == "text"}
        told |= {answer.output_text for answer in await asyncio.gather(*responses)}
    assert len(told) == 1
