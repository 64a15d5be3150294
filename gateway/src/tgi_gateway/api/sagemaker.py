"""SageMaker's one route: the body tells which API it means."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway.api import chat, completions, decoding, tgi
from tgi_gateway.api.bodies import ChatBody, CompatGenerateBody, CompletionBody, SagemakerBody
from tgi_gateway.api.errors import NATIVE, OPENAI, Dialect, Rejection, error_response
from tgi_gateway.api.routes import Route
from tgi_gateway.api.serving import Services
from tgi_gateway.errors import GatewayError

NO_VARIANT = (
    "Failed to deserialize the JSON body into the target type: "
    "data did not match any variant of untagged enum SagemakerRequest"
)

Answering = Callable[[Services, Request, Any], Awaitable[Response]]
_VARIANTS: list[tuple[str, type[Struct], Answering, Dialect]] = [
    ("inputs", CompatGenerateBody, tgi.compat_answer, NATIVE),
    ("messages", ChatBody, chat.answer, OPENAI),
    ("prompt", CompletionBody, completions.answer, OPENAI),
]
"""The field that each needs, in the order in which they are tried."""


async def invocations(services: Services, request: Request, raw: bytes) -> Response:
    """The answer of the API whose body this is, with its headers, stream and errors."""
    body, answer, dialect = _variant(raw, services.settings.strict)
    try:
        return await answer(services, request, body)
    except GatewayError as error:
        return error_response(error, dialect)


def _variant(raw: bytes, strict: bool) -> tuple[Struct, Answering, Dialect]:
    """Raises `Rejection`, telling why the first body that it might have been is none."""
    given = decoding.decode(raw, SagemakerBody)
    reasons: list[Rejection] = []
    for name, kind, answer, dialect in _VARIANTS:
        if getattr(given, name) is not msgspec.UNSET:
            try:
                return decoding.decode(raw, kind, strict=strict), answer, dialect
            except Rejection as reason:
                reasons.append(reason)
    if not reasons:
        raise Rejection(422, f"{NO_VARIANT}: it has none of `inputs`, `messages` and `prompt`")
    _, _, why = str(reasons[0]).partition("target type: ")
    raise Rejection(422, f"{NO_VARIANT}: {why}")


ROUTES = [
    Route(
        path="/invocations",
        handler=invocations,
        dialect=NATIVE,
        name="sagemaker_compatibility",
        summary="Generate text, answer a chat or complete a text, as the body tells",
        tag="SageMaker",
        body=SagemakerBody,
        answer=tgi.GenerateResponse,
        event=tgi.StreamResponse,
        generates=True,
    )
]
