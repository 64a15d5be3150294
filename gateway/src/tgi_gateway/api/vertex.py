"""Vertex AI's route: several generations in one call, texts back in order."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway.api import decoding, models, prepared, tgi
from tgi_gateway.api.bodies import ChatBody, SagemakerBody, VertexBody, VertexGenerate
from tgi_gateway.api.errors import NATIVE
from tgi_gateway.api.routes import Route
from tgi_gateway.api.serving import Answer, Call, Services, together
from tgi_gateway.api.sse import unless_gone
from tgi_gateway.errors import GatewayError
from tgi_gateway.settings import Settings


class VertexResponse(Struct):
    predictions: list[str]


class NoInstances(GatewayError):
    """`/vertex` without anything to generate."""

    error_type = "Input validation error"
    status = 422

    def __init__(self) -> None:
        super().__init__("Input validation error")


async def vertex(services: Services, request: Request, raw: bytes) -> Response:
    strict = services.settings.strict
    body = decoding.decode(raw, VertexBody, strict=strict)
    instances = [_instance(bytes(each), strict) for each in body.instances]
    call = Call(services, "vertex")
    try:
        if not instances:
            raise NoInstances
        works = [_answer(services, instance) for instance in instances]
        answers = await unless_gone(request.receive, together(works))
    except Exception as error:
        call.failed(error)
        raise
    for answer in answers:
        call.succeeded(answer.generation, answer.valid.seed)
    texts = [answer.generation.text for answer in answers]
    return Response(msgspec.json.encode(VertexResponse(texts)), media_type="application/json")


def _instance(raw: bytes, strict: bool) -> VertexGenerate | ChatBody:
    """Raises `Rejection`."""
    given = decoding.decode(raw, SagemakerBody)
    if given.inputs is not msgspec.UNSET:
        return decoding.decode(raw, VertexGenerate, strict=strict)
    return decoding.decode(raw, ChatBody, strict=strict)


async def _answer(services: Services, instance: VertexGenerate | ChatBody) -> Answer:
    if isinstance(instance, VertexGenerate):
        return await tgi.best_answer(services, instance)
    _, answers = await prepared.answers_of(services, instance)
    return answers[0]


_ROUTE = Route(
    path="/vertex",
    handler=vertex,
    dialect=NATIVE,
    name="vertex_compatibility",
    summary="Generate a text for each instance",
    tag="Vertex AI",
    body=VertexBody,
    answer=VertexResponse,
    generates=True,
)
ROUTES = [_ROUTE]


def routes_of(settings: Settings) -> list[Route]:
    """Under the paths that Vertex AI asks for."""
    asked = [(_ROUTE, settings.aip_predict_route), (models.HEALTH, settings.aip_health_route)]
    taken = {route.path for route in (*ROUTES, *models.ROUTES)}
    return [replace(route, path=path, shown=False) for route, path in asked if path and path not in taken]
