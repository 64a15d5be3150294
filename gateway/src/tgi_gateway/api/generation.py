"""One request as the HTTP worker sees it: engine events in, pieces of text out."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from tgi_gateway.backend import Backend, CancelsByName, refuse_unsupported
from tgi_gateway.errors import BackendFailed, GatewayError, from_wire
from tgi_gateway.types import Finished, FinishReason, Request, StepEvents, Usage

log = logging.getLogger(__name__)


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

    matched: str | None
    """The one that was found."""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string is complete)."""
        ...

    def flush(self) -> str:
        """Text held back that turned out not to be a stop string."""
        ...


class Generation:
    """An open request. Use as ``async with``: leaving early cancels it in the engine.

    ``async for pieces in generation`` gives the tokens in batches, as they come; during the last batch, which may be
    empty, `reason` is set. A token that may be the last waits for the news whether it was, because an engine may tell
    that one step later; and one that completes a stop string waits for what only the engine's ending tells: cached
    tokens, queue time, log-probabilities of the prompt. Times are time.perf_counter() seconds of this process.
    """

    __slots__ = (
        "_backend",
        "_close",
        "_decoder",
        "_ending_ids",
        "_engine_ended",
        "_exhausted",
        "_failure",
        "_held",
        "_max_new_tokens",
        "_pieces",
        "_silent",
        "_special",
        "_stops",
        "_visible",
        "_waiter",
        "ended_at",
        "finished",
        "first_token_at",
        "gaps_s",
        "generated_tokens",
        "last_token_at",
        "reason",
        "request",
        "rest",
        "started_at",
        "text_parts",
    )

    def __init__(
        self,
        backend: Backend,
        request: Request,
        decoder: TextDecoder,
        stops: StopMatcher | None,
        special: Mapping[int, str],
        close: Callable[[int], None],
        ending_ids: frozenset[int] = frozenset(),
        visible: frozenset[int] = frozenset(),
        *,
        silent: bool = False,
    ) -> None:
        self.request = request
        self.text_parts: list[str] = []
        """Text of the answer so far without special tokens; joined it is `generated_text`."""
        self.generated_tokens = 0
        self.gaps_s: list[float] = []
        """Seconds between consecutive tokens; 0.0 between those that came together."""
        self.rest = ""
        """The end of the text, where no piece was left to carry it."""
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
        self._ending_ids = ending_ids
        self._visible = visible
        self._silent = silent
        self._max_new_tokens = request.stop.max_new_tokens
        self._held = False
        """The newest piece may be the last, so it waits."""
        self._exhausted = False
        """The last batch was handed out."""
        self._engine_ended = False
        """The engine has told its ending, and it was no failure that is still to be raised."""

    @property
    def usage(self) -> Usage:
        """Token counts; `cached_tokens` is known once the engine has ended the request."""
        cached = self.finished.usage.cached_tokens if self.finished else 0
        return Usage(len(self.request.input_ids), self.generated_tokens, cached)

    @property
    def text(self) -> str:
        return "".join(self.text_parts)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it."""
        return None if self._stops is None else self._stops.matched

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Piece]:
        """The pieces that arrived since the last call, waiting for at least one or for the end.

        Raises the request's failure, after every piece before it was delivered.
        """
        if self._exhausted:
            raise StopAsyncIteration
        while not self._engine_ended and (self.reason is not None or not self._pieces or self._held):
            if self._failure is not None:
                if self._pieces:
                    break
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.reason is not None:
            self._exhausted = True
        pieces, self._pieces = self._pieces, []
        return pieces

    async def next(self) -> list[Piece]:
        """The next batch, as ``async for`` would give it; an empty list once it has ended."""
        return [] if self._exhausted else await self.__anext__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.finished is None and self._failure is None:
            self._backend.cancel(self.request.request_id)
        self._close(self.request.request_id)

    def complete(self) -> None:
        """The answer is whole for who reads it: it ends here, as after a stop string."""
        if self.reason is None and self._failure is None:
            self._pieces.clear()
            self._end("stop_sequence", time.perf_counter())
            self._backend.cancel(self.request.request_id)

    # The rest is called by `Generations`, in the event loop.

    def push(self, token_id: int, logprob: float, top: tuple[tuple[int, float], ...], now: float) -> None:
        if self.reason is not None or self._failure is not None or self._silent:
            return  # not wanted, or generated while our cancel was on its way
        if self.generated_tokens == 0:
            self.first_token_at = now
        else:
            self.gaps_s.append(now - self.last_token_at)
        self.last_token_at = now
        self.generated_tokens += 1
        self._held = token_id in self._ending_ids or self.generated_tokens >= self._max_new_tokens
        special = self._special.get(token_id)
        if special is None:
            text = self._decoder.push(token_id)
        elif token_id in self._visible:
            text = self._decoder.flush() + special
        else:
            self._pieces.append(Piece(token_id, special, logprob, True, top))
            return
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
        if self._failure is not None:
            return
        self._engine_ended = True
        if self.reason is None:
            cut = self._silent and event.reason != "cancelled"
            self._end("length" if cut else event.reason, now)

    def fail(self, error: GatewayError) -> None:
        if self.reason is None:
            self._failure = error
            self.ended_at = time.perf_counter()
        else:
            self._engine_ended = True  # the answer was complete already

    def give_up(self, error: GatewayError) -> None:
        """Fail, whatever the engine says."""
        self.reason, self._engine_ended = None, False
        self.fail(error)

    def wake(self) -> None:
        """Resume who waits, unless there is nothing to tell yet."""
        waiter = self._waiter
        if waiter is None or (self._failure is None and not self._engine_ended and (self._held or self.reason)):
            return
        self._waiter = None
        if not waiter.done():
            waiter.set_result(None)

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
            if self._pieces and not self._pieces[-1].special:
                self._pieces[-1].text += rest
            else:
                self.rest = rest


class Generations:
    """All open requests of one HTTP worker."""

    def __init__(self, backend: Backend, *, worker: int = 0, restarts: int = 0) -> None:
        """`restarts`: how many processes were this worker before. The engine may still hold requests of theirs."""
        self._backend = backend
        self._open: dict[int, Generation] = {}
        self._closed: GatewayError | None = None
        self._first_id = (worker << 48) + (restarts % (1 << 12) << 36)
        self._counter = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0

    def __len__(self) -> int:
        return len(self._open)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop that owns the generations, in its thread; before the first `emit`."""
        self._loop = loop
        self._thread = threading.get_ident()

    def emit(self, events: StepEvents) -> None:
        """The Backend's emit; from any thread."""
        if threading.get_ident() == self._thread:
            self.deliver(events)
            return
        assert self._loop is not None, "bind() comes first"
        self._loop.call_soon_threadsafe(self.deliver, events)

    def next_id(self) -> int:
        """16 bits for the worker, 12 for its restarts, 36 to count."""
        return self._first_id + next(self._counter) % (1 << 36)

    def open(
        self,
        request: Request,
        decoder: TextDecoder,
        stops: StopMatcher | None,
        special: Mapping[int, str],
        ending_ids: frozenset[int] = frozenset(),
        visible: frozenset[int] = frozenset(),
        *,
        silent: bool = False,
    ) -> Generation:
        """Submit `request` (its id from `next_id`). Raises `Unsupported` for what the engine lacks, or `close`'s error.

        `ending_ids` are tokens that end a generation in the engine; `visible` are special tokens that are text; of a
        `silent` one no token is wanted, only how it ends.
        """
        if self._closed is not None:
            raise self._closed
        refuse_unsupported(request, self._backend.capabilities)
        generation = Generation(
            self._backend, request, decoder, stops, special, self._forget, ending_ids, visible, silent=silent
        )
        self._open[request.request_id] = generation
        self._backend.submit(request)
        return generation

    async def cancel_named(self, tenant: str, name: str) -> int:
        """Cancel the tenant's requests of that name; returns how many there were. Each ends as the engine tells."""
        if isinstance(self._backend, CancelsByName):  # other workers have requests too
            return await self._backend.cancel_named(tenant, name)
        found = [each.request for each in self._open.values()]
        ids = [request.request_id for request in found if (request.tenant, request.name) == (tenant, name)]
        for request_id in ids:
            self._backend.cancel(request_id)
        return len(ids)

    def deliver(self, events: StepEvents) -> None:
        """Hand one step's events to their generations; in the event loop."""
        now = time.perf_counter()
        touched: dict[int, Generation] = {}
        find, top = self._open.get, events.top
        rows = zip(events.request_ids, events.token_ids, events.logprobs, strict=True)
        for row, (request_id, token_id, logprob) in enumerate(rows):
            generation = find(request_id)
            if generation is None:
                continue
            touched[request_id] = generation
            try:
                generation.push(token_id, logprob, top.get(row, ()) if top else (), now)
            except Exception:
                self._give_up(generation)
        for finished in events.finished:
            generation = find(finished.request_id)
            if generation is None:
                continue
            touched[finished.request_id] = generation
            try:
                generation.finish(finished, now)
            except Exception:
                self._give_up(generation)
        for failed in events.failed:
            generation = find(failed.request_id)
            if generation is not None:
                generation.fail(from_wire(failed.error_type, failed.message, failed.retry_after_s))
                touched[failed.request_id] = generation
        for generation in touched.values():
            generation.wake()

    def close(self, error: GatewayError) -> None:
        """End every open request, and all that would follow, with `error`."""
        self._closed = error
        for generation in list(self._open.values()):
            generation.fail(error)
            generation.wake()
            self._backend.cancel(generation.request.request_id)

    def _give_up(self, generation: Generation) -> None:
        """A text that cannot be decoded must not take the other requests' tokens with it."""
        request_id = generation.request.request_id
        log.exception("request %d cannot be decoded", request_id)
        generation.give_up(BackendFailed("The text could not be decoded"))
        self._backend.cancel(request_id)

    def _forget(self, request_id: int) -> None:
        self._open.pop(request_id, None)
