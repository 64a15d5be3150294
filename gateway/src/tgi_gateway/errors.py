"""Every error a user can meet. Each knows its TGI `error_type` and HTTP status; processes exchange only those names."""

from __future__ import annotations

from typing import ClassVar


class GatewayError(Exception):
    """Root of the tree. `str(error)` is what a client may read: never a library's own text, path or address."""

    error_type: ClassVar[str] = "generation"
    status: ClassVar[int] = 500
    prefix: ClassVar[str] = ""
    code: ClassVar[str | None] = None
    """OpenAI's name for it, where that says more than `error_type`."""
    retry_after_s: float = 0.0
    """When to come again; 0.0: not known."""

    def __init__(self, detail: str = "") -> None:
        super().__init__(f"{self.prefix}{detail}")
        self.detail = detail


class ValidationError(GatewayError):
    """The request breaks a rule."""

    error_type = "validation"
    status = 422
    prefix = "Input validation error: "


class Unsupported(ValidationError):
    """The request is legal, but this engine or model cannot honour it."""

    code = "unsupported_parameter"


class ContextExceeded(ValidationError):
    """Prompt, or prompt and answer, are longer than the model or the operator allows."""

    code = "context_length_exceeded"


class TemplateError(GatewayError):
    """The chat template is missing or refused the messages."""

    error_type = "template_error"
    status = 422
    prefix = "Template error: "


class ToolError(GatewayError):
    """Tool definitions, choice or output are unusable."""

    error_type = "tool_error"
    status = 422
    prefix = "Tool error: "


class Overloaded(GatewayError):
    """The server is full; try later. TGI's own routes say so with 429."""

    error_type = "overloaded"
    status = 503

    def __init__(self, detail: str = "Model is overloaded", *, retry_after_s: float = 0.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """This API key has as much open as it may have, however empty the server is."""

    error_type = "rate_limited"
    status = 429


class BackendFailed(GatewayError):
    """The engine could not finish this request."""

    error_type = "generation"
    status = 424
    prefix = "Request failed during generation: "


class IncompleteGeneration(GatewayError):
    """The engine went away before the request's last token."""

    error_type = "incomplete_generation"
    status = 500

    def __init__(self, detail: str = "Incomplete generation") -> None:
        super().__init__(detail)


class Cancelled(GatewayError):
    """Somebody cancelled the request by its id."""

    error_type = "cancelled"
    status = 499

    def __init__(self, detail: str = "The request was cancelled") -> None:
        super().__init__(detail)


class TimedOut(GatewayError):
    """The request took longer than the operator allows."""

    error_type = "timeout"
    status = 504

    def __init__(self, detail: str = "The request took longer than this server allows") -> None:
        super().__init__(detail)


class Unhealthy(GatewayError):
    """The engine cannot generate now."""

    error_type = "healthcheck"
    status = 503

    def __init__(self, detail: str = "unhealthy") -> None:
        super().__init__(detail)


class StartError(GatewayError):
    """The server cannot start: settings, plug-in, model files, port. Printed without a traceback; exit code 1."""

    error_type = "start"
    exit_code: int = 1

    def __init__(self, detail: str = "", *, exit_code: int | None = None) -> None:
        """`exit_code`: that of the process which could not start, where it was another one."""
        super().__init__(detail)
        if exit_code is not None:
            self.exit_code = exit_code


class SettingsError(StartError):
    """A flag or environment variable is wrong; exit code 2, as argparse."""

    exit_code = 2


class PluginError(StartError):
    """A backend is missing or broken; the message names the pip command that would mend it."""


class ModelError(StartError):
    """A model folder is missing files, or they contradict each other."""


by_type: dict[str, type[GatewayError]] = {
    kind.error_type: kind
    for kind in (
        ValidationError,
        TemplateError,
        ToolError,
        Overloaded,
        RateLimited,
        BackendFailed,
        IncompleteGeneration,
        Unhealthy,
    )
}


def from_wire(error_type: str, detail: str, retry_after_s: float = 0.0) -> GatewayError:
    """The error that a `Failed` event stands for; an unknown type is a failed backend."""
    error = by_type.get(error_type, BackendFailed)(detail)
    error.retry_after_s = retry_after_s
    return error
