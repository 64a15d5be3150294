"""What a client reads when a request fails: error objects in a route's dialect, plain text for unreadable bodies."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from starlette.responses import Response

from tgi_gateway.errors import GatewayError, IncompleteGeneration, Overloaded, TemplateError, Unhealthy, ValidationError

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1
INTERNAL = GatewayError("Internal server error")


class Rejection(Exception):
    """A request that cannot be read as one. Answered in plain text, as by TGI's web framework."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status

    def response(self) -> Response:
        return Response(str(self), self.status, media_type="text/plain")


class SuffixUnsupported(GatewayError):
    """`/v1/completions` with a suffix."""

    error_type = "suffix not supported"
    status = 422

    def __init__(self) -> None:
        super().__init__("Suffix is not supported and can be achieved by preprocessing the prompt.")


class BatchTooLarge(GatewayError):
    """More prompts or choices in one call than the operator allows."""

    error_type = "batch size exceeded"
    status = 422

    def __init__(self, limit: int) -> None:
        super().__init__(f"Number of prompts exceeds the maximum allowed batch size of {limit}")


class ClientGone(Exception):
    """The client hung up; there is nobody to answer."""


class Dialect(Protocol):
    """How a family of routes tells its errors."""

    def body(self, error: GatewayError) -> object:
        """The JSON document of an error response."""
        ...

    def event(self, error: GatewayError) -> object:
        """The JSON document of the event that ends a stream which has already begun."""
        ...


class NativeDialect:
    """TGI's ErrorResponse, in responses and streams."""

    def body(self, error: GatewayError) -> object:
        return {"error": str(error), "error_type": error.error_type}

    def event(self, error: GatewayError) -> object:
        if isinstance(error, IncompleteGeneration):
            return {"error": "Incomplete generation stream", "error_type": "incomplete_generation_stream"}
        return self.body(error)


class OpenAIDialect(NativeDialect):
    """TGI's form on the `/v1` routes; the code in a stream is the true one."""

    def event(self, error: GatewayError) -> object:
        return {"error": {"message": str(error), "http_status_code": error.status}}


NATIVE = NativeDialect()
OPENAI = OpenAIDialect()


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """For the API description."""

    error: str = field(metadata={"description": "What is wrong, in words."})
    error_type: str = field(metadata={"description": "One of a closed set of names."})


def error_response(error: GatewayError, dialect: Dialect) -> Response:
    headers: Mapping[str, str] | None = None
    if isinstance(error, Overloaded | Unhealthy):
        headers = {"retry-after": str(RETRY_AFTER_S)}
    return Response(msgspec.json.encode(dialect.body(error)), error.status, headers, "application/json")


def as_gateway_error(error: Exception) -> GatewayError:
    """A defect of ours, logged here with its traceback, is told to the client without details."""
    if isinstance(error, GatewayError):
        return error
    log.error("a request failed unexpectedly", exc_info=error)
    return INTERNAL


def failure_label(error: GatewayError) -> str | None:
    """The `err` label of `tgi_request_failure`; None: not counted."""
    match error:
        case Overloaded():
            return "overloaded"
        case ValidationError() | SuffixUnsupported() | BatchTooLarge():
            return "validation"
        case TemplateError():
            return "template"
        case IncompleteGeneration():
            return "incomplete"
    return "generation" if error.status in (424, 500) else None
