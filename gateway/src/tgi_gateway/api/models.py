"""What the server is and how it is: `/info`, `/v1/models`, `/health`, `/metrics`."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct
from starlette.responses import Response

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


class UnknownModel(GatewayError):
    """`/v1/models/{id}` with an id that is not served."""

    error_type = "model_not_found"
    status = 404


def info(services: Services) -> Response:
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


def models(services: Services) -> Response:
    return Response(msgspec.json.encode(ModelList(data=_models(services))), media_type="application/json")


def model(services: Services, name: str) -> Response:
    found = next((each for each in _models(services) if each.id == name), None)
    if found is None:
        raise UnknownModel(f"The model `{name}` does not exist. This server has: {services.info.model_id}")
    return Response(msgspec.json.encode(found), media_type="application/json")


async def health(services: Services) -> Response:
    """200 without a body, or `Unhealthy`."""
    await services.backend.health()
    return Response(status_code=200)
