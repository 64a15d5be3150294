"""KServe's V2 inference protocol (Open Inference Protocol), as far as texts go.

Texts are tensors of type BYTES: as TGI a list of a UTF-8 text's bytes, or as the protocol a list of one text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway.api import decoding, tgi
from tgi_gateway.api.bodies import GenerateBody, InferenceBody, InputTensor
from tgi_gateway.api.errors import NATIVE
from tgi_gateway.api.routes import Route
from tgi_gateway.api.serving import VERSION, Answer, Call, Services, together
from tgi_gateway.api.sse import unless_gone
from tgi_gateway.errors import GatewayError


class ServerMetadata(Struct):
    name: str
    version: str
    extensions: list[str]


class Live(Struct):
    live: bool


class OutputTensor(Struct):
    name: str
    shape: list[int]
    datatype: Literal["BYTES"]
    data: list[int | str]


class InferenceResponse(Struct):
    id: str
    outputs: list[OutputTensor]


class LengthMismatch(GatewayError):
    """Not one output for each input."""

    error_type = "length mismatch"
    status = 422

    def __init__(self) -> None:
        super().__init__("Inputs and outputs length mismatch")


class NoText(GatewayError):
    """An input's bytes are no UTF-8."""

    error_type = "utf8"
    status = 422


async def server_metadata(_services: Services, _request: Request, _raw: bytes) -> Response:
    return _json(ServerMetadata("text-generation-inference", VERSION, ["health", "models", "metrics"]))


async def live(_services: Services, _request: Request, _raw: bytes) -> Response:
    return _json(Live(True))


async def ready(services: Services, _request: Request, _raw: bytes) -> Response:
    """As ``/health/ready``: whether requests are taken, not whether the engine is quick. Raises `Unhealthy`."""
    services.check_open()
    return _json(Live(True))


async def model_metadata(_services: Services, request: Request, _raw: bytes) -> Response:
    path = request.path_params
    return _json(ServerMetadata(path["model_name"], path["model_version"], ["infer", "ready"]))


async def infer(services: Services, request: Request, raw: bytes) -> Response:
    body = decoding.decode(raw, InferenceBody, strict=services.settings.strict)
    call = Call(services, "kserve")
    try:
        if len(body.inputs) != len(body.outputs):
            raise LengthMismatch
        wanted = [GenerateBody(inputs=_text(tensor), parameters=body.parameters) for tensor in body.inputs]
        works = [tgi.best_answer(services, each) for each in wanted]
        answers = await unless_gone(request.receive, together(works))
    except Exception as error:
        call.failed(error)
        raise
    for answer in answers:
        call.succeeded(answer.generation, answer.valid.seed)
    outputs = [
        _output(output.name, answer, given)
        for output, answer, given in zip(body.outputs, answers, body.inputs, strict=True)
    ]
    return _json(InferenceResponse(body.id, outputs))


def _text(tensor: InputTensor) -> str:
    """Raises `NoText`."""
    texts = [each for each in tensor.data if isinstance(each, str)]
    numbers = [each for each in tensor.data if isinstance(each, int)]
    if texts and (numbers or len(texts) > 1):
        raise NoText(f"input `{tensor.name}` must be the bytes of a text, or a list of one text")
    if texts:
        return texts[0]
    try:
        return bytes(numbers).decode()
    except UnicodeDecodeError as error:
        raise NoText(f"input `{tensor.name}` is no UTF-8: {error.reason} at byte {error.start}") from None


def _output(name: str, answer: Answer, given: InputTensor) -> OutputTensor:
    """In the form of the input."""
    text = answer.generation.text
    if any(isinstance(each, str) for each in given.data):
        return OutputTensor(name, [1], "BYTES", [text])
    data = text.encode(errors="replace")
    return OutputTensor(name, [1, len(data)], "BYTES", list(data))


def _json(document: Struct) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")


_MODEL = "/v2/models/{model_name}/versions/{model_version}"
_READY = Route(
    path="/v2/health/ready",
    handler=ready,
    dialect=NATIVE,
    method="GET",
    name="kserve_health_ready",
    summary="Does the server take requests?",
    tag="KServe",
    answer=Live,
    failures={503: "It stops, or has no engine now"},
)
ROUTES = [
    Route(
        path="/v2",
        handler=server_metadata,
        dialect=NATIVE,
        method="GET",
        name="kserve_server_metadata",
        summary="What the server is",
        tag="KServe",
        answer=ServerMetadata,
    ),
    Route(
        path="/v2/health/live",
        handler=live,
        dialect=NATIVE,
        method="GET",
        name="kserve_health_live",
        summary="Does the server answer?",
        tag="KServe",
        answer=Live,
    ),
    _READY,
    replace(_READY, path=f"{_MODEL}/ready", name="kserve_model_metadata_ready"),
    Route(
        path=_MODEL,
        handler=model_metadata,
        dialect=NATIVE,
        method="GET",
        name="kserve_model_metadata",
        summary="What the model can do",
        tag="KServe",
        answer=ServerMetadata,
    ),
    Route(
        path=f"{_MODEL}/infer",
        handler=infer,
        dialect=NATIVE,
        name="kserve_model_infer",
        summary="Generate a text for each input",
        tag="KServe",
        body=InferenceBody,
        answer=InferenceResponse,
        generates=True,
    ),
]
