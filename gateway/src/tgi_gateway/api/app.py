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

from tgi_gateway.api import bodies, chat, completions, models, openapi, tgi
from tgi_gateway.api.auth import ApiKey
from tgi_gateway.api.errors import (
    NATIVE,
    OPENAI,
    ClientGone,
    Dialect,
    Rejection,
    as_gateway_error,
    error_response,
)
from tgi_gateway.api.serving import VERSION, Services
from tgi_gateway.api.sse import DIRECT_SEND

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
)
READ = ["GET", "HEAD"]


class Application(FastAPI):
    """Keeps the server's `send` for streams, see `sse.DIRECT_SEND`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[DIRECT_SEND] = send
        await super().__call__(scope, receive, send)


class PlainRoute(APIRoute):
    """Described as FastAPI describes routes, called without its validation and dependencies, which no handler uses."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


Endpoint = Callable[[Request], Awaitable[Response]]
PostHandler = Callable[[Services, Request, bytes], Awaitable[Response]]


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
    app.router.route_class = PlainRoute
    _add_posts(app, services)
    _add_gets(app, services)
    app.add_exception_handler(HTTPException, _without_body)
    settings = services.settings
    if settings.api_key is not None:
        app.add_middleware(ApiKey, key=settings.api_key, public_routes=settings.public_routes)
    # Added last, so it is outermost: a browser must be able to read a 401, and its preflight carries no key.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_allow_origin or ["*"],
        allow_methods=["GET", "POST"],
        allow_headers=["content-type", "authorization"],
        expose_headers=EXPOSED_HEADERS,
    )
    app.openapi = cache(lambda: openapi.description(app))  # type: ignore[method-assign]
    return app


def _add_posts(app: FastAPI, services: Services) -> None:
    posts: list[tuple[str, PostHandler, Dialect]] = [
        ("/", tgi.compat_generate, NATIVE),
        ("/generate", tgi.generate, NATIVE),
        ("/generate_stream", tgi.generate_stream, NATIVE),
        ("/tokenize", tgi.tokenize, NATIVE),
        ("/chat_tokenize", chat.chat_tokenize, NATIVE),
        ("/v1/chat/completions", chat.chat, OPENAI),
        ("/v1/completions", completions.completions, OPENAI),
    ]
    for path, handler, dialect in posts:
        app.add_api_route(path, _post(services, handler, dialect), methods=["POST"], **openapi.ROUTES[path])


def _add_gets(app: FastAPI, services: Services) -> None:
    async def health(_: Request) -> Response:
        return await models.health(services)

    async def info(_: Request) -> Response:
        return models.info(services)

    async def listed(_: Request) -> Response:
        return models.models(services)

    async def model(request: Request) -> Response:
        return models.model(services, request.path_params["model_id"])

    async def metrics(_: Request) -> Response:
        text, media_type = await asyncio.to_thread(services.metrics.exposition)
        return Response(text, media_type=media_type)

    gets: list[tuple[str, Endpoint, Dialect, dict[str, Any]]] = [
        ("/health", health, NATIVE, openapi.ROUTES["/health"]),
        ("/ping", health, NATIVE, {"include_in_schema": False}),
        ("/", health, NATIVE, {"include_in_schema": False}),
        ("/info", info, NATIVE, openapi.ROUTES["/info"]),
        ("/metrics", metrics, NATIVE, openapi.ROUTES["/metrics"]),
        ("/v1/models", listed, OPENAI, openapi.ROUTES["/v1/models"]),
        ("/v1/models/{model_id:path}", model, OPENAI, openapi.ROUTES["/v1/models/{model_id}"]),
    ]
    for path, handler, dialect, described in gets:
        endpoint = _guarded(handler, dialect)
        app.add_api_route(path, endpoint, methods=["GET"], **described)
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)


def _post(services: Services, handler: PostHandler, dialect: Dialect) -> Endpoint:
    limit = services.settings.payload_limit

    async def read_and_handle(request: Request) -> Response:
        bodies.check_content_type(request)
        return await handler(services, request, await bodies.read(request, limit))

    return _guarded(read_and_handle, dialect)


def _guarded(handler: Endpoint, dialect: Dialect) -> Endpoint:
    """Every way in which `handler` may end, as a response."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except Rejection as rejection:
            return rejection.response()
        except ClientGone:
            return Response(status_code=GONE)
        except Exception as error:
            return error_response(as_gateway_error(error), dialect)

    return endpoint


async def _without_body(_: Request, error: Exception) -> Response:
    """Unknown routes and wrong methods, as TGI answers them."""
    assert isinstance(error, HTTPException)
    return Response(status_code=error.status_code, headers=error.headers)
