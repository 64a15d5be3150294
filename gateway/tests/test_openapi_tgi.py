"""Our description against what TGI 3.3's own says of its routes, field by field.

Ours may accept more in requests and promise more in answers, never less. Differences are marked here, and told with
their reasons in docs/migrate-from-tgi.md.
"""

from __future__ import annotations

from typing import Any

import pytest

from tgi_gateway.testing.worker import Worker

Schema = dict[str, Any]

ROUTES: dict[tuple[str, str], tuple[str | None, set[str], dict[str, str]]] = {
    ("post", "/"): (
        "CompatGenerateRequest",
        {"422", "424", "429", "500"},
        {"application/json": "[GenerateResponse]", "text/event-stream": "StreamResponse"},
    ),
    ("post", "/generate"): ("GenerateRequest", {"422", "424", "429", "500"}, {"application/json": "GenerateResponse"}),
    ("post", "/generate_stream"): (
        "GenerateRequest",
        {"422", "424", "429", "500"},
        {"text/event-stream": "StreamResponse"},
    ),
    ("post", "/v1/chat/completions"): (
        "ChatRequest",
        {"422", "424", "429", "500"},
        {"application/json": "ChatCompletion", "text/event-stream": "ChatCompletionChunk"},
    ),
    ("post", "/v1/completions"): (
        "CompletionRequest",
        {"422", "424", "429", "500"},
        {"application/json": "CompletionFinal", "text/event-stream": "Chunk"},
    ),
    ("post", "/invocations"): ("SagemakerRequest", {"422", "424", "429", "500"}, {}),
    ("post", "/vertex"): ("VertexRequest", {"422", "424", "429", "500"}, {"application/json": "VertexResponse"}),
    ("post", "/tokenize"): ("GenerateRequest", {"422"}, {"application/json": "[SimpleToken]"}),
    ("post", "/chat_tokenize"): ("ChatRequest", {"422"}, {"application/json": "ChatTokenizeResponse"}),
    ("get", "/health"): (None, set(), {}),  # TGI's has 503 as well; here that is /health/ready
    ("get", "/info"): (None, set(), {"application/json": "Info"}),
    ("get", "/v1/models"): (None, set(), {"application/json": "ModelsInfo"}),
    ("get", "/metrics"): (None, set(), {"text/plain": ""}),
}
"""By method and path: the body's schema, the statuses of failures, the answers by media type."""

_SAMPLING = {
    "temperature": "number|null",
    "top_p": "number|null",
    "frequency_penalty": "number|null",
    "seed": "integer|null",
    "stream": "boolean",
    "stop": "array|null",
    "model": "string|null",
    "max_tokens": "integer|null",
}
REQUESTS: dict[str, dict[str, str]] = {
    "GenerateRequest": {"inputs": "string!", "parameters": "object"},
    "CompatGenerateRequest": {"inputs": "string!", "parameters": "object", "stream": "boolean=false"},
    "GenerateParameters": {
        "best_of": "integer|null=null",
        "temperature": "number|null=null",
        "repetition_penalty": "number|null=null",
        "frequency_penalty": "number|null=null",
        "top_k": "integer|null=null",
        "top_p": "number|null=null",
        "typical_p": "number|null=null",
        "do_sample": "boolean=false",
        "max_new_tokens": "integer|null=null",
        "return_full_text": "boolean|null=null",
        "stop": "array=[]",
        "truncate": "integer|null=null",
        "watermark": "boolean=false",
        "details": "boolean=false",
        "decoder_input_details": "boolean=false",
        "seed": "integer|null=null",
        "top_n_tokens": "integer|null=null",
        "grammar": "object|null=null",
        "adapter_id": "string|null=null",
    },
    "GrammarType": {"type": "string!", "value": "any"},
    "ChatRequest": _SAMPLING
    | {
        "messages": "array!",
        "presence_penalty": "number|null",
        "stream_options": "object",
        "logprobs": "boolean|null",
        "top_logprobs": "integer|null",
        "tools": "array|null",
        "tool_choice": "string|object|null",
        "tool_prompt": "string|null",
        "response_format": "object|null",
        "n": "integer|null",
        "max_completion_tokens": "integer|null",
        "logit_bias": "object|null",  # TGI's is a list, and ignored
    },
    "StreamOptions": {"include_usage": "boolean=false"},
    "Message": {"role": "string!", "content": "string|array|null", "name": "string|null", "tool_calls": "array|null"},
    "Tool": {"type": "string", "function": "object!"},
    "FunctionDefinition": {"name": "string!", "description": "string|null", "parameters": "any", "arguments": "any"},
    "ToolCall": {"id": "string", "type": "string", "function": "object!"},
    "CompletionRequest": _SAMPLING
    | {"prompt": "string|array!", "repetition_penalty": "number|null", "suffix": "string|null"},
    "VertexRequest": {"instances": "array!"},
}
ANSWERS: dict[str, dict[str, str]] = {
    "GenerateResponse": {"generated_text": "string!", "details": "object"},
    "Details": {
        "finish_reason": "string!",
        "generated_tokens": "integer!",
        "seed": "integer|null",
        "prefill": "array!",
        "tokens": "array!",
        "best_of_sequences": "array",
        "top_tokens": "array",
    },
    "BestOfSequence": {
        "generated_text": "string!",
        "finish_reason": "string!",
        "generated_tokens": "integer!",
        "seed": "integer|null",
        "prefill": "array!",
        "tokens": "array!",
        "top_tokens": "array",
    },
    "PrefillToken": {"id": "integer!", "text": "string!", "logprob": "number|null!"},
    "Token": {"id": "integer!", "text": "string!", "logprob": "number|null!", "special": "boolean!"},
    "StreamResponse": {
        "index": "integer!",
        "token": "object!",
        "top_tokens": "array",
        "generated_text": "string|null",
        "details": "object|null",
    },
    "StreamDetails": {
        "finish_reason": "string!",
        "generated_tokens": "integer!",
        "seed": "integer|null",
        "input_length": "integer!",
    },
    "SimpleToken": {"id": "integer!", "text": "string!", "start": "integer!", "stop": "integer!"},
    "ChatTokenizeResponse": {"tokenize_response": "array!", "templated_text": "string!"},
    "ErrorResponse": {"error": "string!", "error_type": "string!"},
    "ChatCompletion": {
        "object": "string",
        "id": "string!",
        "created": "integer!",
        "model": "string!",
        "system_fingerprint": "string!",
        "choices": "array!",
        "usage": "object!",
    },
    "ChatCompletionComplete": {
        "index": "integer!",
        "message": "object!",
        "logprobs": "object|null",
        "finish_reason": "string!",
    },
    "ChatCompletionLogprobs": {"content": "array!"},
    "ChatCompletionLogprob": {"token": "string!", "logprob": "number|null!", "top_logprobs": "array!"},
    "ChatCompletionTopLogprob": {"token": "string!", "logprob": "number|null!"},
    "ChatCompletionChunk": {
        "object": "string",
        "id": "string!",
        "created": "integer!",
        "model": "string!",
        "system_fingerprint": "string!",
        "choices": "array!",
        "usage": "object|null",
    },
    "ChatCompletionChoice": {
        "index": "integer!",
        "delta": "object!",
        "logprobs": "object|null",
        "finish_reason": "string|null",
    },
    "Usage": {"prompt_tokens": "integer!", "completion_tokens": "integer!", "total_tokens": "integer!"},
    "CompletionFinal": {
        "object": "string",
        "id": "string!",
        "created": "integer!",
        "model": "string!",
        "system_fingerprint": "string!",
        "choices": "array!",
        "usage": "object!",
    },
    "CompletionComplete": {
        "index": "integer!",
        "text": "string!",
        "logprobs": "object|null",
        "finish_reason": "string|null!",
    },
    "Chunk": {
        "object": "string",
        "id": "string!",
        "created": "integer!",
        "choices": "array!",
        "model": "string!",
        "system_fingerprint": "string!",
    },
    "Info": {
        "model_id": "string!",
        "model_sha": "string|null",
        "model_pipeline_tag": "string|null",
        "max_concurrent_requests": "integer!",
        "max_best_of": "integer!",
        "max_stop_sequences": "integer!",
        "max_input_tokens": "integer!",
        "max_total_tokens": "integer!",
        "validation_workers": "integer!",
        "max_client_batch_size": "integer!",
        "router": "string!",
        "version": "string!",
        "sha": "string|null",
        "docker_label": "string|null",
    },
    "ModelsInfo": {"object": "string", "data": "array!"},
    "ModelInfo": {"id": "string!", "object": "string", "created": "integer", "owned_by": "string!"},
    "VertexResponse": {"predictions": "array!"},
}
"""`!`: always there. What an answer may leave out or set to null stands after the type."""


