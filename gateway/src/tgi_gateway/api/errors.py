"""What a client reads when a request fails: error objects in a route's dialect, plain text for unreadable bodies."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from starlette.responses import Response

from tgi_gateway.errors import (
    Cancelled,
    GatewayError,
    IncompleteGeneration,
    Overloaded,
    TemplateError,
    TimedOut,
    Unhealthy,
    Unsupported,
    ValidationError,
)

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1
"""Where no better time is known."""
INTERNAL = GatewayError("Internal server error")


class Rejection(Exception):
    """A request that cannot be read as one. On native routes it is answered in plain text, as by TGI's framework."""

    def __init__(self, status: int, text: str, code: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.code = code


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


class UnknownParameter(GatewayError):
    """A name in the body that no API defines."""

    error_type = "validation"
    status = 400
    code = "unknown_parameter"

    def __init__(self, path: str, hint: str = "") -> None:
        super().__init__(f"Unknown parameter: `{path}`{hint}")


class Dialect(Protocol):
    """How a family of routes tells its errors."""

    named_events: bool
    """Whether the events of its streams have names: their documents' `type`."""
    document: type
    """An error's document, for the API description."""

    def status(self, error: GatewayError) -> int:
        """The HTTP status of an error response."""
        ...

    def body(self, error: GatewayError) -> object:
        """The JSON document of an error response."""
        ...

    def event(self, error: GatewayError) -> Mapping[str, Any]:
        """The JSON document of the event that ends a stream which has already begun."""
        ...

    def rejection(self, rejection: Rejection) -> Response:
        """The answer to what could not be read."""
        ...


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """For the API description."""

    error: str = field(metadata={"description": "What is wrong, in words."})
    error_type: str = field(metadata={"description": "One of a closed set of names."})


@dataclass(frozen=True, slots=True)
class OpenAIError:
    """What is wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = field(default=None, metadata={"description": "The field of the request that is meant."})
    code: str | None = None


@dataclass(frozen=True, slots=True)
class OpenAIErrorResponse:
    """For the API description of OpenAI's routes."""

    error: OpenAIError
    error_type: str | None = field(default=None, metadata={"description": "TGI's name of the error."})


class NativeDialect:
    """TGI's ErrorResponse, in responses and streams."""

    named_events = False
    document: type = ErrorResponse

    def status(self, error: GatewayError) -> int:
        return 429 if isinstance(error, Overloaded) else error.status

    def body(self, error: GatewayError) -> Mapping[str, Any]:
        # TGI's clients know one name for all that is to be tried again later.
        kind = Overloaded.error_type if isinstance(error, Overloaded) else error.error_type
        return {"error": str(error), "error_type": kind}

    def event(self, error: GatewayError) -> Mapping[str, Any]:
        if isinstance(error, IncompleteGeneration):
            why = str(error) if error.detail != IncompleteGeneration().detail else "Incomplete generation stream"
            return {"error": why, "error_type": "incomplete_generation_stream"}
        return self.body(error)

    def rejection(self, rejection: Rejection) -> Response:
        return Response(str(rejection), rejection.status, media_type="text/plain")


class OpenAIDialect:
    """OpenAI's error object. TGI's `error_type` stays beside it, and its `http_status_code` in streams."""

    named_events = False
    document: type = OpenAIErrorResponse

    def status(self, error: GatewayError) -> int:
        return 400 if isinstance(error, Unsupported) else error.status

    def body(self, error: GatewayError) -> dict[str, object]:
        told = openai_error(str(error), self.status(error), error.code or error.error_type, parameter_of(error))
        return {"error": told, "error_type": error.error_type}

    def event(self, error: GatewayError) -> Mapping[str, Any]:
        told = openai_error(str(error), self.status(error), error.code or error.error_type, parameter_of(error))
        return {"error": told | {"http_status_code": self.status(error)}, "error_type": error.error_type}

    def rejection(self, rejection: Rejection) -> Response:
        return openai_refusal(rejection.status, str(rejection), rejection.code)


NATIVE = NativeDialect()
OPENAI = OpenAIDialect()

_OPENAI_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "top_n_tokens": "top_logprobs"}
"""What messages in TGI's words call by another name than the request did."""


def openai_error(message: str, status: int, code: str | None, param: str | None = None) -> dict[str, object]:
    """What OpenAI's answers hold under `error`."""
    if status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if status < 500 and status != 424 else "server_error"
    return {"message": message, "type": kind, "param": param, "code": code}


def openai_refusal(
    status: int, text: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer to what never became a request."""
    document = {"error": openai_error(text, status, code)}
    return Response(msgspec.json.encode(document), status, headers, "application/json")


def parameter_of(error: GatewayError) -> str | None:
    """The request's field that a message speaks of: the first name in backticks."""
    if not isinstance(error, ValidationError | UnknownParameter):
        return None
    named = re.search(r"`([^`]+)`", str(error))
    return _OPENAI_NAMES.get(named[1], named[1]) if named else None


def error_response(error: GatewayError, dialect: Dialect) -> Response:
    headers: Mapping[str, str] | None = None
    if isinstance(error, Overloaded | Unhealthy):
        headers = {"retry-after": str(math.ceil(error.retry_after_s) or RETRY_AFTER_S)}
    return Response(msgspec.json.encode(dialect.body(error)), dialect.status(error), headers, "application/json")


def as_gateway_error(error: Exception) -> GatewayError:
    """A defect of ours, logged here with its traceback, is told to the client without details."""
    if isinstance(error, GatewayError):
        return error
    log.error("a request failed unexpectedly", exc_info=error)
    return INTERNAL


def failure_label(error: GatewayError) -> str:
    """The `err` label of `tgi_request_failure`. Whatever is counted ends as a success or under one of these."""
    match error:
        case Overloaded():
            return "overloaded"
        case ValidationError() | SuffixUnsupported() | BatchTooLarge() | UnknownParameter():
            return "validation"
        case TemplateError():
            return "template"
        case IncompleteGeneration() | TimedOut():
            return "incomplete"
        case Cancelled():
            return "dropped"
    return "generation" if error.status >= 500 or error.status == 424 else "validation"
