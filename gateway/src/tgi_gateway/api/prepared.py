"""A request of OpenAI's routes made ready: its parameters, its prompt, and how its answers will be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tgi_gateway.api.answers import Reader, Reading
from tgi_gateway.api.bodies import ChatBody, SamplingBody
from tgi_gateway.api.conversation import prompt_of
from tgi_gateway.api.errors import BatchTooLarge
from tgi_gateway.api.generation import Piece
from tgi_gateway.api.grammars import constraint_of
from tgi_gateway.api.serving import Answer, Enough, Services, collect_all
from tgi_gateway.api.tool_choice import grammar_of, offer_of, reading_of
from tgi_gateway.errors import Unsupported, ValidationError
from tgi_gateway.prompt import validate
from tgi_gateway.prompt.validate import Parameters, Valid

MAX_CHOICES = 128
"""Of one prompt, as at OpenAI."""
ANY_MODEL = "tgi"
"""The model's name in requests that do not care."""


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
    """What the OpenAI routes have in common, with OpenAI's neutral values taken as such. Raises `Unsupported`."""
    if body.moderation is not None:
        raise Unsupported("`moderation` is not supported: this server moderates nothing")
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
    if body.modalities and body.modalities != ["text"]:
        raise Unsupported('`modalities` other than ["text"] are not supported')
    if body.function_call not in (None, "none"):
        raise Unsupported("`function_call` is not supported; use `tool_choice`")
    for name in ("audio", "functions", "web_search_options", "chat_template"):
        if getattr(body, name) is not None:
            raise Unsupported(f"`{name}` is not supported")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A chat that is ready to be generated: the prompt, a request for each choice, and how answers are read."""

    prompt: str
    valids: list[Valid]
    reading: Reading

    @property
    def ends_with_call(self) -> bool:
        """Whether an answer ends with its first call, without a grammar that would see to it."""
        held = any(valid.request.sampling.grammar is not None for valid in self.valids)
        return self.reading.family is not None and not self.reading.parallel and not held

    def enough(self) -> Enough | None:
        """What tells of one answer whether it is whole, where the model would go on."""
        if not self.ends_with_call:
            return None
        reader = Reader(self.reading)

        def told(pieces: Sequence[Piece]) -> bool:
            reader.read(pieces)
            return reader.whole

        return told

    def read(self, answer: Answer) -> Reader:
        """A whole answer, taken apart."""
        reader = Reader(self.reading)
        if self.reading.plain:
            reader.words.append(answer.generation.text)
        else:
            reader.read(answer.pieces)
            reader.finish(answer.generation.rest)
        return reader


async def prepare(services: Services, body: ChatBody) -> Prepared:
    """Raises what is wrong with `body`."""
    refuse_unknown_wishes(body)
    offer = offer_of(body)
    parameters = parameters_of(services, body)
    validate.check(parameters, services.openai_limits)
    prompt = await prompt_of(services, body, offer)
    reading = reading_of(services, body, offer, prompt)
    parameters = replace(parameters, grammar=grammar_of(services, offer, reading, parameters.grammar))
    valid = await validate.validate(
        prompt,
        parameters,
        services.openai_limits,
        services.tokenizer,
        add_special_tokens=bool(body.add_special_tokens),
    )
    return Prepared(prompt, validate.copies(valid, body.n or 1, seeds_follow=True), reading)


async def answers_of(services: Services, body: ChatBody) -> tuple[Prepared, list[Answer]]:
    with services.permits.hold(choices_of(services, body)):
        prepared = await prepare(services, body)
        visible = prepared.reading.visible
        answers = await collect_all(services, prepared.valids, keep_stop=False, visible=visible, enough=prepared.enough)
        return prepared, answers
