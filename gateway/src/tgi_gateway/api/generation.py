"""One request as the HTTP worker sees it: engine events in, pieces of text out."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from tgi_gateway.backend import Backend, refuse_unsupported
from tgi_gateway.errors import GatewayError, IncompleteGeneration, from_wire
from tgi_gateway.types import Finished, FinishReason, Request, StepEvents, Usage


@dataclass(slots=True)
class Piece:
    """One generated token as text.

    `text` is empty while a character is incomplete or a stop string may be forming; a later piece then carries it.
    """

    token_id: int
    text: str
    logprob: float
    special: bool
    top: tuple[tuple[int, float], ...]


class TextDecoder(Protocol):
    """Incremental detokenizer of one sequence."""

    def push(self, token_id: int) -> str:
        """Text completed by this token; never half a character."""
        ...

    def flush(self) -> str:
        """What is left at the end, incomplete characters as U+FFFD."""
        ...


class StopMatcher(Protocol):
    """Finds stop strings in a stream of text, also across token borders."""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string is complete)."""
        ...

    def flush(self) -> str:
        """Text held back that turned out not to be a stop string."""
        ...


class Generation:
    """An open request. Use as ``async with``: leaving early cancels it in the engine.

    After the last piece `reason` and `usage` are set. Times are time.perf_counter() seconds of this process.
    """

    def __init__(
        self,
        backend: Backend,
        request: Request,
        decoder: TextDecoder,
        stops: StopMatcher | None,
        special: Mapping[int, str],
        close: Callable[[int], None],
    ) -> None:
        self.request = request
        self.text_parts: list[str] = []
        """Text of the answer so far without special tokens; joined it is `generated_text`."""
        self.generated_tokens = 0
        self.gaps_s: list[float] = []
        """Seconds between consecutive tokens; 0.0 between those of one step."""
        self.reason: FinishReason | None = None
        self.finished: Finished | None = None
        self.started_at = time.perf_counter()
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.ended_at = 0.0
        self._backend = backend
        self._decoder = decoder
        self._stops = stops
        self._special = special
        self._close = close
        self._pieces: list[Piece] = []
        self._waiter: asyncio.Future[None] | None = None
        self._failure: GatewayError | None = None

    @property
    def usage(self) -> Usage:
        """Token counts; `cached_tokens` is known once the engine has ended the request."""
        cached = self.finished.usage.cached_tokens if self.finished else 0
        return Usage(len(self.request.input_ids), self.generated_tokens, cached)

    @property
    def text(self) -> str:
        return "".join(self.text_parts)

    async def next(self) -> list[Piece]:
        """All pieces that arrived since the last call, waiting for at least one; an empty list once it has ended.

        Raises the request's failure, after every piece before it was delivered.
        """
        while not self._pieces:
            if self._failure is not None:
                raise self._failure
            if self.reason is not None:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pieces, self._pieces = self._pieces, []
        return pieces

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.finished is None and self._failure is None:
            self._backend.cancel(self.request.request_id)
        self._close(self.request.request_id)

    # The rest is called by `Generations`, in the event loop.

    def push(self, token_id: int, logprob: float, top: tuple[tuple[int, float], ...], now: float) -> None:
        if self.reason is not None:
            return  # generated while our cancel after a stop string was on its way
        if self.generated_tokens == 0:
            self.first_token_at = now
        else:
            self.gaps_s.append(now - self.last_token_at)
        self.last_token_at = now
        self.generated_tokens += 1
        special = self._special.get(token_id)
        if special is not None:
            self._pieces.append(Piece(token_id, special, logprob, True, top))
            return
        text = self._decoder.push(token_id)
        stopped = False
        if self._stops is not None and text:
            text, stopped = self._stops.push(text)
        if text:
            self.text_parts.append(text)
        self._pieces.append(Piece(token_id, text, logprob, False, top))
        if stopped:
            self._end("stop_sequence", now)
            self._backend.cancel(self.request.request_id)

    def finish(self, event: Finished, now: float) -> None:
        self.finished = event
        if self.reason is None:
            self._end(event.reason, now)

    def fail(self, error: GatewayError) -> None:
        if self.reason is None:
            self._failure = error
            self.ended_at = time.perf_counter()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, reason: FinishReason, now: float) -> None:
        self.reason = reason
        self.ended_at = now
        if reason == "stop_sequence":
            return
        rest = self._decoder.flush()
        if self._stops is not None:
            if rest:
                shown, stopped = self._stops.push(rest)
                rest = shown
                if stopped:
                    self.reason = "stop_sequence"
            if self.reason != "stop_sequence":
                rest += self._stops.flush()
        if rest:
            self.text_parts.append(rest)
            if self._pieces:
                self._pieces[-1].text += rest


class Generations:
    """All open requests of one HTTP worker."""

    def __init__(self, backend: Backend, *, worker: int = 0) -> None:
        self._backend = backend
        self._open: dict[int, Generation] = {}
        self._ids = itertools.count((worker << 48) + 1)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self._open)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop that owns the generations; before the first `emit`."""
        self._loop = loop

    def emit(self, events: StepEvents) -> None:
        """The Backend's emit; from any thread."""
        assert self._loop is not None, "bind() comes first"
        self._loop.call_soon_threadsafe(self.deliver, events)

    def next_id(self) -> int:
        return next(self._ids)

    def open(
        self, request: Request, decoder: TextDecoder, stops: StopMatcher | None, special: Mapping[int, str]
    ) -> Generation:
        """Submit `request` (its id from `next_id`). Raises `Unsupported` for what the engine lacks."""
        refuse_unsupported(request, self._backend.capabilities)
        generation = Generation(self._backend, request, decoder, stops, special, self._forget)
        self._open[request.request_id] = generation
        self._backend.submit(request)
        return generation

    def deliver(self, events: StepEvents) -> None:
        """Hand one step's events to their generations; in the event loop."""
        now = time.perf_counter()
        touched: dict[int, Generation] = {}
        find, top = self._open.get, events.top
        for row, request_id in enumerate(events.request_ids):
            generation = find(request_id)
            if generation is not None:
                generation.push(events.token_ids[row], events.logprobs[row], top.get(row, ()) if top else (), now)
                touched[request_id] = generation
        for finished in events.finished:
            generation = find(finished.request_id)
            if generation is not None:
                generation.finish(finished, now)
                touched[finished.request_id] = generation
        for failed in events.failed:
            generation = find(failed.request_id)
            if generation is not None:
                generation.fail(from_wire(failed.error_type, failed.message))
                touched[failed.request_id] = generation
        for generation in touched.values():
            generation.wake()

    def fail_all(self, detail: str) -> None:
        """The engine is gone: end every open request with `IncompleteGeneration`."""
        for generation in list(self._open.values()):
            generation.fail(IncompleteGeneration(detail))
            generation.wake()

    def _forget(self, request_id: int) -> None:
        self._open.pop(request_id, None)
