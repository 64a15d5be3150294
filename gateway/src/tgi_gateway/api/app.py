"""The HTTP application: which route goes where, who may call it, and its description."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tgi_gateway.api import caller, decoding, openapi
from tgi_gateway.api.auth import ApiKey
from tgi_gateway.api.doors import Doors
from tgi_gateway.api.errors import ClientGone, Rejection, as_gateway_error, error_response, openai_refusal
from tgi_gateway.api.routes import Route, all_routes
from tgi_gateway.api.serving import VERSION, Services
from tgi_gateway.api.sse import DIRECT_SEND
from tgi_gateway.errors import TimedOut

__all__ = ["Services", "create_app"]

GONE = 499
"""The status that nobody reads, of an answer to a client that hung up."""
EXPOSED_HEADERS = (
    "x-compute-type",
    "x-compute-time",
    "x-compute-characters",
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
    "x-prompt-tokens",
    "x-generated-tokens",
    "x-request-id",
    "request-id",
    "retry-after",
)


class Application(FastAPI):
    """Keeps the server's `send` for streams, see `sse.DIRECT_SEND`, and knows who is inside."""

    doors: Doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await super().__call__(scope, receive, send)
            return
        scope[DIRECT_SEND] = send
        with self.doors.stay():
            await super().__call__(scope, receive, send)


class PlainRoute(APIRoute):
    """Described as FastAPI describes routes, called without its validation and dependencies, which no handler uses."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(services: Services) -> FastAPI:
    """The application of one HTTP worker. The backend has been started; its `emit` is ``services.generations.emit``."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        services.generations.bind(asyncio.get_running_loop())
        yield
        services.tokenizer.close()

    app = Application(
        title="tgi-gateway",
        description="Text generation over TGI's native API and the OpenAI API.",
        version=VERSION,
        license_info={"name": "Apache 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        openapi_url="/api-doc/openapi.json",
        docs_url="/docs",
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.doors = services.doors
    app.router.route_class = PlainRoute
    routes = all_routes(services.settings)
    for route in routes:
        endpoint = _endpoint(services, route)
        app.add_api_route(route.path, endpoint, methods=[route.method], **openapi.described(route))
        if route.method == "GET":
            app.add_api_route(route.path, endpoint, methods=["HEAD"], include_in_schema=False)
    app.add_exception_handler(HTTPException, _without_body)
    settings = services.settings
    if services.keys is not None:
        dialects = {route.path: route.dialect for route in routes}
        app.add_middleware(ApiKey, keys=services.keys, public_routes=settings.open_routes, dialects=dialects)
    app.add_middleware(caller.Identify, timeout_s=settings.request_timeout, tracing=services.tracing)
    # Added last, so it is outermost: a browser must be able to read a 401, and its preflight carries no key.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_allow_origin or ["*"],
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
        expose_headers=EXPOSED_HEADERS,
    )
    app.openapi = cache(lambda: openapi.description(app, routes))  # type: ignore[method-assign]
    return app


def _endpoint(services: Services, route: Route) -> Endpoint:
    """Every way in which the handler may end, as a response."""
    limit, dialect = services.settings.payload_limit, route.dialect

    async def handle(request: Request) -> Response:
        if route.body is None:
            return await route.handler(services, request, b"")
        services.doors.enter()
        decoding.check_content_type(request)
        return await route.handler(services, request, await decoding.read(request, limit))

    async def endpoint(request: Request) -> Response:
        deadline = asyncio.timeout_at(caller.current().deadline)
        try:
            async with deadline:
                return await handle(request)
        except Rejection as rejection:
            return dialect.rejection(rejection)
        except ClientGone:
            return Response(status_code=GONE)
        except Exception as error:
            late = isinstance(error, TimeoutError) and deadline.expired()
            return error_response(TimedOut() if late else as_gateway_error(error), dialect)

    return endpoint


async def _without_body(request: Request, error: Exception) -> Response:
    """Unknown routes and wrong methods, as TGI and OpenAI answer them."""
    assert isinstance(error, HTTPException)
    if request.url.path.startswith("/v1/"):
        text = f"There is no {request.method} {request.url.path} here; /docs lists what there is."
        return openai_refusal(error.status_code, text, "unknown_url", error.headers)
    return Response(status_code=error.status_code, headers=error.headers)
