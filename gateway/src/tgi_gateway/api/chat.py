"""OpenAI's chat route, and the tokenization of a chat."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway.api import bodies
from tgi_gateway.api.bodies import ChatBody, SamplingBody
from tgi_gateway.api.caller import new_id
from tgi_gateway.api.conversation import prompt_of
from tgi_gateway.api.errors import NATIVE, OPENAI, BatchTooLarge
from tgi_gateway.api.generation import Generation, Piece
from tgi_gateway.api.grammars import constraint_of
from tgi_gateway.api.routes import Route
from tgi_gateway.api.serving import (
    FINGERPRINT,
    Answer,
    Call,
    Services,
    collect_all,
    interleave,
    quoted,
    refuse_cancelled,
)
from tgi_gateway.api.sse import DONE, EventStream, unless_gone
from tgi_gateway.api.tgi import SimpleToken, simple_tokens
from tgi_gateway.errors import Unsupported, ValidationError
from tgi_gateway.prompt import validate
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.prompt.validate import Parameters, Valid
from tgi_gateway.types import FinishReason

OpenAIReason = Literal["stop", "length"]
REASONS: dict[FinishReason, OpenAIReason] = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}
MAX_CHOICES = 128
"""Of one prompt, as at OpenAI."""
ANY_MODEL = "tgi"
"""The model's name in requests that do not care."""


class TopLogprob(Struct):
    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float | None
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class Logprobs(Struct):
    content: list[TokenLogprob]


class AssistantMessage(Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Struct, kw_only=True):
    index: int
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: OpenAIReason


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    object: Literal["chat.completion"] = "chat.completion"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str


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


def answered_model(services: Services, body: SamplingBody) -> str:
    return body.model if body.model not in (None, "", ANY_MODEL) else services.info.model_id


def choices_of(services: Services, body: SamplingBody, prompts: int = 1, each: int = 1) -> int:
    """How many generations a call takes: `each` or `n` for each prompt. Raises `BatchTooLarge`, `ValidationError`."""
    if prompts > services.limits.max_client_batch_size:
        raise BatchTooLarge(services.limits.max_client_batch_size)
    count = prompts * max(body.n or 1, each)
    allowed = min(prompts * MAX_CHOICES, services.settings.max_concurrent_requests)
    if count > allowed:
        raise ValidationError(f"`n` and `prompt` ask for {count} generations at once; allowed are {allowed}")
    return count


