"""The API keys that are accepted: from flags, environment or a file, kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

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
