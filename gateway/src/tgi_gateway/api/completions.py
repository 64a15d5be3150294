"""OpenAI's text completion route."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway.api import decoding
from tgi_gateway.api.bodies import CompletionBody
from tgi_gateway.api.caller import new_id
from tgi_gateway.api.chat import REASONS, OpenAIReason
from tgi_gateway.api.errors import OPENAI, SuffixUnsupported
from tgi_gateway.api.generation import Generation, Piece
from tgi_gateway.api.logprobs import CompletionLogprobs, completion_logprobs, joined, prompt_logprobs
from tgi_gateway.api.prepared import choices_of, sampling_of
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
from tgi_gateway.api.usage import PromptTokensDetails, Usage, cached_tokens, usage_of
from tgi_gateway.errors import BackendFailed, Unsupported, ValidationError
from tgi_gateway.prompt import validate
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.prompt.validate import Parameters, Valid


class CompletionChoice(Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: OpenAIReason | None


class Completion(Struct, kw_only=True):
    object: Literal["text_completion"] = "text_completion"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Struct, kw_only=True):
    """One event of a streamed completion. The last event of each choice has its `usage`, unless one of all follows."""

    object: Literal["text_completion"] = "text_completion"
    id: str
    created: int
    choices: list[CompletionChoice]
    model: str
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to complete: a text, or token ids, with the text they stand for."""

    text: str
    inputs: str | Sequence[int]


def prompts_of(tokenizer: Tokenizer, body: CompletionBody) -> list[Prompt]:
    given = body.prompt
    if isinstance(given, str):
        return [Prompt(given, given)]
    if isinstance(given[0], int):
        return [_from_ids(tokenizer, [token_id for token_id in given if isinstance(token_id, int)])]
    return [
        Prompt(item, item) if isinstance(item, str) else _from_ids(tokenizer, item)
        for item in given
        if not isinstance(item, int)
    ]


def _from_ids(tokenizer: Tokenizer, ids: list[int]) -> Prompt:
    return Prompt(tokenizer.decode(ids, skip_special_tokens=False), ids)


def prompt_count(body: CompletionBody) -> int:
    given = body.prompt
    return 1 if isinstance(given, str) or isinstance(given[0], int) else len(given)


def parameters_of(services: Services, body: CompletionBody) -> Parameters:
    """Raises `Unsupported` for what cannot be honoured."""
    n, best_of = body.n or 1, body.best_of or body.n or 1
    if best_of < n:
        raise ValidationError(f"`best_of` must be >= `n`. Given: {best_of} and {n}")
    if best_of > max(n, services.limits.max_best_of):
        raise ValidationError(f"`best_of` must be <= {max(n, services.limits.max_best_of)}. Given: {best_of}")
    if best_of > n and body.stream:
        raise Unsupported(
            f"`best_of` ({best_of}) above `n` ({n}) cannot be streamed, as at OpenAI: which answers are best is known "
            "when all have ended. Leave out `stream` or `best_of`"
        )
    if _scores_prompt(body):
        _check_prompt_scores(services, body)
    if body.max_tokens == 0 and body.min_tokens:
        raise ValidationError(f"`min_tokens` must be <= `max_tokens`. Given: {body.min_tokens} and 0")
    parameters = sampling_of(
        services, body, logprobs=body.logprobs is not None or best_of > n, top_logprobs=body.logprobs
    )
    return replace(
        parameters,
        prefill=_scores_prompt(body),
        prefill_top_n_tokens=(body.logprobs or 0) if _scores_prompt(body) else 0,
        prompt_only=body.max_tokens == 0,
    )


def _scores_prompt(body: CompletionBody) -> bool:
    return bool(body.echo) and body.logprobs is not None


def _check_prompt_scores(services: Services, body: CompletionBody) -> None:
    features = services.backend.capabilities.features
    if not services.limits.prefill_logprobs:
        raise Unsupported(
            "`echo` with `logprobs` is not supported by this server; start it with --enable-prefill-logprobs"
        )
    if "prefill_logprobs" not in features:
        raise Unsupported("`echo` with `logprobs` is not supported: this engine tells no log-probabilities of prompts")
    if body.logprobs and "prefill_top_n_tokens" not in features:
        raise Unsupported(
            "`echo` with `logprobs` above 0 is not supported: this engine tells no alternatives of a prompt's tokens. "
            "Give 0 for log-probabilities alone"
        )


async def completions(services: Services, request: Request, raw: bytes) -> Response:
    return await answer(services, request, decoding.decode_known(raw, CompletionBody))


