"""The ingress: HTTP to the replica that the router chooses, and to another one if that has no server now."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tgi_gateway.api import sse
from tgi_gateway.api.errors import NATIVE, OPENAI, Dialect, error_response
from tgi_gateway.api.routes import all_routes
from tgi_gateway.errors import IncompleteGeneration, Unhealthy
from tgi_gateway.settings import Settings
from tgi_ray.exposition import merged
from tgi_ray.messages import OF_A_CONNECTION, Asked, Broken, Down, Head, Taken
from tgi_ray.prefixes import blocks_of

ROUTED_WITHIN_S = 30.0
"""For a replica to take a request; longer means that there is none."""
ALL_ANSWER_WITHIN_S = 30.0
LENGTH = b"content-length"
REQUEST_ID = b"x-request-id"
"""Serve gives every request one before it comes here, and every answer the same."""


class _NoServer(Exception):
    """Nobody takes the request."""


class Ingress:
    """A deployment."""

    def __init__(self, replicas: DeploymentHandle, body_limit: int) -> None:
        """Of a body that is longer than `body_limit` bytes so much is passed on that the server refuses it itself."""
        self._replicas = replicas
        self._ask = replicas.options(method_name="ask", stream=True)
        self._body_limit = body_limit
        self._dialects = {route.path: route.dialect for route in all_routes(Settings())}

    async def __call__(self, request: Request) -> Response:
        asked = await self._asked(request)
        path = request.url.path
        dialect = self._dialects.get(path, OPENAI if path.startswith("/v1/") else NATIVE)
        try:
            if (asked.method, path) == ("GET", "/metrics"):
                return await self._metrics(asked)
            if asked.method == "DELETE":
                return await self._to_all(asked)
            return await self._to_one(asked, dialect)
        except _NoServer:
            return error_response(Unhealthy("No server takes requests now; try again"), dialect)
        except (IncompleteGeneration, RayError):
            return error_response(IncompleteGeneration("Incomplete generation: the server went away"), dialect)

    async def _asked(self, request: Request) -> Asked:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._body_limit:
                del body[self._body_limit + 1 :]
                break
        raw = bytes(body)
        headers = [pair for pair in request.headers.raw if pair[0] not in (*OF_A_CONNECTION, LENGTH)]
        caller = request.headers.get("authorization") or request.headers.get("x-api-key", "")
        blocks = blocks_of(raw, caller.encode()) if request.method == "POST" else ()
        query = request.scope["query_string"].decode("latin-1")
        target = request.scope.get("raw_path", b"").decode("latin-1") or request.url.path
        return Asked(request.method, f"{target}?{query}" if query else target, headers, raw, blocks)

    async def _to_one(self, asked: Asked, dialect: Dialect) -> Response:
        """Raises `_NoServer`, `IncompleteGeneration` and Ray's errors."""
        parts, head = await self._begun(asked)
        return _answer(head, parts, dialect)

    async def _begun(self, asked: Asked) -> tuple[DeploymentResponseGenerator, Head]:
        """An answer, up to its head, by whoever gives one."""
        while True:
            parts: DeploymentResponseGenerator = self._ask.remote(asked)
            try:
                part = await asyncio.wait_for(anext(parts, Broken()), ROUTED_WITHIN_S)
                if isinstance(part, Taken):
                    part = await anext(parts, Broken())
            except TimeoutError:
                parts.cancel()
                raise _NoServer from None
            except BaseException:
                parts.cancel()  # the client has left: so does its request
                raise
            match part:
                case Head():
                    return parts, part
                case Down(replica) if replica not in asked.avoid:
                    asked = replace(asked, avoid=asked.avoid | {replica})
                case Down():
                    raise _NoServer  # the router had no other
                case _:
                    raise IncompleteGeneration

    async def _to_all(self, asked: Asked) -> Response:
        """Cancelling by id: only one replica knows the request. The answer is that of the one which did it, or any."""
        answers = await self._from_all(asked)
        _, head, body = next((each for each in answers if each[1].status < 300), answers[0])
        return _response(head, body)

    async def _metrics(self, asked: Asked) -> Response:
        answers = await self._from_all(asked)
        _, head, _ = answers[0]
        if head.status != 200:
            return _response(head, answers[0][2])
        texts = {name: body.decode() for name, answered, body in answers if answered.status == 200}
        return _response(head, merged(texts).encode())

    async def _from_all(self, asked: Asked) -> list[tuple[str, Head, bytes]]:
        """Raises `_NoServer`."""
        sent = self._replicas.broadcast("ask_whole", asked)
        try:
            found = await sent.results_async(timeout_s=ALL_ANSWER_WITHIN_S, return_exceptions=True)
        except TimeoutError:
            raise _NoServer from None
        answers = [each for each in found if isinstance(each, tuple)]
        if not answers:
            raise _NoServer
        return answers


def _answer(head: Head, parts: DeploymentResponseGenerator, dialect: Dialect) -> Response:
    stream = any(name.lower() == b"content-type" and b"event-stream" in value for name, value in head.headers)

    async def chunks() -> AsyncGenerator[bytes, None]:
        ended = False
        try:
            async for part in parts:
                if not isinstance(part, bytes):
                    raise IncompleteGeneration
                yield part
            ended = True
        except (IncompleteGeneration, RayError):
            ended = True
            if not stream:
                raise  # the connection breaks off: all of the status and none of the body's end is known
            event = dialect.event(IncompleteGeneration())
            yield sse.named_event(event) if dialect.named_events else sse.event(event)
        finally:
            if not ended:
                parts.cancel()  # the client has left

    response = StreamingResponse(chunks(), head.status)
    response.raw_headers = _headers(head)
    return response


def _response(head: Head, body: bytes) -> Response:
    response = Response(body, head.status)
    kept = [pair for pair in _headers(head) if pair[0].lower() != LENGTH]
    response.raw_headers = [*kept, (LENGTH, str(len(body)).encode())]
    return response


def _headers(head: Head) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in head.headers if name.lower() != REQUEST_ID]
