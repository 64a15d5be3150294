"""The API keys that are accepted: from flags, environment or a file, kept as digests, compared in constant time.

The launcher alone reads the file, at start and when it was changed; the HTTP workers are told digests.
"""

from __future__ import annotations

import hashlib
import hmac
import os
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
        self._digests: tuple[bytes, ...]
        self.replace(keys)

    def replace(self, keys: Iterable[str]) -> None:
        """From now on these, and no others."""
        self._digests = tuple(dict.fromkeys(map(_digest, keys)))

    @property
    def hashed(self) -> tuple[str, ...]:
        """The same keys for `Keys` again, without saying what they are."""
        return tuple(f"sha256:{digest.hex()}" for digest in self._digests)

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
    for number, line in enumerate(lines, 1):
        if line.startswith("sha256:") and not _DIGEST.fullmatch(line):
            raise SettingsError(
                f"Invalid argument: `--api-keys-file` {path}, line {number}: `sha256:` is followed by 64 hex digits"
            )
    return keys


class KeyFile:
    """Notices that the file of keys has become another, be it written anew, replaced, or what a link leads to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = self._before = self._look()

    def changed(self) -> bool:
        """True once for each change, when two looks in turn find the same: who writes it may not have finished."""
        now = self._look()
        settled, self._before = now == self._before, now
        if not settled or now == self._read:
            return False
        self._read = now
        return True

    def _look(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._path)
        except OSError as error:
            return (error.errno or 0,)
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
