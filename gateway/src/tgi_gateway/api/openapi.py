"""The description of the API, made from the very types that requests are decoded into."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import Response

from tgi_gateway.api.errors import NATIVE
from tgi_gateway.api.routes import Listed, Route

_TGI_NAMES = {
    "GenerateBody": "GenerateRequest",
    "CompatGenerateBody": "CompatGenerateRequest",
    "ParametersBody": "GenerateParameters",
    "GrammarBody": "GrammarType",
    "ChatBody": "ChatRequest",
    "CompletionBody": "CompletionRequest",
    "Completion": "CompletionFinal",
    "CompletionChunk": "Chunk",
    "ChatChoice": "ChatCompletionComplete",
    "ChatDelta": "ChatCompletionDelta",
    "Logprobs": "ChatCompletionLogprobs",
    "TokenLogprob": "ChatCompletionLogprob",
    "TopLogprob": "ChatCompletionTopLogprob",
    "CompletionChoice": "CompletionComplete",
    "DetokenizeBody": "DetokenizeRequest",
    "Model": "ModelInfo",
    "ModelList": "ModelsInfo",
    "SagemakerBody": "SagemakerRequest",
    "VertexBody": "VertexRequest",
    "InferenceBody": "InferenceRequest",
}
"""Names that generated clients know from TGI's own description."""
_REFERENCE = "#/components/schemas/{name}"
_UNREADABLE = {
    400: "The body is no JSON",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    422: "Input validation error",
}
_UNGENERATED = {
    424: "Generation error",
    429: "Model is overloaded",
    499: "The request was cancelled",
    500: "Incomplete generation",
    503: "The server is full, stops or has no engine; `Retry-After` says when to come again",
    504: "The request took too long",
}


def _name(kind: type) -> str:
    return _TGI_NAMES.get(kind.__name__, kind.__name__)


def _reference(kind: type) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(name=_name(kind))}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _failure(route: Route, status: int, text: str) -> dict[str, Any]:
    content = _json(_reference(route.dialect.document))
    if route.dialect is NATIVE and status in _UNREADABLE:
        plain = {"text/plain": {"schema": {"type": "string"}}}
        content = {**content, **plain} if status == 422 else plain
    return {"description": text, "content": content}


def described(route: Route) -> dict[str, Any]:
    """The arguments with which FastAPI describes the route."""
    if not route.shown:
        return {"include_in_schema": False}
    content: dict[str, Any] = {}
    match route.answer:
        case "text":
            content = {"text/plain": {"schema": {"type": "string"}}}
        case Listed(item):
            content = _json({"type": "array", "items": _reference(item)})
        case None:
            pass
        case kind:
            content = _json(_reference(kind))
    if route.event is not None:
        content["text/event-stream"] = {"schema": _reference(route.event)}
    texts: dict[int, str] = {}
    if route.body is not None:
        texts |= _UNREADABLE
    if route.generates:
        texts |= _UNGENERATED
    extra: dict[str, Any] = {"responses": {"200": {"description": "OK", "content": content}}}
    variables = re.findall(r"\{(\w+)", route.path)
    if variables:
        extra["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in variables
        ]
    if route.body is not None:
        extra["requestBody"] = {"required": True, "content": _json(_reference(route.body))}
    return {
        "response_class": Response,  # which promises no content of its own
        "operation_id": route.name,
        "summary": route.summary,
        "tags": [route.tag],
        "openapi_extra": extra,
        "responses": {
            401: {"description": "The API key is missing or wrong"},
            **{status: _failure(route, status, text) for status, text in (texts | dict(route.failures)).items()},
        },
    }


def _types(routes: Iterable[Route]) -> Iterator[type]:
    for route in routes:
        if route.shown:
            answer = route.answer.item if isinstance(route.answer, Listed) else route.answer
            yield from (kind for kind in (route.body, answer, route.event) if isinstance(kind, type))
            yield route.dialect.document


def description(app: FastAPI, routes: Sequence[Route]) -> dict[str, Any]:
    """The whole document: FastAPI's routes, and the types as components."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        license_info=app.license_info,
        routes=app.routes,
    )
    _, components = msgspec.json.schema_components(list(dict.fromkeys(_types(routes))), ref_template=_REFERENCE)
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
