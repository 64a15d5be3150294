"""An answer as a stream of events: bare ASGI, an honest status line, an end as soon as the client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tgi_gateway.api import caller
from tgi_gateway.api.errors import ClientGone, Dialect, as_gateway_error, error_response
from tgi_gateway.errors import TimedOut

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""After so long a silence a comment is sent, so that proxies keep the connection."""
DIRECT_SEND = "tgi_gateway.send"
"""Key of the scope under which the application keeps the server's own `send`. Once the head is out, the layers in
between have nothing to add to a body, yet each would cost a call per token."""
SLOWNESS = "tgi_gateway.slowness"
"""Key of the scope under which the server keeps its `Slowness`."""
_KEEP_ALIVE = b":\n\n"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Slowness:
    """What to do about a client that does not read. Its tokens wait in its own generation, at most as many as it may
    have; the engine waits for nobody."""

    limit_s: float
    """It is cut off when nothing could be sent for so long."""
    cut_off: Callable[[], None]
    """Closes the connection at once, unsent bytes and all."""


def event(document: object) -> bytes:
    """One event of the stream."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def named_event(document: Mapping[str, Any]) -> bytes:
    """One event of a stream whose events have names: the document's `type`."""
    return f"event: {document['type']}\n".encode() + event(document)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; cancels it and raises `ClientGone` once the client has hung up.

    The request's body must have been read.
    """
    mine = asyncio.current_task()
    assert mine is not None
    gone = False

    async def listen() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        mine.cancel()

    listener = asyncio.create_task(listen())
    try:
        return await work
    except asyncio.CancelledError:
        if gone and mine.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        listener.cancel()


async def _cancel_when_gone(receive: Receive, work: asyncio.Task[None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    work.cancel()


class EventStream(Response):
    """Sends what `chunks` yields, each chunk being one or more whole events.

    Nothing is sent before the first chunk is there: an error until then has its own HTTP status. Later it is the
    stream's last event. `headers` may be filled in until the first chunk. `failed` is told of an error; of the client's
    hanging up as `ClientGone`.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        dialect: Dialect,
        headers: MutableMapping[str, str],
        *,
        tail: bytes = b"",
        failed: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        super().__init__(headers={"content-type": "text/event-stream"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._dialect = dialect
        self._extra = headers
        self._tail = tail
        self._failed = failed
        self._keep_alive_s = KEEP_ALIVE_S
        self._started = False
        self._busy = False
        """A chunk is being sent."""
        self._beat: asyncio.Task[None] | None = None
        """A keep-alive is being sent."""
        self._quiet_since = 0.0
        self._stuck: tuple[float, float] = (-1.0, 0.0)
        """`_quiet_since` of the send that was under way at the last look, and when it was first seen."""
        self._slowness: Slowness | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._quiet_since = loop.time()
        self._direct = scope.get(DIRECT_SEND, send)
        self._slowness = scope.get(SLOWNESS)
        # In a task of its own, because every token would otherwise wake up through all layers of the application.
        work = self._work = loop.create_task(self._run(scope, receive, send))
        first_s = min(self._keep_alive_s, self._slowness.limit_s) if self._slowness else self._keep_alive_s
        self._timer = loop.call_later(first_s, self._tick, loop, send)
        listener = loop.create_task(_cancel_when_gone(receive, work))
        try:
            await asyncio.wait([work])
        finally:
            listener.cancel()
            self._timer.cancel()
            if self._beat is not None:
                self._beat.cancel()
            if not work.done():  # this server stops; the generation must have been cancelled before it has
                work.cancel()
                await asyncio.wait([work])
        if work.cancelled():
            self._failed(ClientGone())
        else:
            work.result()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        direct = self._direct
        deadline = asyncio.timeout_at(caller.current().deadline)
        try:
            async with deadline:
                async for chunk in self._chunks:
                    if self._beat is not None:
                        await self._beat
                    self._busy = True
                    if not self._started:
                        await self._start(send)
                    await direct({"type": "http.response.body", "body": chunk, "more_body": True})
                    self._busy = False
                    self._quiet_since = clock()
        except Exception as caught:
            error = TimedOut() if deadline.expired() and isinstance(caught, TimeoutError) else caught
            self._busy = True
            self._failed(error)
            known = as_gateway_error(error)
            if not self._started:
                await error_response(known, self._dialect)(scope, receive, send)
                return
            last = self._dialect.event(known)
            await self._close(send, named_event(last) if self._dialect.named_events else event(last))
        else:
            self._busy = True
            await self._close(send, b"")
        finally:
            await self._chunks.aclose()

    async def _start(self, send: Send) -> None:
        self._started = True
        for name, value in self._extra.items():
            self.headers[name] = value
        start: Message = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)

    async def _close(self, send: Send, last: bytes) -> None:
        if self._beat is not None:
            await self._beat
        if not self._started:
            await self._start(send)
        await send({"type": "http.response.body", "body": last + self._tail, "more_body": False})

    def _tick(self, loop: asyncio.AbstractEventLoop, send: Send) -> None:
        now, again_s = loop.time(), self._keep_alive_s
        if self._busy or self._beat is not None:
            if self._slowness is not None:
                again_s = min(again_s, self._slowness.limit_s / 4)
                if self._stuck[0] != self._quiet_since:
                    self._stuck = (self._quiet_since, now)
                elif now - self._stuck[1] >= self._slowness.limit_s:
                    self._work.cancel()
                    self._slowness.cut_off()
                    return
        elif now - self._quiet_since >= self._keep_alive_s:
            self._beat = loop.create_task(self._send_beat(send))
            self._quiet_since = now
        else:
            again_s -= now - self._quiet_since
        self._timer = loop.call_later(again_s, self._tick, loop, send)

    async def _send_beat(self, send: Send) -> None:
        try:
            if not self._started:
                await self._start(send)
            await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})
        finally:
            self._beat = None
