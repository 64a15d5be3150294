"""TGI's native routes: `/generate`, `/generate_stream`, `/`, `/tokenize`, and its inverse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from functools import partial

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway.api import decoding
from tgi_gateway.api.bodies import CompatGenerateBody, DetokenizeBody, GenerateBody, ParametersBody
from tgi_gateway.api.errors import NATIVE
from tgi_gateway.api.generation import Generation, Piece
from tgi_gateway.api.grammars import grammar_of
from tgi_gateway.api.routes import Listed, Route
from tgi_gateway.api.serving import Answer, Call, Services, collect_all, number, quoted, refuse_cancelled
from tgi_gateway.api.sse import EventStream, unless_gone
from tgi_gateway.errors import ValidationError
from tgi_gateway.prompt import validate
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.prompt.validate import Parameters, Valid
from tgi_gateway.types import FinishReason


class PrefillToken(Struct):
    id: int
    text: str
    logprob: float | None


class Token(Struct):
    id: int
    text: str
    logprob: float | None
    special: bool


class BestOfSequence(Struct, kw_only=True):
    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(Struct, kw_only=True):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[Token]] | UnsetType = UNSET


class GenerateResponse(Struct, kw_only=True):
    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct, kw_only=True):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(Struct, kw_only=True):
    """One event of `/generate_stream`."""

    index: int
    token: Token
    top_tokens: list[Token] | UnsetType = UNSET
    generated_text: str | None
    details: StreamDetails | None


class DetokenizeResponse(Struct):
    text: str


class SimpleToken(Struct, kw_only=True):
    """`start` and `stop` count bytes of the UTF-8 text."""

    id: int
    text: str
    start: int
    stop: int


def parameters_of(body: ParametersBody) -> Parameters:
    return Parameters(
        best_of=body.best_of,
        temperature=body.temperature,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        typical_p=body.typical_p,
        do_sample=body.do_sample,
        max_new_tokens=body.max_new_tokens,
        min_new_tokens=body.min_new_tokens,
        ignore_eos=body.ignore_eos,
        stop=body.stop,
        truncate=body.truncate,
        watermark=body.watermark,
        prefill=body.decoder_input_details,
        logprobs=True,
        seed=body.seed,
        top_n_tokens=body.top_n_tokens,
        grammar=grammar_of(body.grammar),
        adapter_id=body.adapter_id,
    )


async def generate(services: Services, request: Request, raw: bytes) -> Response:
    body = decoding.decode(raw, GenerateBody, strict=services.settings.strict)
    return await _generate(services, request, body)


async def compat_generate(services: Services, request: Request, raw: bytes) -> Response:
    """`POST /`: the answer alone is wrapped in a list, and contains the prompt unless told otherwise."""
    return await compat_answer(
        services, request, decoding.decode(raw, CompatGenerateBody, strict=services.settings.strict)
    )


async def compat_answer(services: Services, request: Request, body: CompatGenerateBody) -> Response:
    if body.parameters.return_full_text is None:
        body.parameters.return_full_text = True
    if body.stream:
        return _stream(services, body)
    return await _generate(services, request, body, listed=True)


async def generate_stream(services: Services, request: Request, raw: bytes) -> Response:
    del request
    return _stream(services, decoding.decode(raw, GenerateBody, strict=services.settings.strict))


async def _generate(services: Services, request: Request, body: GenerateBody, *, listed: bool = False) -> Response:
    call = Call(services, "generate")
    try:
        answers = await unless_gone(request.receive, answers_of(services, body))
    except Exception as error:
        call.failed(error)
        raise
    best = _best(answers)
    call.account([answers[best]], len(body.inputs))
    response = _response(services.tokenizer, body, answers.pop(best), answers)
    document = msgspec.json.encode([response] if listed else response)
    return Response(document, headers=call.headers, media_type="application/json")


def _best(answers: Sequence[Answer]) -> int:
    return max(range(len(answers)), key=lambda place: answers[place].mean_logprob)


async def best_answer(services: Services, body: GenerateBody) -> Answer:
    answers = await answers_of(services, body)
    return answers[_best(answers)]


async def answers_of(services: Services, body: GenerateBody) -> list[Answer]:
    parameters = parameters_of(body.parameters)
    count = parameters.best_of or 1
    validate.check_best_of(parameters, services.limits)
    with services.permits.hold(count):
        valid = await validate.validate(body.inputs, parameters, services.limits, services.tokenizer)
        copies = validate.copies(valid, count, seeds_follow=False)
        return await collect_all(services, copies, keep_stop=True)


def _response(tokenizer: Tokenizer, body: GenerateBody, best: Answer, others: Sequence[Answer]) -> GenerateResponse:
    wanted = body.parameters
    prefix = body.inputs if wanted.return_full_text else ""
    text = prefix + best.generation.text
    if not (wanted.details or wanted.decoder_input_details):
        return GenerateResponse(generated_text=text)
    losers = [
        BestOfSequence(
            generated_text=prefix + other.generation.text,
            finish_reason=_reason(other.generation),
            generated_tokens=other.generation.generated_tokens,
            seed=other.valid.seed,
            prefill=_prefill(tokenizer, other.generation),
            tokens=[_token(piece) for piece in other.pieces],
            top_tokens=_top_lists(tokenizer, other),
        )
        for other in others
    ]
    details = Details(
        finish_reason=_reason(best.generation),
        generated_tokens=best.generation.generated_tokens,
        seed=best.valid.seed,
        prefill=_prefill(tokenizer, best.generation),
        tokens=[_token(piece) for piece in best.pieces],
        best_of_sequences=losers or UNSET,
        top_tokens=_top_lists(tokenizer, best),
    )
    return GenerateResponse(generated_text=text, details=details)


def _reason(generation: Generation) -> FinishReason:
    assert generation.reason is not None
    return generation.reason


def _token(piece: Piece) -> Token:
    return Token(piece.token_id, piece.text, piece.logprob, piece.special)


def _top(tokenizer: Tokenizer, piece: Piece) -> list[Token]:
    special = tokenizer.special_texts
    return [
        Token(token_id, tokenizer.token_text(token_id), logprob, token_id in special) for token_id, logprob in piece.top
    ]


def _top_lists(tokenizer: Tokenizer, answer: Answer) -> list[list[Token]] | UnsetType:
    if not answer.valid.request.top_n_tokens:
        return UNSET
    return [_top(tokenizer, piece) for piece in answer.pieces]


def _prefill(tokenizer: Tokenizer, generation: Generation) -> list[PrefillToken]:
    if generation.finished is None or not generation.finished.prefill_logprobs:
        return []
    return [
        PrefillToken(token_id, tokenizer.token_text(token_id), logprob)
        for token_id, logprob in zip(generation.request.input_ids, generation.finished.prefill_logprobs, strict=True)
    ]


def _stream(services: Services, body: GenerateBody) -> EventStream:
    call = Call(services, "generate_stream")
    return EventStream(_events(services, body, call), NATIVE, call.headers, failed=call.failed)


async def _events(services: Services, body: GenerateBody, call: Call) -> AsyncGenerator[bytes, None]:
    call.stream_headers(len(body.inputs))
    parameters = parameters_of(body.parameters)
    validate.check_streaming(parameters)
    with services.permits.hold(1):
        valid = await validate.validate(body.inputs, parameters, services.limits, services.tokenizer)
        async with services.open(valid, keep_stop=True) as generation:
            index = 1
            async for pieces in generation:
                if generation.reason is None:
                    parts = [
                        _event(index + place, piece, services.tokenizer, "null", "null")
                        for place, piece in enumerate(pieces)
                    ]
                    index += len(parts)
                    yield "".join(parts).encode()
                    continue
                refuse_cancelled(generation)
                call.succeeded(generation, valid.seed)
                yield _last_events(services, body, valid, generation, index, pieces)


def _event(index: int, piece: Piece, tokenizer: Tokenizer, text: str, details: str) -> str:
    top = f',"top_tokens":{msgspec.json.encode(_top(tokenizer, piece)).decode()}' if piece.top else ""
    logprob = number(piece.logprob)
    # Written by hand: one call per streamed token.
    return (
        f'data: {{"index":{index},"token":{{"id":{piece.token_id},"text":{quoted(piece.text)},"logprob":{logprob},'
        f'"special":{"true" if piece.special else "false"}}}{top},"generated_text":{text},"details":{details}}}\n\n'
    )


def _last_events(
    services: Services,
    body: GenerateBody,
    valid: Valid,
    generation: Generation,
    index: int,
    pieces: list[Piece],
) -> bytes:
    rest = generation.rest
    if pieces:
        if not pieces[-1].special:
            pieces[-1].text += rest
    else:  # the engine ended the request without a token, so that one without text has to carry the ending
        pieces = [Piece(0, rest, 0.0, not rest, ())]
    wanted = body.parameters
    text = (body.inputs if wanted.return_full_text else "") + generation.text
    details = "null"
    if wanted.details:
        details = msgspec.json.encode(
            StreamDetails(
                finish_reason=_reason(generation),
                generated_tokens=generation.generated_tokens,
                seed=valid.seed,
                input_length=len(valid.request.input_ids),
            )
        ).decode()
    *before, last = pieces
    parts = [_event(index + place, piece, services.tokenizer, "null", "null") for place, piece in enumerate(before)]
    parts.append(_event(index + len(before), last, services.tokenizer, quoted(text), details))
    return "".join(parts).encode()


async def tokenize(services: Services, request: Request, raw: bytes) -> Response:
    body = decoding.decode(raw, GenerateBody, strict=services.settings.strict)
    tokens = await unless_gone(request.receive, simple_tokens(services.tokenizer, body.inputs, True))
    return Response(msgspec.json.encode(tokens), media_type="application/json")


async def simple_tokens(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[SimpleToken]:
    """Tokens with the bytes of `text` that they stand for."""
    encoding = await tokenizer.encode_async(text, add_special_tokens)
    # Offsets cost a second encoding.
    offsets = await asyncio.to_thread(partial(getattr, encoding, "offsets"))
    data = encoding.text.encode()
    return [
        SimpleToken(id=token_id, text=data[start:stop].decode(errors="replace"), start=start, stop=stop)
        for token_id, (start, stop) in zip(encoding.ids, offsets, strict=True)
    ]


async def detokenize(services: Services, request: Request, raw: bytes) -> Response:
    body = decoding.decode(raw, DetokenizeBody, strict=services.settings.strict)
    size = services.info.vocab_size
    outside = next((token_id for token_id in body.tokens if token_id >= size), None)
    if outside is not None:
        raise ValidationError(f"`tokens` names token {outside}; this model has {size} tokens")
    decode = partial(services.tokenizer.decode, body.tokens, body.skip_special_tokens)
    text = await unless_gone(request.receive, asyncio.to_thread(decode))
    return Response(msgspec.json.encode(DetokenizeResponse(text)), media_type="application/json")


ROUTES = [
    Route(
        path="/",
        handler=compat_generate,
        dialect=NATIVE,
        name="compat_generate",
        summary="Generate text; with `stream`, a stream of tokens",
        tag="TGI",
        body=CompatGenerateBody,
        answer=Listed(GenerateResponse),
        event=StreamResponse,
        generates=True,
    ),
    Route(
        path="/generate",
        handler=generate,
        dialect=NATIVE,
        name="generate",
        summary="Generate text",
        tag="TGI",
        body=GenerateBody,
        answer=GenerateResponse,
        generates=True,
    ),
    Route(
        path="/generate_stream",
        handler=generate_stream,
        dialect=NATIVE,
        name="generate_stream",
        summary="Generate a stream of tokens",
        tag="TGI",
        body=GenerateBody,
        event=StreamResponse,
        generates=True,
    ),
    Route(
        path="/tokenize",
        handler=tokenize,
        dialect=NATIVE,
        name="tokenize",
        summary="Tokenize a text",
        tag="TGI",
        body=GenerateBody,
        answer=Listed(SimpleToken),
    ),
    Route(
        path="/detokenize",
        handler=detokenize,
        dialect=NATIVE,
        name="detokenize",
        summary="The text of tokens",
        tag="TGI",
        body=DetokenizeBody,
        answer=DetokenizeResponse,
    ),
]
