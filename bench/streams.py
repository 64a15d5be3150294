"""A load generator's HTTP client: one asyncio protocol per connection, server-sent events cut out by hand.

It has to be cheaper than any server it measures, so it knows only what it needs: HTTP/1.1, one POST at a time per
connection, chunked or sized or closed bodies, events that end in an empty line.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

_TAIL_EVENTS = 4
"""Last events of a stream to look into: finish reason, usage, [DONE]."""
_MAX_HEAD = 64 * 1024
_MAX_ERROR_BODY = 64 * 1024


class BadAnswer(Exception):
    """The server answered with what is no stream of tokens; `kind` is short enough for a table."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(slots=True)
class Exchange:
    """One request and what came back, in seconds of time.perf_counter()."""

    sent_at: float = 0.0
    first_token_at: float = 0.0
    ended_at: float = 0.0
    status: int = 0
    arrivals: array[float] = field(default_factory=lambda: array("d"))
    """When the pieces of the stream came that held whole events."""
    events: array[int] = field(default_factory=lambda: array("I"))
    """How many events each of them held."""
    leading: int = 0
    """Events before the first token, such as OpenAI's empty one with the role."""
    tail: list[bytes] = field(default_factory=list)
    """The last events."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server's route."""

    host: str
    port: int
    path: str
    tls: bool
    headers: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of(url: str, route: str, headers: tuple[tuple[str, str], ...] = ()) -> Target:
        """Raises ValueError for what is no http(s) URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// URL")
        tls = parts.scheme == "https"
        return Target(parts.hostname, parts.port or (443 if tls else 80), parts.path.rstrip("/") + route, tls, headers)

    def request(self, body: bytes) -> bytes:
        """The bytes of a POST."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"POST {self.path} HTTP/1.1",
            f"host: {host}:{self.port}",
            "content-type: application/json",
            "accept: text/event-stream",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Pool:
    """Connections to one target, reused."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if target.tls else None

    async def post(self, request: bytes) -> Exchange:
        """Send and read to the end. Raises `BadAnswer`, OSError or TimeoutError."""
        async with asyncio.timeout(self._timeout_s):
            while self._idle:
                connection = self._idle.pop()
                try:
                    return await self._exchange(connection, request)
                except _Stale:
                    continue  # closed by the server while idle
            return await self._exchange(await self._connect(), request)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self.target.host, self.target.port, ssl=self._tls)
        return connection

    async def _exchange(self, connection: _Connection, request: bytes) -> Exchange:
        try:
            exchange = await connection.exchange(request)
        except BaseException:
            connection.close()
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return exchange


class _Stale(Exception):
    """The connection was closed before a byte of the answer came."""


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._future: asyncio.Future[Exchange] | None = None
        self._fresh = True
        self._reset()

    def _reset(self) -> None:
        self._exchange = Exchange()
        self._head: bytes | None = b""
        self._chunked = False
        self._left = 0
        """Bytes of the body, or of the current chunk with its line end, that are still to come; -1: until closed."""
        self._framing = b""
        self._rest = b""
        self._tail: deque[bytes] = deque(maxlen=_TAIL_EVENTS)
        self._error_body: list[bytes] | None = None
        self.reusable = False

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._future is None:
            self.close()
            return
        try:
            if self._head is not None:
                data = self._read_head(data)
                if self._head is not None:
                    return
            self._read_body(data, now)
        except (BadAnswer, ValueError) as error:
            self._fail(error if isinstance(error, BadAnswer) else BadAnswer("bad HTTP", str(error)))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._future is None or self._future.done():
            return
        if self._head is None and self._left == -1:
            self._end(time.perf_counter())
        elif self._head == b"" and not self._fresh:
            self._fail(_Stale())
        else:
            self._fail(BadAnswer("connection lost", str(error or "closed within the answer")))

    # The pool calls these.

    async def exchange(self, request: bytes) -> Exchange:
        if self._transport is None or self._transport.is_closing():
            raise BadAnswer("connection lost", "closed before the request") if self._fresh else _Stale
        self._reset()
        self._future = asyncio.get_running_loop().create_future()
        self._exchange.sent_at = time.perf_counter()
        self._transport.write(request)
        try:
            return await self._future
        finally:
            self._future = None
            self._fresh = False

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # Reading.

    def _read_head(self, data: bytes) -> bytes:
        assert self._head is not None
        head, separator, rest = (self._head + data).partition(b"\r\n\r\n")
        if not separator:
            self._head = head
            if len(head) > _MAX_HEAD:
                raise BadAnswer("bad HTTP", "endless header")
            return b""
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, _, status = status_line.partition(" ")
        if not version.startswith("HTTP/1."):
            raise BadAnswer("bad HTTP", status_line[:80])
        self._head = None
        self._exchange.status = int(status[:3])
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._left = 0 if self._chunked else int(headers.get("content-length", -1))
        self.reusable = self._left != -1 and headers.get("connection", "").lower() != "close"
        is_stream = headers.get("content-type", "").startswith("text/event-stream")
        if self._exchange.status != 200 or not is_stream:
            self._error_body = []
        return rest

    def _read_body(self, data: bytes, now: float) -> None:
        if self._chunked:
            self._read_chunks(data, now)
            return
        if data:
            self._read_events(data, now)
        if self._left >= 0:
            self._left -= len(data)
            if self._left <= 0:
                self._end(now)

    def _read_chunks(self, data: bytes, now: float) -> None:
        if self._framing:
            data = self._framing + data
            self._framing = b""
        pieces: list[bytes] = []
        position, end = 0, len(data)
        last = False
        while position < end:
            left = self._left
            if left:
                stop = position + left
                if stop <= end:
                    if left > 2:  # the last two bytes are the chunk's line end
                        pieces.append(data[position : stop - 2])
                    self._left = 0
                    position = stop
                    continue
                take = min(end, stop - 2)
                if take > position:
                    pieces.append(data[position:take])
                self._left = stop - end
                break
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                self._framing = data[position:]
                if len(self._framing) > 1024:
                    raise BadAnswer("bad HTTP", "endless chunk size")
                break
            size = int(data[position:line_end].partition(b";")[0], 16)
            position = line_end + 2
            if not size:
                last = True
                break
            self._left = size + 2
        if pieces:
            self._read_events(pieces[0] if len(pieces) == 1 else b"".join(pieces), now)
        if last:
            self._end(now)

    def _read_events(self, data: bytes, now: float) -> None:
        if self._error_body is not None:
            if sum(map(len, self._error_body)) < _MAX_ERROR_BODY:
                self._error_body.append(data)
            return
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        events = data.split(b"\n\n")
        self._rest = events.pop()
        events = [event for event in events if event.startswith(b"data:") or b"\ndata:" in event]
        if not events:
            return
        self._tail.extend(events)
        exchange = self._exchange
        if not exchange.first_token_at:
            for event in events:
                if has_token(event):
                    exchange.first_token_at = now
                    break
                exchange.leading += 1
        exchange.arrivals.append(now)
        exchange.events.append(len(events))

    def _end(self, now: float) -> None:
        exchange = self._exchange
        if self._error_body is not None:
            body = b"".join(self._error_body).decode(errors="replace")
            self._fail(BadAnswer(f"HTTP {exchange.status}", _error_text(body)))
            return
        exchange.ended_at = now
        exchange.tail = list(self._tail)
        if self._future is not None and not self._future.done():
            self._future.set_result(exchange)

    def _fail(self, error: Exception) -> None:
        self.reusable = False
        if self._future is not None and not self._future.done():
            self._future.set_exception(error)
        self.close()


def payload(event: bytes) -> Any:
    """The JSON of an event, None for [DONE] and what is no JSON."""
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            try:
                return json.loads(line[5:])
            except ValueError:
                return None
    return None


def has_token(event: bytes) -> bool:
    """Whether the event carries generated text, or a token without any."""
    value = payload(event)
    if not isinstance(value, dict):
        return False
    if "token" in value:
        return True
    for choice in value.get("choices") or ():
        delta = choice.get("delta") or choice
        if any(delta.get(name) for name in ("content", "text", "reasoning_content", "reasoning", "tool_calls")):
            return True
    return False


def _error_text(body: str) -> str:
    try:
        value = json.loads(body)
    except ValueError:
        return body[:200]
    error = value.get("error", value.get("message", body)) if isinstance(value, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
