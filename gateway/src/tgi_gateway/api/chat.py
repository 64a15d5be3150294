"""OpenAI's chat route, and the tokenization of a chat."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway.api import decoding
from tgi_gateway.api.answers import CallGrown, CallOpened, Part, Reader, Text, Thought
from tgi_gateway.api.bodies import ChatBody
from tgi_gateway.api.caller import new_id
from tgi_gateway.api.conversation import prompt_of
from tgi_gateway.api.errors import NATIVE, OPENAI
from tgi_gateway.api.generation import Generation, Piece
from tgi_gateway.api.logprobs import Logprobs, chat_logprobs
from tgi_gateway.api.prepared import (
    Prepared,
    answered_model,
    answers_of,
    choices_of,
    prepare,
    refuse_unknown_wishes,
    wants_logprobs,
)
from tgi_gateway.api.routes import Route
from tgi_gateway.api.serving import (
    FINGERPRINT,
    Call,
    Services,
    interleave,
    quoted,
    refuse_cancelled,
)
from tgi_gateway.api.sse import DONE, EventStream, unless_gone
from tgi_gateway.api.tgi import SimpleToken, simple_tokens
from tgi_gateway.api.tool_choice import offer_of
from tgi_gateway.api.usage import Totals, Usage, totals_of, usage_from, usage_of
from tgi_gateway.prompt.validate import Valid
from tgi_gateway.types import FinishReason

OpenAIReason = Literal["stop", "length", "tool_calls"]
REASONS: dict[FinishReason, OpenAIReason] = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}


class FunctionCall(Struct):
    name: str
    arguments: str


class AssistantCall(Struct, kw_only=True):
    """A call that the model makes; its `arguments` are a JSON object as text."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AssistantCall] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    index: int
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: OpenAIReason