async def answer(services: Services, request: Request, body: CompletionBody) -> Response:
    call = Call(services, "completions")
    try:
        if body.suffix is not None:
            raise SuffixUnsupported
        count = choices_of(services, body, prompt_count(body), body.best_of or 1)
        if body.stream:
            return EventStream(
                _events(services, body, call, count), OPENAI, call.headers, tail=DONE, failed=call.failed
            )
        prompts, answers = await unless_gone(request.receive, _answers(services, body, count))
    except Exception as error:
        call.failed(error)
        raise
    call.account(
        [each for group in answers for each in group], sum(len(prompt.text) for prompt in prompts), elapsed=False
    )
    chosen = [(prompt, each) for prompt, group in zip(prompts, answers, strict=True) for each in _best(group, body)]
    completion = Completion(
        id=new_id("cmpl-"),
        created=int(time.time()),
        model=services.info.model_id,
        system_fingerprint=FINGERPRINT,
        choices=[
            CompletionChoice(
                index=index,
                text=(prompt.text if body.echo else "") + each.generation.text,
                logprobs=_logprobs(services.tokenizer, body, prompt, each),
                finish_reason=REASONS[each.generation.reason or "length"],
            )
            for index, (prompt, each) in enumerate(chosen)
        ],
        usage=_sum([usage_of(group) for group in answers]),
    )
    return Response(msgspec.json.encode(completion), headers=call.headers, media_type="application/json")


def _best(answers: Sequence[Answer], body: CompletionBody) -> Sequence[Answer]:
    """The `n` that are returned of `best_of`, best first."""
    n = body.n or 1
    return answers if len(answers) <= n else sorted(answers, key=lambda each: -each.mean_logprob)[:n]


def _logprobs(tokenizer: Tokenizer, body: CompletionBody, prompt: Prompt, answer: Answer) -> CompletionLogprobs | None:
    if body.logprobs is None:
        return None
    if not body.echo:
        return completion_logprobs(tokenizer, answer.pieces, body.logprobs)
    of_prompt = _of_prompt(tokenizer, answer.generation)
    return joined(of_prompt, completion_logprobs(tokenizer, answer.pieces, body.logprobs, len(prompt.text)))


def _of_prompt(tokenizer: Tokenizer, generation: Generation) -> CompletionLogprobs:
    if generation.finished is None:
        raise BackendFailed("the engine ended before it told the prompt's log-probabilities")
    return prompt_logprobs(tokenizer, generation.request.input_ids, generation.finished)


async def _prepare(services: Services, body: CompletionBody) -> tuple[list[Prompt], list[Valid]]:
    parameters = parameters_of(services, body)
    prompts = prompts_of(services.tokenizer, body)
    valids: list[Valid] = []
    for prompt in prompts:
        valid = await validate.validate(
            prompt.inputs,
            parameters,
            services.openai_limits,
            services.tokenizer,
            add_special_tokens=body.add_special_tokens is not False,
        )
        valids += validate.copies(valid, body.best_of or body.n or 1, seeds_follow=True)
    return prompts, valids


async def _answers(services: Services, body: CompletionBody, count: int) -> tuple[list[Prompt], list[list[Answer]]]:
    """The answers to each prompt."""
    with services.permits.hold(count):
        prompts, valids = await _prepare(services, body)
        answers = await collect_all(services, valids, keep_stop=False)
    each = len(answers) // len(prompts)
    return prompts, [answers[start : start + each] for start in range(0, len(answers), each)]


