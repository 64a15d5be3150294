"""One chat under another API's form: the core generates, an assembler makes that API's document and events of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway.api.answers import Part, Reader
from tgi_gateway.api.bodies import ChatBody
from tgi_gateway.api.errors import Dialect
from tgi_gateway.api.generation import Generation, Piece
from tgi_gateway.api.prepared import answers_of, choices_of, prepare
from tgi_gateway.api.serving import Call, Services, refuse_cancelled
from tgi_gateway.api.sse import EventStream, named_event, unless_gone
from tgi_gateway.api.usage import Usage, totals_of, usage_from, usage_of

Event: TypeAlias = dict[str, Any]
"""The document of one event; its `type` is also the event's name."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ended."""

    generation: Generation
    reader: Reader
    usage: Usage


class Assembler(Protocol):
    """Makes one answer, part by part. What `begin`, `add` and `end` return together is the answer as events."""

    def begin(self, prompt_tokens: int, /) -> list[Event]: ...

    def add(self, part: Part, pieces: Sequence[Piece], /) -> list[Event]:
        """`pieces` are the tokens that brought it to light."""
        ...

    def end(self, ending: Ending, /) -> list[Event]: ...

    def document(self) -> object:
        """The whole answer, once it has ended."""
        ...


async def respond(
    services: Services, request: Request, name: str, body: ChatBody, assembler: Assembler, dialect: Dialect
) -> Response:
    """The answer to `body`, whole or streamed as `body.stream` says."""
    call = Call(services, name)
    if body.stream:
        return EventStream(_events(services, call, body, assembler), dialect, call.headers, failed=call.failed)
    try:
        prepared, (answer,) = await unless_gone(request.receive, answers_of(services, body))
    except Exception as error:
        call.failed(error)
        raise
    call.account([answer], len(prepared.prompt))
    reader = Reader(prepared.reading)
    assembler.begin(len(answer.valid.request.input_ids))
    for piece in answer.pieces:
        _add(assembler, reader.push(piece), [piece])
    _add(assembler, reader.finish(answer.generation.rest), [])
    assembler.end(Ending(answer.generation, reader, usage_of([answer], [reader])))
    return Response(msgspec.json.encode(assembler.document()), headers=call.headers, media_type="application/json")


def _add(assembler: Assembler, parts: Sequence[Part], pieces: Sequence[Piece]) -> list[Event]:
    return [event for part in parts for event in assembler.add(part, pieces)]


async def _events(services: Services, call: Call, body: ChatBody, assembler: Assembler) -> AsyncGenerator[bytes, None]:
    with services.permits.hold(choices_of(services, body)):
        prepared = await prepare(services, body)
        call.stream_headers(len(prepared.prompt))
        (valid,) = prepared.valids
        prompt_tokens = len(valid.request.input_ids)
        events: list[Event] = []
        begun = False
        reader = Reader(prepared.reading)
        async with services.open(valid, keep_stop=False, visible=prepared.reading.visible) as generation:
            async for pieces in generation:
                if generation.reason is not None:
                    refuse_cancelled(generation)
                if not begun:
                    # Not before the first token: until then a failure has its own status.
                    events, begun = assembler.begin(prompt_tokens), True
                for piece in pieces:
                    events += _add(assembler, reader.push(piece), [piece])
                ended = generation.reason is not None
                if not ended and reader.whole and prepared.ends_with_call:
                    generation.complete()
                if ended:
                    events += _add(assembler, reader.finish(generation.rest), [])
                    call.succeeded(generation, valid.seed)
                    usage = usage_from(prompt_tokens, [totals_of(generation, reader)])
                    events += assembler.end(Ending(generation, reader, usage))
                if events:
                    yield b"".join(map(named_event, events))
                    events = []