class ChatCompletion(Struct, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionCallDelta(Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class AssistantCallDelta(Struct, kw_only=True):
    """`id`, `type` and the function's name come first, then its arguments as they grow."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCallDelta


class ChatDelta(Struct, kw_only=True):
    """`role` comes with the first one only."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AssistantCallDelta] | UnsetType = UNSET


class ChatCompletionChoice(Struct, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: Logprobs | None
    finish_reason: OpenAIReason | None


class ChatCompletionChunk(Struct, kw_only=True):
    """One event of a streamed chat."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatCompletionChoice]
    usage: Usage | None


class ChatTokenizeResponse(Struct, kw_only=True):
    tokenize_response: list[SimpleToken]
    templated_text: str


async def chat(services: Services, request: Request, raw: bytes) -> Response:
    return await answer(services, request, decoding.decode_known(raw, ChatBody))


async def answer(services: Services, request: Request, body: ChatBody) -> Response:
    call = Call(services, "chat_completions")
    if body.stream:
        return EventStream(_events(services, body, call), OPENAI, call.headers, tail=DONE, failed=call.failed)
    try:
        prepared, answers = await unless_gone(request.receive, answers_of(services, body))
    except Exception as error:
        call.failed(error)
        raise
    call.account(answers, len(prepared.prompt))
    readers = [prepared.read(answer) for answer in answers]
    with_logprobs = wants_logprobs(body)
    completion = ChatCompletion(
        id=new_id("chatcmpl-"),
        created=int(time.time()),
        model=answered_model(services, body),
        system_fingerprint=FINGERPRINT,
        choices=[
            ChatChoice(
                index=index,
                message=_message(reader, body),
                logprobs=chat_logprobs(services.tokenizer, answer.pieces) if with_logprobs else None,
                finish_reason=reason_of(answer.generation, reader),
            )
            for index, (answer, reader) in enumerate(zip(answers, readers, strict=True))
        ],
        usage=usage_of(answers, readers),
    )
    return Response(msgspec.json.encode(completion), headers=call.headers, media_type="application/json")


def _message(reader: Reader, body: ChatBody) -> AssistantMessage:
    words, thoughts = "".join(reader.words), "".join(reader.thoughts)
    return AssistantMessage(
        content=None if reader.calls and not words else words,
        reasoning_content=thoughts if thoughts and body.include_reasoning is not False else UNSET,
        tool_calls=[
            AssistantCall(id=call.id, function=FunctionCall(call.name, call.arguments)) for call in reader.calls
        ]
        or UNSET,
    )


def reason_of(generation: Generation, reader: Reader) -> OpenAIReason:
    """Why the answer ended. One that was cut short tells so, even in the middle of a call."""
    reason = REASONS[generation.reason or "length"]
    return "tool_calls" if reader.calls and reason == "stop" else reason


async def _events(services: Services, body: ChatBody, call: Call) -> AsyncGenerator[bytes, None]:
    with services.permits.hold(choices_of(services, body)):
        prepared = await prepare(services, body)
        call.stream_headers(len(prepared.prompt))
        opening = (
            f'data: {{"object":"chat.completion.chunk","id":{quoted(new_id("chatcmpl-"))},"created":{int(time.time())},'
            f'"model":{quoted(answered_model(services, body))},"system_fingerprint":{quoted(FINGERPRINT)},"choices":['
        )
        totals: list[Totals] = []
        streams = [
            _Choice(services, body, call, prepared, valid, f'{opening}{{"index":{index},"delta":{{', totals).events()
            for index, valid in enumerate(prepared.valids)
        ]
        async for chunk in streams[0] if len(streams) == 1 else interleave(streams):
            yield chunk
        if body.stream_options is not None and body.stream_options.include_usage:
            usage = usage_from(len(prepared.valids[0].request.input_ids), totals)
            yield f'{opening}],"usage":{msgspec.json.encode(usage).decode()}}}\n\n'.encode()


_UNFINISHED_OF = '}},"logprobs":{},"finish_reason":null}}],"usage":null}}\n\n'
_UNFINISHED = _UNFINISHED_OF.format("null")


@dataclass(slots=True)
class _Choice:
    """One streamed choice: an event is `opening`, what is new in the answer, and an ending."""

    services: Services
    body: ChatBody
    call: Call
    prepared: Prepared
    valid: Valid
    opening: str
    totals: list[Totals]
    """Of this and the other choices that have ended."""
    role: str = '"role":"assistant"'
    """Told once: clients put the deltas' texts together."""

    async def events(self) -> AsyncGenerator[bytes, None]:
        reading = self.prepared.reading
        reader = Reader(reading)
        with_logprobs = wants_logprobs(self.body)
        opening = f'{self.opening}"content":'
        async with self.services.open(self.valid, keep_stop=False, visible=reading.visible) as generation:
            async for pieces in generation:
                if generation.reason is not None:
                    refuse_cancelled(generation)
                    yield self._last(generation, reader, pieces).encode()
                elif reading.plain and not with_logprobs and not self.role:
                    # Written by hand: one turn per streamed token.
                    parts = [f"{opening}{quoted('' if piece.special else piece.text)}{_UNFINISHED}" for piece in pieces]
                    yield "".join(parts).encode()
                else:
                    chunk = "".join(self._event(reader, piece) for piece in pieces)
                    if reader.whole and self.prepared.ends_with_call:
                        generation.complete()
                    if chunk:
                        yield chunk.encode()

    def _event(self, reader: Reader, piece: Piece) -> str:
        """A token's events: of what it adds to the answer, and of its log-probability."""
        deltas = self._deltas(reader.push(piece))
        if wants_logprobs(self.body):
            return self._with_last(deltas or [self._empty], _UNFINISHED_OF.format(self._told([piece])))
        if not deltas and reader.reading.plain:
            deltas = [self._empty]
        return "".join(map(self._whole, deltas))

    def _last(self, generation: Generation, reader: Reader, pieces: Sequence[Piece]) -> str:
        """The last tokens' events; the very last one has the reason."""
        events = "".join(self._event(reader, piece) for piece in pieces[:-1])
        deltas = [delta for piece in pieces[-1:] for delta in self._deltas(reader.push(piece))]
        deltas += self._deltas(reader.finish(generation.rest))
        self.call.succeeded(generation, self.valid.seed)
        self.totals.append(totals_of(generation, reader))
        told = self._told(pieces[-1:]) if wants_logprobs(self.body) and pieces else "null"
        ending = f'}},"logprobs":{told},"finish_reason":{quoted(reason_of(generation, reader))}}}],"usage":null}}\n\n'
        return events + self._with_last(deltas or [self._empty], ending)

    def _with_last(self, deltas: Sequence[str], ending: str) -> str:
        """Events of which the last one has an ending of its own."""
        return "".join(map(self._whole, deltas[:-1])) + self._whole(deltas[-1], ending)

    def _whole(self, delta: str, ending: str = _UNFINISHED) -> str:
        role, self.role = self.role, ""
        return f"{self.opening}{role}{',' if role and delta else ''}{delta}{ending}"

    @property
    def _empty(self) -> str:
        """The delta of a token that shows nothing."""
        return '"content":""' if self.prepared.reading.plain else ""

    def _told(self, pieces: Sequence[Piece]) -> str:
        return msgspec.json.encode(chat_logprobs(self.services.tokenizer, pieces)).decode()

    def _deltas(self, parts: Sequence[Part]) -> list[str]:
        """The inside of each delta."""
        return [delta for part in parts if (delta := self._delta(part))]

    def _delta(self, part: Part) -> str:
        match part:
            case Text(text):
                return f'"content":{quoted(text)}'
            case Thought(text):
                return "" if self.body.include_reasoning is False else f'"reasoning_content":{quoted(text)}'
            case CallOpened(index, call_id, name):
                return (
                    f'"tool_calls":[{{"index":{index},"id":{quoted(call_id)},"type":"function",'
                    f'"function":{{"name":{quoted(name)},"arguments":""}}}}]'
                )
            case CallGrown(index, text):
                return f'"tool_calls":[{{"index":{index},"function":{{"arguments":{quoted(text)}}}}}]'


async def chat_tokenize(services: Services, request: Request, raw: bytes) -> Response:
    body = decoding.decode(raw, ChatBody, strict=services.settings.strict)
    services.metrics.count()
    refuse_unknown_wishes(body)

    async def work() -> ChatTokenizeResponse:
        prompt = await prompt_of(services, body, offer_of(body))
        tokens = await simple_tokens(services.tokenizer, prompt, False)
        return ChatTokenizeResponse(tokenize_response=tokens, templated_text=prompt)

    response = await unless_gone(request.receive, work())
    return Response(msgspec.json.encode(response), media_type="application/json")


ROUTES = [
    Route(
        path="/v1/chat/completions",
        handler=chat,
        dialect=OPENAI,
        name="chat_completions",
        summary="Answer a chat",
        tag="OpenAI",
        body=ChatBody,
        answer=ChatCompletion,
        event=ChatCompletionChunk,
        generates=True,
    ),
    Route(
        path="/chat_tokenize",
        handler=chat_tokenize,
        dialect=NATIVE,
        name="get_chat_tokenize",
        summary="Template and tokenize a chat",
        tag="TGI",
        body=ChatBody,
        answer=ChatTokenizeResponse,
    ),
]
