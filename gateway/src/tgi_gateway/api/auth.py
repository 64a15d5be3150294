"""The API key: every route needs it, except those that the operator named."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send


class ApiKey:
    """Answers 401 without a body unless ``Authorization: Bearer KEY`` fits. The scheme's case does not matter."""

    def __init__(self, app: ASGIApp, key: str, public_routes: Collection[str]) -> None:
        self._app = app
        self._key = key.encode()
        self._public = frozenset(public_routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._public or self._fits(scope):
            await self._app(scope, receive, send)
            return
        refusal = Response(status_code=401, headers={"www-authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _fits(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        # Headers are read as Latin-1: encoding them so gives back the bytes that were sent.
        return hmac.compare_digest(given.strip().encode("latin-1"), self._key)
