"""Who calls: the id under which a request is known, and whose API key it came with."""

from __future__ import annotations

import asyncio
import re
import secrets
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tgi_gateway.telemetry.tracing import RequestSpan, Tracing

HEADER = "x-request-id"
ANTHROPIC_HEADER = "request-id"
"""Where Anthropic's clients look for it."""
TIMEOUT_HEADER = "x-request-timeout"
"""Seconds in which the client wants its whole answer; it can only shorten what the operator allows."""
PRIORITY_HEADER = "x-request-priority"
"""A whole number; higher waits longer. It can only be worse than the 0 that a request has without it."""
_ACCEPTABLE = re.compile(r"[\x21-\x7e]{1,128}")
_NUMBER = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
_PREFIXES = ("chatcmpl-", "cmpl-", "resp_", "msg_")
"""What answers put before a request's id to make their own."""


@dataclass(slots=True)
class Caller:
    """One HTTP request, as far as every layer may know it."""

    request_id: str
    """The client's `X-Request-Id`, or one of ours."""
    tenant: str = ""
    """Names the API key, where one is needed; not the key itself."""
    deadline: float | None = None
    """When it must have its whole answer, in the event loop's time."""
    priority: int = 0
    """As `types.Request.priority`."""
    span: RequestSpan | None = None
    """Its trace, where there are any."""

    @property
    def traceparent(self) -> str:
        return self.span.traceparent if self.span is not None else ""


_current: ContextVar[Caller] = ContextVar("caller")


def current() -> Caller:
    """The request that is being handled."""
    return _current.get(Caller(""))


def new_id(prefix: str) -> str:
    """The id of an answer, made from the request's, so that either cancels it."""
    return f"{prefix}{current().request_id or secrets.token_hex(12)}"


def names_of(given: str) -> list[str]:
    """The request ids that a client may mean by `given`: it may be an answer's id."""
    return [given, *(given.removeprefix(prefix) for prefix in _PREFIXES if given.startswith(prefix))]


class Identify:
    """Gives every request its `Caller`, and every response the request's id."""

    def __init__(self, app: ASGIApp, timeout_s: float | None = None, tracing: Tracing | None = None) -> None:
        self._app = app
        self._timeout_s = timeout_s
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(HEADER, "")
        caller = Caller(given if _ACCEPTABLE.fullmatch(given) else secrets.token_hex(12))
        caller.priority = int(_number(headers.get(PRIORITY_HEADER)) or 0)
        timeouts_s = [each for each in (self._timeout_s, _number(headers.get(TIMEOUT_HEADER))) if each is not None]
        if timeouts_s:
            caller.deadline = asyncio.get_running_loop().time() + min(timeouts_s)

        if self._tracing is not None and scope["method"] == "POST":
            facts = {"http.request.method": "POST", "url.path": scope["path"], "request_id": caller.request_id}
            caller.span = self._tracing.begin(f"POST {scope['path']}", headers.get("traceparent", ""), facts)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                told = MutableHeaders(scope=message)
                told[HEADER] = told[ANTHROPIC_HEADER] = caller.request_id
            await send(message)

        token = _current.set(caller)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _current.reset(token)
            if caller.span is not None:
                caller.span.end(status)


def _number(text: str | None) -> float | None:
    """A number of at least 0 and sane size; anything else counts as not given."""
    return float(text) if text is not None and _NUMBER.fullmatch(text) else None