async def _events(services: Services, body: CompletionBody, call: Call, count: int) -> AsyncGenerator[bytes, None]:
    with services.permits.hold(count):
        prompts, valids = await _prepare(services, body)
        call.stream_headers(sum(len(prompt.text) for prompt in prompts))
        repeats = body.n or 1
        model = quoted(services.info.model_id)
        opening = f'data: {{"object":"text_completion","id":{quoted(new_id("cmpl-"))},"created":{int(time.time())},'
        ending = f'"model":{model},"system_fingerprint":{quoted(FINGERPRINT)}'
        used: list[Usage] = []
        streams = [
            _Choice(services, body, call, valid, prompts[index // repeats].text, index, opening, ending, used).events()
            for index, valid in enumerate(valids)
        ]
        async for chunk in streams[0] if len(streams) == 1 else interleave(streams):
            yield chunk
        if _includes_usage(body):
            # Choices of one prompt share its tokens.
            shared = sum(len(valid.request.input_ids) for valid in valids[::repeats])
            completion = sum(usage.completion_tokens for usage in used)
            total = Usage(prompt_tokens=shared, completion_tokens=completion, total_tokens=shared + completion)
            usage = msgspec.json.encode(total).decode()
            yield f'{opening}"choices":[],{ending},"usage":{usage}}}\n\n'.encode()


def _includes_usage(body: CompletionBody) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


@dataclass(frozen=True, slots=True)
class _Choice:
    """One streamed choice: an event is `opening`, its choice and `ending`."""

    services: Services
    body: CompletionBody
    call: Call
    valid: Valid
    prompt: str
    index: int
    opening: str
    ending: str
    used: list[Usage]

    async def events(self) -> AsyncGenerator[bytes, None]:
        body, null_usage = self.body, ',"usage":null' if _includes_usage(self.body) else ""
        opening = f'{self.opening}"choices":[{{"index":{self.index},"text":'
        ending = f',"logprobs":null,"finish_reason":null}}],{self.ending}{null_usage}}}\n\n'
        tokenizer, shown = self.services.tokenizer, 0
        echoed = not body.echo
        held: list[Piece] = []
        async with self.services.open(self.valid, keep_stop=False) as generation:
            async for arrived in generation:
                if _scores_prompt(body) and generation.reason is None:
                    held += arrived  # the prompt comes first, and its scores with the end
                    continue
                if generation.reason is not None:
                    refuse_cancelled(generation)
                pieces, held = held + arrived, []
                parts = []
                if not echoed:
                    echoed, shown = True, len(self.prompt)
                    parts.append(self._echo(generation, opening))
                if generation.reason is not None:
                    parts += self._last(generation, opening, pieces, generation.rest, shown)
                elif body.logprobs is None:
                    parts += [f"{opening}{quoted('' if piece.special else piece.text)}{ending}" for piece in pieces]
                else:
                    for piece in pieces:
                        parts.append(self._with_logprobs(tokenizer, opening, piece, shown))
                        shown += 0 if piece.special else len(piece.text)
                yield "".join(parts).encode()

    def _echo(self, generation: Generation, opening: str) -> str:
        scored = _scores_prompt(self.body)
        told = _of_prompt(self.services.tokenizer, generation) if scored else None
        logprobs = msgspec.json.encode(told).decode()
        ending = f'"finish_reason":null}}],{self.ending}{self._null_usage}}}\n\n'
        return f'{opening}{quoted(self.prompt)},"logprobs":{logprobs},{ending}'

    def _with_logprobs(
        self, tokenizer: Tokenizer, opening: str, piece: Piece, shown: int, rest: str = "", tail: str = ""
    ) -> str:
        wanted = self.body.logprobs
        told = None if wanted is None else completion_logprobs(tokenizer, [piece], wanted, shown)
        logprobs = msgspec.json.encode(told).decode()
        text = ("" if piece.special else piece.text) + rest
        tail = tail or f'"finish_reason":null}}],{self.ending}{self._null_usage}}}\n\n'
        return f'{opening}{quoted(text)},"logprobs":{logprobs},{tail}'

    @property
    def _null_usage(self) -> str:
        return ',"usage":null' if _includes_usage(self.body) else ""

    def _last(self, generation: Generation, opening: str, pieces: list[Piece], rest: str, shown: int) -> list[str]:
        usage = _usage(generation)
        self.used.append(usage)
        self.call.succeeded(generation, self.valid.seed)
        reason = quoted(REASONS[generation.reason or "length"])
        told = self._null_usage or f',"usage":{msgspec.json.encode(usage).decode()}'
        tail = f'"finish_reason":{reason}}}],{self.ending}{told}}}\n\n'
        if not pieces:
            return [f'{opening}{quoted(rest)},"logprobs":null,{tail}']
        parts = []
        tokenizer = self.services.tokenizer
        for piece in pieces[:-1]:
            parts.append(self._with_logprobs(tokenizer, opening, piece, shown))
            shown += 0 if piece.special else len(piece.text)
        parts.append(self._with_logprobs(tokenizer, opening, pieces[-1], shown, rest, tail))
        return parts


def _usage(generation: Generation) -> Usage:
    prompt, generated = len(generation.request.input_ids), generation.generated_tokens
    cached = cached_tokens(generation)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=UNSET if cached is None else PromptTokensDetails(cached),
    )


def _sum(usages: Sequence[Usage]) -> Usage:
    cached = [usage.prompt_tokens_details for usage in usages]
    known = [details.cached_tokens for details in cached if details is not UNSET]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        total_tokens=sum(usage.total_tokens for usage in usages),
        prompt_tokens_details=PromptTokensDetails(sum(known)) if len(known) == len(usages) else UNSET,
    )


ROUTES = [
    Route(
        path="/v1/completions",
        handler=completions,
        dialect=OPENAI,
        name="completions",
        summary="Complete a text",
        tag="OpenAI",
        body=CompletionBody,
        answer=Completion,
        event=CompletionChunk,
        generates=True,
    )
]