def sampling_of(services: Services, body: SamplingBody, *, logprobs: bool, top_logprobs: int | None) -> Parameters:
    """What the OpenAI routes have in common, with OpenAI's neutral values taken as such."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    greedy = body.temperature == 0.0
    return Parameters(
        temperature=None if greedy else body.temperature,
        do_sample=not greedy,
        # A draw from the most likely token alone would still be a draw; greedy ignores how to draw.
        top_k=None if greedy or body.top_k in (0, -1) else body.top_k,
        top_p=None if greedy or body.top_p == 1.0 else body.top_p,
        min_p=None if greedy or body.min_p == 0.0 else body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias or {},
        max_new_tokens=body.max_tokens,
        min_new_tokens=body.min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop=[text for text in stop if text],
        stop_token_ids=body.stop_token_ids or (),
        seed=None if body.seed is None else body.seed % 2**64,
        logprobs=logprobs,
        top_n_tokens=top_logprobs,
        truncate=body.truncate_prompt_tokens,
        grammar=constraint_of(body),
        adapter_id=body.model if body.model in services.adapters else None,
        cache_salt=body.cache_salt or "",
    )


def wants_logprobs(body: ChatBody) -> bool:
    return bool(body.top_logprobs) if body.logprobs is None else body.logprobs


def parameters_of(services: Services, body: ChatBody) -> Parameters:
    if body.max_tokens is None:
        body.max_tokens = body.max_completion_tokens
    logprobs = wants_logprobs(body)
    return sampling_of(services, body, logprobs=logprobs, top_logprobs=body.top_logprobs if logprobs else None)


def refuse_unknown_wishes(body: ChatBody) -> None:
    """What cannot be honoured is refused, not ignored."""
    if body.tools and body.tool_choice != "none":
        raise Unsupported("`tools` are not supported yet; leave them out or set `tool_choice` to `none`")
    if body.modalities and body.modalities != ["text"]:
        raise Unsupported('`modalities` other than ["text"] are not supported')
    if body.function_call not in (None, "none"):
        raise Unsupported("`function_call` is not supported; use `tool_choice`")
    for name in ("audio", "functions", "web_search_options", "chat_template"):
        if getattr(body, name) is not None:
            raise Unsupported(f"`{name}` is not supported")


async def chat(services: Services, request: Request, raw: bytes) -> Response:
    return await answer(services, request, bodies.decode_known(raw, ChatBody))


async def answer(services: Services, request: Request, body: ChatBody) -> Response:
    call = Call(services, "chat_completions")
    if body.stream:
        return EventStream(_events(services, body, call), OPENAI, call.headers, tail=DONE, failed=call.failed)
    try:
        prompt, answers = await unless_gone(request.receive, answers_of(services, body))
    except Exception as error:
        call.failed(error)
        raise
    call.account(answers, len(prompt))
    with_logprobs = wants_logprobs(body)
    completion = ChatCompletion(
        id=new_id("chatcmpl-"),
        created=int(time.time()),
        model=answered_model(services, body),
        system_fingerprint=FINGERPRINT,
        choices=[
            ChatChoice(
                index=index,
                message=AssistantMessage(content=each.generation.text),
                logprobs=_logprobs(services.tokenizer, each.pieces) if with_logprobs else None,
                finish_reason=REASONS[each.generation.reason or "length"],
            )
            for index, each in enumerate(answers)
        ],
        usage=usage_of(answers),
    )
    return Response(msgspec.json.encode(completion), headers=call.headers, media_type="application/json")


async def _prepare(services: Services, body: ChatBody) -> tuple[str, list[Valid]]:
    refuse_unknown_wishes(body)
    parameters = parameters_of(services, body)
    validate.check(parameters, services.limits)
    prompt = await prompt_of(services, body)
    valid = await validate.validate(
        prompt,
        parameters,
        services.limits,
        services.tokenizer,
        add_special_tokens=bool(body.add_special_tokens),
    )
    return prompt, validate.copies(valid, body.n or 1, seeds_follow=True)


async def answers_of(services: Services, body: ChatBody) -> tuple[str, list[Answer]]:
    with services.permits.hold(choices_of(services, body)):
        prompt, valids = await _prepare(services, body)
        return prompt, await collect_all(services, valids, keep_stop=False)


async def _events(services: Services, body: ChatBody, call: Call) -> AsyncGenerator[bytes, None]:
    with services.permits.hold(choices_of(services, body)):
        prompt, valids = await _prepare(services, body)
        call.stream_headers(len(prompt))
        opening = (
            f'data: {{"object":"chat.completion.chunk","id":{quoted(new_id("chatcmpl-"))},"created":{int(time.time())},'
            f'"model":{quoted(answered_model(services, body))},"system_fingerprint":{quoted(FINGERPRINT)},"choices":['
        )
        totals: list[tuple[int, int | None]] = []
        streams = [
            _choice_events(services, body, call, valid, f'{opening}{{"index":{index},', totals)
            for index, valid in enumerate(valids)
        ]
        if len(streams) == 1:
            async for chunk in streams[0]:
                yield chunk
        else:
            async for chunk in interleave(streams):
                yield chunk
        if body.stream_options is not None and body.stream_options.include_usage:
            usage = usage_from(len(valids[0].request.input_ids), totals)
            yield f'{opening}],"usage":{msgspec.json.encode(usage).decode()}}}\n\n'.encode()


async def _choice_events(
    services: Services,
    body: ChatBody,
    call: Call,
    valid: Valid,
    opening: str,
    totals: list[tuple[int, int | None]],
) -> AsyncGenerator[bytes, None]:
    """One choice, each event being `opening`, its delta and an ending. Appends its token counts to `totals`."""
    with_logprobs = wants_logprobs(body)
    opening += '"delta":{"role":"assistant","content":'
    ending = '},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    async with services.open(valid, keep_stop=False) as generation:
        async for pieces in generation:
            last = generation.reason is not None
            if last:
                refuse_cancelled(generation)
            elif not with_logprobs:
                # Written by hand: one turn per streamed token.
                parts = [f"{opening}{quoted('' if piece.special else piece.text)}{ending}" for piece in pieces]
                yield "".join(parts).encode()
                continue
            parts = []
            for place, piece in enumerate(pieces):
                reason = "null"
                text = "" if piece.special else piece.text
                if last and place == len(pieces) - 1:
                    text += generation.rest
                    reason = quoted(REASONS[generation.reason or "length"])
                logprobs = _logprobs(services.tokenizer, [piece]) if with_logprobs else None
                parts.append(
                    f'{opening}{quoted(text)}}},"logprobs":{msgspec.json.encode(logprobs).decode()},'
                    f'"finish_reason":{reason}}}],"usage":null}}\n\n'
                )
            if last:
                if not pieces:
                    reason = quoted(REASONS[generation.reason or "length"])
                    parts.append(
                        f'{opening}{quoted(generation.rest)}}},"logprobs":null,"finish_reason":{reason}}}],"usage":null}}\n\n'
                    )
                call.succeeded(generation, valid.seed)
                totals.append((generation.generated_tokens, cached_tokens(generation)))
            yield "".join(parts).encode()


def _logprobs(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Logprobs:
    return Logprobs(
        [
            TokenLogprob(
                piece.text,
                piece.logprob,
                list(piece.text.encode()),
                [
                    TopLogprob(text, logprob, list(text.encode()))
                    for text, logprob in ((tokenizer.token_text(token_id), value) for token_id, value in piece.top)
                ],
            )
            for piece in pieces
        ]
    )


def cached_tokens(generation: Generation) -> int | None:
    """Prompt tokens from the prefix cache; None if the engine failed before it told them."""
    return None if generation.finished is None else generation.finished.usage.cached_tokens


def usage_from(prompt_tokens: int, totals: Sequence[tuple[int, int | None]]) -> Usage:
    """Of one prompt and its choices, each given by its generated and its cached tokens."""
    completion = sum(generated for generated, _ in totals)
    cached = [count for _, count in totals if count is not None]
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion,
        total_tokens=prompt_tokens + completion,
        prompt_tokens_details=PromptTokensDetails(min(cached)) if cached else UNSET,
    )


def usage_of(answers: Sequence[Answer]) -> Usage:
    totals = [(each.generation.generated_tokens, cached_tokens(each.generation)) for each in answers]
    return usage_from(len(answers[0].valid.request.input_ids), totals)


async def chat_tokenize(services: Services, request: Request, raw: bytes) -> Response:
    body = bodies.decode(raw, ChatBody, strict=services.settings.strict)
    services.metrics.count()
    refuse_unknown_wishes(body)

    async def work() -> ChatTokenizeResponse:
        prompt = await prompt_of(services, body)
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
