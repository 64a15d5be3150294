"""What the ingress and the replicas tell each other."""

from __future__ import annotations

from dataclasses import dataclass

Headers = list[tuple[bytes, bytes]]

OF_A_CONNECTION = frozenset(
    [b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"]
)
"""Headers that are not passed on: each connection has its own."""


@dataclass(frozen=True, slots=True)
class Asked:
    """An HTTP request, and what its routing needs to know."""

    method: str
    target: str
    """Path and query, as they came."""
    headers: Headers
    body: bytes
    blocks: tuple[int, ...] = ()
    """See `prefixes.blocks_of`."""
    avoid: frozenset[str] = frozenset()
    """Replicas that would not take it."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The request is with a replica, by its unique id."""

    replica: str


@dataclass(frozen=True, slots=True)
class Down:
    """The replica has no server now: nobody has seen the request, and another replica may be asked."""

    replica: str


@dataclass(frozen=True, slots=True)
class Head:
    """An answer begins; `bytes` follow."""

    status: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class Broken:
    """The server went away before the end of its answer."""


Part = Taken | Down | Head | Broken | bytes
"""An answer is one Taken, one Head and any number of bytes; or ends early in Down (before Head) or in Broken."""
