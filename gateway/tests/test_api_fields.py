"""Every field that the official clients can send is honoured, accepted as advice, or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from openai.types import chat, completion_create_params, shared_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import input_token_count_params, response_create_params

from tgi_gateway.api import bodies
from tgi_gateway.testing.echo import ECHO_CAPABILITIES, EchoBackend
from tgi_gateway.testing.recorded import HERMES
from tgi_gateway.testing.worker import byte_toy, running_worker, write_byte_model

FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TURN = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Api:
    """A value to send for each field, by what becomes of it."""

    path: str
    params: type
    needed: Mapping[str, Any]
    honoured: Mapping[str, Any]
    advisory: Mapping[str, Any]
    refused: Mapping[str, Any]


OF_BOTH = {
    "model": "tgi",
    "max_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.9,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"70": 1},
    "stop": ["zz"],
    "seed": 3,
    "n": 2,
    "stream": False,
    "stream_options": None,
}
CHAT = Api(
    "/v1/chat/completions",
    chat_create_params.CompletionCreateParamsNonStreaming,
    {"messages": [TURN], "max_tokens": 4},
    OF_BOTH
    | {
        "messages": [TURN],
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "response_format": {"type": "text"},
        "reasoning_effort": "low",
        "modalities": ["text"],
    },
    {
        "user": "me",
        "safety_identifier": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "prompt_cache_key": "key",
        "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h",
        "prediction": {"type": "content", "content": "Hi"},
        "verbosity": "low",
    },
    {
        "audio": {"voice": "alloy", "format": "wav"},
        "functions": [FUNCTION],
        "function_call": "auto",
        "moderation": {"model": "omni-moderation-latest"},
        "web_search_options": {},
    },
)
COMPLETIONS = Api(
    "/v1/completions",
    completion_create_params.CompletionCreateParamsNonStreaming,
    {"prompt": "Hi", "max_tokens": 4},
    OF_BOTH | {"prompt": "Hi", "echo": True, "logprobs": 2, "best_of": 2},
    {"user": "me"},
    {"suffix": "x"},
)
CONVERSATION = {
    "model": "tgi",
    "input": "Hi",
    "instructions": "Be short",
    "tools": [{"type": "function", **FUNCTION, "strict": True}],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "reasoning": {"effort": "low", "summary": "auto"},
    "truncation": "auto",
}
STORED = {"previous_response_id": "resp_1", "conversation": "conv_1"}
RESPONSES = Api(
    "/v1/responses",
    response_create_params.ResponseCreateParamsNonStreaming,
    {"input": "Hi", "max_output_tokens": 4},
    CONVERSATION
    | {
        "max_output_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
        "stream": False,
        "metadata": {"a": "b"},
    },
    {
        "stream_options": {"include_obfuscation": False},
        "max_tool_calls": 3,
        "user": "me",
        "safety_identifier": "me",
        "prompt_cache_key": "key",
        "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h",
        "service_tier": "auto",
        "background_options": {"completion_window": "soonest"},
        "image": {"context_compression": "auto"},
    },
    STORED
    | {
        "prompt": {"id": "pmpt_1"},
        "store": True,
        "background": True,
        "access_programs": {"cyber": "standard"},
        "context_management": [{"type": "compaction"}],
        "moderation": {"model": "omni-moderation-latest"},
    },
)
INPUT_TOKENS = Api(
    "/v1/responses/input_tokens",
    input_token_count_params.InputTokenCountParams,
    {"input": "Hi"},
    CONVERSATION,
    {},
    STORED | {"personality": "friendly"},
)
COUNTED = {
    "model": "tgi",
    "messages": [TURN],
    "system": "Be short",
    "tools": [{"name": "f", "input_schema": SCHEMA}],
    "tool_choice": {"type": "none"},
    "thinking": {"type": "disabled"},
    "output_config": {"effort": "low"},
}
ANYWHERE = {
    "cache_control": {"type": "ephemeral"},
    "user_profile_id": "user_1",
    "workspace_id": "wrkspc_1",
    "speed": "standard",
}
MESSAGES = Api(
    "/v1/messages",
    message_create_params.MessageCreateParamsNonStreaming,
    {"messages": [TURN], "max_tokens": 4},
    COUNTED | {"max_tokens": 4, "stop_sequences": ["zz"], "stream": False},
    ANYWHERE
    | {
        "metadata": {"user_id": "me"},
        "service_tier": "auto",
        "inference_geo": "eu",
        "diagnostics": {},
    },
    {"container": "container_1"},
)
COUNT_TOKENS = Api(
    "/v1/messages/count_tokens",
    message_count_tokens_params.MessageCountTokensParams,
    {"messages": [TURN]},
    COUNTED,
    ANYWHERE,
    {},
)
APIS = [CHAT, COMPLETIONS, RESPONSES, INPUT_TOKENS, MESSAGES, COUNT_TOKENS]


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.path)
def test_every_field_of_the_clients_is_listed_once(api: Api) -> None:
    listed = [*api.honoured, *api.advisory, *api.refused]
    assert len(set(listed)) == len(listed)
    assert set(get_type_hints(api.params)) == set(listed)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (chat.ChatCompletionSystemMessageParam, bodies.Message),
        (chat.ChatCompletionDeveloperMessageParam, bodies.Message),
        (chat.ChatCompletionUserMessageParam, bodies.Message),
        (chat.ChatCompletionAssistantMessageParam, bodies.Message),
        (chat.ChatCompletionToolMessageParam, bodies.Message),
        (chat.ChatCompletionContentPartTextParam, bodies.TextPart),
        (chat.ChatCompletionContentPartRefusalParam, bodies.RefusalPart),
        (chat.ChatCompletionContentPartImageParam, bodies.ImagePart),
        (chat.ChatCompletionMessageFunctionToolCallParam, bodies.ToolCall),
        (chat.ChatCompletionFunctionToolParam, bodies.Tool),
        (chat.ChatCompletionNamedToolChoiceParam, bodies.NamedTool),
        (chat.ChatCompletionAllowedToolChoiceParam, bodies.NamedTool),
        (chat.ChatCompletionStreamOptionsParam, bodies.StreamOptions),
        (shared_params.FunctionDefinition, bodies.FunctionDefinition),
        (shared_params.ResponseFormatJSONSchema, bodies.GrammarBody),
    ],
)
def test_what_fields_hold_has_no_unknown_names(theirs: type, ours: type[msgspec.Struct]) -> None:
    known = {field.encode_name for field in msgspec.structs.fields(ours)} | {ours.__struct_config__.tag_field}
    assert set(get_type_hints(theirs)) <= known


@pytest.fixture
def able() -> EchoBackend:
    return EchoBackend(byte_toy(), capabilities=ECHO_CAPABILITIES)


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.path)
async def test_every_field_is_taken_or_refused_by_name(api: Api, able: EchoBackend, tmp_path: Path) -> None:
    write_byte_model(tmp_path, HERMES)
    async with running_worker(able, tmp_path, enable_prefill_logprobs=True) as worker:
        for name, value in {**api.honoured, **api.advisory}.items():
            response = await worker.post(api.path, {**api.needed, name: value})
            assert response.status_code == 200, f"{name}: {response.text}"
        for name, value in api.refused.items():
            response = await worker.post(api.path, {**api.needed, name: value})
            assert 400 <= response.status_code < 500, f"{name}: {response.text}"
            assert name in response.text.lower(), response.text
            assert (await worker.post(api.path, {**api.needed, name: None})).status_code == 200, name
