"""API keys: every route needs one, except those that the operator named."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tgi_gateway.api import caller
from tgi_gateway.api.errors import NATIVE, OPENAI, Dialect, Rejection
from tgi_gateway.keys import Keys


class ApiKey:
    """Answers 401 unless ``Authorization: Bearer KEY`` fits; the scheme's case does not matter, the key's does.

    Anthropic's clients send ``x-api-key: KEY`` instead.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, public_routes: Collection[str], dialects: Mapping[str, Dialect]
    ) -> None:
        """`dialects`: how errors are told under a path."""
        self._app = app
        self._dialects = dialects
        self._keys = keys
        self._public = frozenset(public_routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._public:
            tenant = self._tenant(scope)
            if tenant is None:
                await self._refusal(scope["path"])(scope, receive, send)
                return
            caller.current().tenant = tenant
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        # Headers are read as Latin-1: encoding them so gives back the bytes that were sent.
        return self._keys.tenant(given.strip().encode("latin-1"))

    def _refusal(self, path: str) -> Response:
        dialect = self._dialects.get(path, OPENAI if path.startswith("/v1/") else NATIVE)
        text = "Incorrect API key provided. Send it as `Authorization: Bearer KEY`."
        response = Response(status_code=401)
        if dialect is not NATIVE:
            response = dialect.rejection(Rejection(401, text, "invalid_api_key"))
        response.headers["www-authenticate"] = "Bearer"
        return response
