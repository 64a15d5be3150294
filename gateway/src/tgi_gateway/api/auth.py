"""API keys: every route needs one, except those that the operator named."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tgi_gateway.api import caller
from tgi_gateway.api.errors import NATIVE, OPENAI, Dialect, Rejection
from tgi_gateway.errors import SettingsError
from tgi_gateway.settings import Settings

_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_TENANT_LENGTH = 16


class Keys:
    """The keys that are accepted, kept as SHA-256 digests only."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Each is the key itself, or ``sha256:`` and its digest in hex."""
        self._digests = tuple(dict.fromkeys(map(_digest, keys)))

    @staticmethod
    def of(settings: Settings) -> Keys | None:
        """All keys of the settings and their file; None if every caller is welcome. Raises `SettingsError`."""
        keys = [key for key in (settings.api_key, *settings.api_keys) if key is not None]
        if settings.api_keys_file is not None:
            keys += _read(Path(settings.api_keys_file))
        return Keys(keys) if keys else None

    def __len__(self) -> int:
        return len(self._digests)

    def tenant(self, given: bytes) -> str | None:
        """The name of the given key's owner; None if no key fits. Takes the same time whichever fits, or none."""
        digest = hashlib.sha256(given).digest()
        found: bytes | None = None
        for known in self._digests:
            if hmac.compare_digest(digest, known):
                found = known
        return None if found is None else found.hex()[:_TENANT_LENGTH]


def _digest(key: str) -> bytes:
    hashed = _DIGEST.fullmatch(key)
    return bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(key.encode()).digest()


def _read(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"Invalid argument: `--api-keys-file` {path} cannot be read: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise SettingsError(f"Invalid argument: `--api-keys-file` {path} holds no key; write one a line")
    return keys


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
