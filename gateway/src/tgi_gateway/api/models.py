"""What the server is, how it is, and what it is asked to end: `/info`, `/v1/models`, `/health`, `/metrics`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Literal

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway.api import caller
from tgi_gateway.api.errors import NATIVE, OPENAI
from tgi_gateway.api.routes import Route
from tgi_gateway.api.serving import VERSION, Services
from tgi_gateway.errors import GatewayError

ROUTER = "text-generation-router"
"""TGI's clients look for this name."""


class Info(Struct, kw_only=True):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    model_dtype: str
    model_device_type: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_total_tokens: int
    max_batch_prefill_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    backend: str


class Model(Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str


class ModelList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class CancelledRequest(Struct, kw_only=True):
    id: str
    object: Literal["request.cancelled"] = "request.cancelled"
    cancelled: int
    """Generations that were ended: a request may have several."""


class UnknownRequest(GatewayError):
    """`DELETE /v1/requests/{id}` with an id of no open request."""

    error_type = "request_not_found"
    status = 404


class UnknownModel(GatewayError):
    """`/v1/models/{id}` with an id that is not served."""

    error_type = "model_not_found"
    status = 404


async def info(services: Services, _request: Request, _raw: bytes) -> Response:
    served, settings = services.info, services.settings
    document = Info(
        model_id=served.model_id,
        model_sha=None,
        model_pipeline_tag="text-generation",
        model_dtype=served.dtype,
        model_device_type=served.device,
        max_concurrent_requests=settings.max_concurrent_requests,
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stop_sequences,
        max_input_tokens=served.max_input_tokens,
        max_total_tokens=served.max_total_tokens,
        max_batch_total_tokens=served.max_batch_total_tokens,
        max_batch_prefill_tokens=served.max_batch_prefill_tokens,
        validation_workers=settings.validation_workers,
        max_client_batch_size=settings.max_client_batch_size,
        router=ROUTER,
        version=VERSION,
        sha=None,
        docker_label=None,
        backend=settings.backend,
    )
    return Response(msgspec.json.encode(document), media_type="application/json")


def _models(services: Services) -> list[Model]:
    names = [services.info.model_id, *sorted(services.adapters)]
    return [Model(id=name, owned_by=services.info.model_id) for name in names]


async def models(services: Services, _request: Request, _raw: bytes) -> Response:
    return Response(msgspec.json.encode(ModelList(data=_models(services))), media_type="application/json")


async def model(services: Services, request: Request, _raw: bytes) -> Response:
    name = request.path_params["model_id"]
    found = next((each for each in _models(services) if each.id == name), None)
    if found is None:
        raise UnknownModel(f"The model `{name}` does not exist. This server has: {services.info.model_id}")
    return Response(msgspec.json.encode(found), media_type="application/json")


async def live(_services: Services, _request: Request, _raw: bytes) -> Response:
    """200: this process answers. A busy server, or one whose engine is being started again, needs no restart."""
    return Response(status_code=200)


async def ready(services: Services, _request: Request, _raw: bytes) -> Response:
    """200 if a request that comes now can be taken, or `Unhealthy`."""
    services.check_open()
    return Response(status_code=200)


async def generating(services: Services, _request: Request, _raw: bytes) -> Response:
    """200 if the engine can generate, which it shows by a token or, while busy, by its progress; or `Unhealthy`."""
    services.check_open()
    await services.backend.health()
    return Response(status_code=200)


async def metrics(services: Services, _request: Request, _raw: bytes) -> Response:
    text, media_type = await asyncio.to_thread(services.metrics.exposition)
    return Response(text, media_type=media_type)


async def cancel(services: Services, request: Request, _raw: bytes) -> Response:
    """End a request of the same API key, given its `X-Request-Id` or the id of its answer."""
    given = request.path_params["request_id"]
    for name in caller.names_of(given):
        count = await services.generations.cancel_named(caller.current().tenant, name)
        if count:
            return Response(
                msgspec.json.encode(CancelledRequest(id=given, cancelled=count)), media_type="application/json"
            )
    raise UnknownRequest(f"No open request has the id `{given}`; it may have ended already")


HEALTH = Route(
    path="/health",
    handler=live,
    dialect=NATIVE,
    method="GET",
    name="health",
    summary="Does the server live?",
    tag="Server",
)
READY = Route(
    path="/health/ready",
    handler=ready,
    dialect=NATIVE,
    method="GET",
    name="health_ready",
    summary="Does the server take requests?",
    tag="Server",
    failures={503: "It stops, or has no engine now"},
)


ROUTES = [
    HEALTH,
    READY,
    replace(
        READY,
        path="/health/generate",
        handler=generating,
        name="health_generate",
        summary="Can the engine generate?",
        failures={503: "It cannot now"},
    ),
    replace(HEALTH, path="/ping", shown=False),
    replace(HEALTH, path="/", shown=False),
    Route(
        path="/info",
        handler=info,
        dialect=NATIVE,
        method="GET",
        name="get_model_info",
        summary="What is served, within which limits",
        tag="Server",
        answer=Info,
    ),
    Route(
        path="/metrics",
        handler=metrics,
        dialect=NATIVE,
        method="GET",
        name="metrics",
        summary="Prometheus metrics",
        tag="Server",
        answer="text",
    ),
    Route(
        path="/v1/models",
        handler=models,
        dialect=OPENAI,
        method="GET",
        name="openai_get_model_info",
        summary="The served models",
        tag="Server",
        answer=ModelList,
    ),
    Route(
        path="/v1/models/{model_id:path}",
        handler=model,
        dialect=OPENAI,
        method="GET",
        name="openai_get_model",
        summary="One served model",
        tag="Server",
        answer=Model,
        failures={404: "There is no such model"},
    ),
    Route(
        path="/v1/requests/{request_id:path}",
        handler=cancel,
        dialect=OPENAI,
        method="DELETE",
        name="cancel_request",
        summary="Cancel a request that is being answered",
        tag="Server",
        answer=CancelledRequest,
        failures={404: "No open request has this id"},
    ),
]
