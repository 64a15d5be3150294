"""A route and its description. A dialect is one module of this package, which lists its own as `ROUTES`.

Routes that settings name come from a module's `routes_of(settings)` as well.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway import api
from tgi_gateway.api.errors import Dialect
from tgi_gateway.api.serving import Services
from tgi_gateway.settings import Settings

Handler = Callable[[Services, Request, bytes], Awaitable[Response]]
"""Answers one request, whose body is the third argument; empty for what has none."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A list of `item`, as an answer."""

    item: type


Answer = type | Listed | Literal["text"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What the application serves under one path and method. A GET is also answered as HEAD."""

    path: str
    handler: Handler
    dialect: Dialect
    """How its errors are told."""
    name: str
    """Of the operation, for generated clients."""
    summary: str
    tag: str
    method: Literal["GET", "POST", "DELETE"] = "POST"
    body: type | None = None
    """The type that the body is decoded into; whatever else it is, it is JSON."""
    answer: Answer = None
    """None: an answer without a body."""
    event: type | None = None
    """One event of a streamed answer."""
    generates: bool = False
    """May fail as only generating can."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Further statuses and what they mean."""
    shown: bool = True
    """Whether the description lists it."""


def all_routes(settings: Settings) -> list[Route]:
    """The routes of every module here that has some."""
    routes: list[Route] = []
    for found in pkgutil.iter_modules(api.__path__, f"{api.__name__}."):
        module = importlib.import_module(found.name)
        routes += getattr(module, "ROUTES", ())
        if hasattr(module, "routes_of"):
            routes += module.routes_of(settings)
    return routes