@pytest.fixture
async def document(worker: Worker) -> Schema:
    described: Schema = (await worker.client.get("/api-doc/openapi.json")).json()
    return described


def kinds(schema: Schema, schemas: Schema) -> set[str]:
    """The JSON types that a schema allows."""
    if "$ref" in schema:
        return kinds(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return {kind for each in schema[name] for kind in kinds(each, schemas)}
    if "type" in schema:
        return {schema["type"]} if isinstance(schema["type"], str) else set(schema["type"])
    if "enum" in schema or "const" in schema:
        return {"string"}
    return {"string", "number", "integer", "boolean", "array", "object", "null"}


def parse(told: str) -> tuple[set[str], bool, str]:
    """(types, required, default)"""
    told, _, default = told.partition("=")
    required = told.endswith("!")
    types = set(told.removesuffix("!").split("|"))
    return set() if types == {"any"} else types, required, default


def test_every_route_is_there_with_its_bodies_and_failures(document: Schema) -> None:
    for (method, path), (body, statuses, answers) in ROUTES.items():
        operation = document["paths"][path][method]
        assert statuses <= operation["responses"].keys(), path
        if body is not None:
            described = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            assert described == f"#/components/schemas/{body}"
        content = operation["responses"]["200"].get("content", {})
        for media_type, name in answers.items():
            schema = content[media_type]["schema"]
            if name.startswith("["):
                assert schema["type"] == "array"
                schema, name = schema["items"], name[1:-1]
            assert not name or schema["$ref"].endswith(f"/{name}"), path


@pytest.mark.parametrize("name", REQUESTS)
def test_every_field_of_a_request_is_accepted(document: Schema, name: str) -> None:
    schemas = document["components"]["schemas"]
    ours = schemas[name]
    assert set(ours.get("required", ())) <= {field for field, told in REQUESTS[name].items() if parse(told)[1]}
    for field, told in REQUESTS[name].items():
        types, _, default = parse(told)
        described = ours["properties"][field]
        assert types <= kinds(described, schemas), (name, field)
        if default:
            assert str(described["default"]).lower().replace("none", "null") == default, (name, field)


@pytest.mark.parametrize("name", ANSWERS)
def test_every_field_of_an_answer_is_given(document: Schema, name: str) -> None:
    schemas = document["components"]["schemas"]
    ours = schemas[name]
    for field, told in ANSWERS[name].items():
        types, required, _ = parse(told)
        described = ours["properties"][field]
        assert kinds(described, schemas) <= types, (name, field)
        assert not required or field in ours["required"], (name, field)
