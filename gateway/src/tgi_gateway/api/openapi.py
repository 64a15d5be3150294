"""The description of the API, made from the very types that requests are decoded into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tgi_gateway.api import bodies, chat, completions, models, tgi
from tgi_gateway.api.errors import ErrorResponse

_TGI_NAMES = {
    "GenerateBody": "GenerateRequest",
    "CompatGenerateBody": "CompatGenerateRequest",
    "ParametersBody": "GenerateParameters",
    "GrammarBody": "GrammarType",
    "ChatBody": "ChatRequest",
    "CompletionBody": "CompletionRequest",
    "Completion": "CompletionFinal",
    "CompletionChunk": "Chunk",
    "ModelList": "ModelsInfo",
}
"""Names that generated clients know from TGI's own description."""
_REFERENCE = "#/components/schemas/{name}"
_TYPES: Sequence[type] = (
    bodies.GenerateBody,
    bodies.CompatGenerateBody,
    bodies.ChatBody,
    bodies.CompletionBody,
    tgi.GenerateResponse,
    tgi.StreamResponse,
    tgi.SimpleToken,
    chat.ChatCompletion,
    chat.ChatCompletionChunk,
    chat.ChatTokenizeResponse,
    completions.Completion,
    completions.CompletionChunk,
    models.Info,
    models.Model,
    models.ModelList,
    ErrorResponse,
)


def _reference(kind: type) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(name=_TGI_NAMES.get(kind.__name__, kind.__name__))}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


_REJECTIONS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is no JSON", "content": {"text/plain": {}}},
    401: {"description": "The API key is missing or wrong"},
    413: {"description": "The body is too large", "content": {"text/plain": {}}},
    415: {"description": "The body is not declared as JSON", "content": {"text/plain": {}}},
}
_ERRORS = {
    422: "Input validation error",
    424: "Generation error",
    429: "Model is overloaded",
    500: "Incomplete generation",
}


def _failure(text: str) -> dict[str, Any]:
    return {"description": text, "content": _json(_reference(ErrorResponse))}


def _post(
    name: str,
    summary: str,
    tag: str,
    body: type,
    answer: dict[str, Any],
    event: type | None = None,
    *,
    generates: bool = True,
) -> dict[str, Any]:
    content = _json(answer) if answer else {}
    if event is not None:
        content["text/event-stream"] = {"schema": _reference(event)}
    codes = _ERRORS if generates else {422: "Input validation error"}
    failures = {code: _failure(text) for code, text in codes.items()}
    return {
        "operation_id": name,
        "summary": summary,
        "tags": [tag],
        "openapi_extra": {
            "requestBody": {"required": True, "content": _json(_reference(body))},
            "responses": {"200": {"description": "Generated text" if generates else "Tokens", "content": content}},
        },
        "responses": {**_REJECTIONS, **failures},
    }


def _get(
    name: str, summary: str, answer: dict[str, Any] | None, failures: dict[int, str] | None = None
) -> dict[str, Any]:
    return {
        "operation_id": name,
        "summary": summary,
        "tags": ["Server"],
        "openapi_extra": {"responses": {"200": {"description": "OK", "content": answer or {}}}},
        "responses": {
            401: _REJECTIONS[401],
            **{code: _failure(text) for code, text in (failures or {}).items()},
        },
    }


_NATIVE, _OPENAI = "TGI", "OpenAI"
ROUTES: dict[str, dict[str, Any]] = {
    "/": _post(
        "compat_generate",
        "Generate text; with `stream`, a stream of tokens",
        _NATIVE,
        bodies.CompatGenerateBody,
        {"type": "array", "items": _reference(tgi.GenerateResponse)},
        tgi.StreamResponse,
    ),
    "/generate": _post("generate", "Generate text", _NATIVE, bodies.GenerateBody, _reference(tgi.GenerateResponse)),
    "/generate_stream": _post(
        "generate_stream", "Generate a stream of tokens", _NATIVE, bodies.GenerateBody, {}, tgi.StreamResponse
    ),
    "/tokenize": _post(
        "tokenize",
        "Tokenize a text",
        _NATIVE,
        bodies.GenerateBody,
        {"type": "array", "items": _reference(tgi.SimpleToken)},
        generates=False,
    ),
    "/chat_tokenize": _post(
        "get_chat_tokenize",
        "Template and tokenize a chat",
        _NATIVE,
        bodies.ChatBody,
        _reference(chat.ChatTokenizeResponse),
        generates=False,
    ),
    "/v1/chat/completions": _post(
        "chat_completions",
        "Answer a chat",
        _OPENAI,
        bodies.ChatBody,
        _reference(chat.ChatCompletion),
        chat.ChatCompletionChunk,
    ),
    "/v1/completions": _post(
        "completions",
        "Complete a text",
        _OPENAI,
        bodies.CompletionBody,
        _reference(completions.Completion),
        completions.CompletionChunk,
    ),
    "/health": _get("health", "Can the server generate?", None, {503: "The engine cannot generate now"}),
    "/info": _get("get_model_info", "What is served, within which limits", _json(_reference(models.Info))),
    "/metrics": _get("metrics", "Prometheus metrics", {"text/plain": {"schema": {"type": "string"}}}),
    "/v1/models": _get("openai_get_model_info", "The served models", _json(_reference(models.ModelList))),
    "/v1/models/{model_id}": _get(
        "openai_get_model", "One served model", _json(_reference(models.Model)), {404: "There is no such model"}
    ),
}


def description(app: FastAPI) -> dict[str, Any]:
    """The whole document: FastAPI's routes, and the types as components."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        license_info=app.license_info,
        routes=app.routes,
    )
    _, components = msgspec.json.schema_components(_TYPES, ref_template=_REFERENCE)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update({_TGI_NAMES.get(name, name): schema for name, schema in components.items()})
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}, {}]
    renamed: dict[str, Any] = _renamed(document)
    return renamed


def _renamed(value: Any) -> Any:
    """References to our names as references to TGI's."""
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: _renamed(item) for key, item in value.items()}
    target = renamed.get("$ref")
    if isinstance(target, str):
        name = target.rpartition("/")[2]
        renamed["$ref"] = _REFERENCE.format(name=_TGI_NAMES.get(name, name))
    return renamed
