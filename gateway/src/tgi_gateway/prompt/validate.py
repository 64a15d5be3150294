"""The rules of a request: plain parameters in, a `types.Request` out, or a `ValidationError` with TGI's words.

Cheap rules come first, then tokenization, then the rules on lengths; within each the order is TGI's.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tgi_gateway.backend import ModelInfo
from tgi_gateway.errors import ContextExceeded, ValidationError
from tgi_gateway.settings import Settings
from tgi_gateway.types import Grammar, Request, SamplingParams, StopRules, TokenIds

MAX_STOP_CHARACTERS = 1024
"""Of one stop sequence. The automaton that finds it costs memory per character."""

MAX_PROMPT_ALTERNATIVES = 1 << 20
"""Of all tokens of a prompt together; each is a pair of numbers on its way through three processes."""

# Engines compute in float32: what lies outside is indistinguishable from these bounds, but would overflow there.
_SMALLEST, _LARGEST = 1e-6, 1e6


class Encoded(Protocol):
    """A tokenized text."""

    @property
    def ids(self) -> Sequence[int]: ...


class Encoder(Protocol):
    """The part of `prompt.tokenizer.Tokenizer` that validation needs."""

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> Encoded: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for; the operator's word and the model's."""

    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_client_batch_size: int
    max_input_tokens: int
    max_total_tokens: int
    vocab_size: int
    grammar: bool
    prefill_logprobs: bool

    @staticmethod
    def of(settings: Settings, info: ModelInfo) -> Limits:
        return Limits(
            max_best_of=settings.max_best_of,
            max_stop_sequences=settings.max_stop_sequences,
            max_top_n_tokens=settings.max_top_n_tokens,
            max_client_batch_size=settings.max_client_batch_size,
            max_input_tokens=info.max_input_tokens,
            max_total_tokens=info.max_total_tokens,
            vocab_size=info.vocab_size,
            grammar=not settings.disable_grammar_support,
            prefill_logprobs=settings.enable_prefill_logprobs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What a client may ask of one generation, whichever route it came by. None: not given."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    truncate: int | None = None
    watermark: bool = False
    prefill: bool = False
    """Whether the prompt's tokens are wanted with their log-probabilities."""
    prefill_top_n_tokens: int = 0
    """How many most likely tokens are wanted beside each of them."""
    prompt_only: bool = False
    """Nothing is to be generated, as ``max_new_tokens`` 0 says: the prompt alone is of interest."""
    logprobs: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
    adapter_id: str | None = None
    cache_salt: str = ""

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn: asked for, or implied by a parameter that has no other meaning."""
        return (
            self.do_sample
            or self.top_k is not None
            or self.top_p is not None
            or self.min_p is not None
            or self.typical_p is not None
            or (self.temperature is not None and self.temperature != 1.0)
        )


@dataclass(frozen=True, slots=True)
class Valid:
    """A request that may be submitted, except for its id, and what an answer tells about it."""

    request: Request
    seed: int | None
    """None: greedy, no draw was made."""
    silent: bool = False
    """What it generates is not wanted. Engines generate one token at least."""


def check_streaming(parameters: Parameters) -> None:
    """What a stream cannot deliver (rules 0a, 0b)."""
    if parameters.best_of not in (None, 1):
        raise ValidationError("`best_of` != 1 is not supported when streaming tokens")
    if parameters.prefill:
        raise ValidationError("`decoder_input_details` == true is not supported when streaming tokens")


def check_best_of(parameters: Parameters, limits: Limits) -> None:
    """How many generations it takes (rules 0c, 0d): known before any is permitted."""
    best_of = parameters.best_of or 1
    if best_of > 1 and limits.max_best_of == 1:
        raise ValidationError("`best_of` != 1 is not allowed for this endpoint")
    if best_of > limits.max_best_of:
        raise ValidationError(f"`best_of` must be > 0 and <= {limits.max_best_of}. Given: {best_of}")


def check(parameters: Parameters, limits: Limits) -> None:
    """Every rule that needs neither prompt nor token count (rules 0c to 11)."""
    check_best_of(parameters, limits)
    p = parameters
    best_of = p.best_of or 1
    if best_of > 1 and not (p.samples or p.temperature is not None):
        raise ValidationError("you must use sampling when `best_of` is > 1")
    _check_sampling(p)
    if p.max_new_tokens == 0 and not p.prompt_only:
        raise ValidationError("`max_new_tokens` must be strictly positive")
    _check_stop(p, limits)
    if p.seed is not None and best_of > 1:
        raise ValidationError("`seed` must not be set when `best_of` > 1")
    if (p.top_n_tokens or 0) > limits.max_top_n_tokens:
        raise ValidationError(f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {p.top_n_tokens}")
    for token_id in (*p.logit_bias, *p.stop_token_ids):
        if not 0 <= token_id < limits.vocab_size:
            name = "logit_bias" if token_id in p.logit_bias else "stop_token_ids"
            raise ValidationError(f"`{name}` names token {token_id}; this model has {limits.vocab_size} tokens")
    if any(not -100.0 <= bias <= 100.0 for bias in p.logit_bias.values()):
        raise ValidationError("`logit_bias` values must be >= -100.0 and <= 100.0")


def _check_sampling(p: Parameters) -> None:
    if p.temperature is not None and p.temperature <= 0.0:
        raise ValidationError("`temperature` must be strictly positive")
    if p.repetition_penalty is not None and p.repetition_penalty <= 0.0:
        raise ValidationError("`repetition_penalty` must be strictly positive")
    if p.frequency_penalty is not None and not -2.0 <= p.frequency_penalty <= 2.0:
        raise ValidationError("`frequency_penalty` must be >= -2.0 and <= 2.0")
    if p.presence_penalty is not None and not -2.0 <= p.presence_penalty <= 2.0:
        raise ValidationError("`presence_penalty` must be >= -2.0 and <= 2.0")
    if p.top_p is not None and not 0.0 < p.top_p < 1.0:
        raise ValidationError("`top_p` must be > 0.0 and < 1.0")
    if p.typical_p is not None and not 0.0 < p.typical_p < 1.0:
        raise ValidationError("`typical_p` must be > 0.0 and < 1.0")
    if p.min_p is not None and not 0.0 <= p.min_p <= 1.0:
        raise ValidationError("`min_p` must be >= 0.0 and <= 1.0")
    if p.top_k is not None and p.top_k <= 0:
        raise ValidationError("`top_k` must be strictly positive")


def _check_stop(p: Parameters, limits: Limits) -> None:
    if len(p.stop) > limits.max_stop_sequences:
        raise ValidationError(f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(p.stop)}")
    longest = max(map(len, p.stop), default=0)
    if longest > MAX_STOP_CHARACTERS:
        raise ValidationError(
            f"`stop` sequences may have up to {MAX_STOP_CHARACTERS} characters. Given: one of {longest}"
        )


def check_length(input_length: int, parameters: Parameters, limits: Limits) -> int:
    """Rules 16 and 17. Returns how many tokens may be generated."""
    room = limits.max_total_tokens - input_length
    wanted = 1 if parameters.prompt_only else parameters.max_new_tokens
    if wanted is None:
        wanted = max(room, 1)  # without room for even one token, the message tells of one
    if wanted > room:
        raise ContextExceeded(
            f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
            f"Given: {input_length} `inputs` tokens and {wanted} `max_new_tokens`"
        )
    if input_length > limits.max_input_tokens:
        raise ContextExceeded(f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {input_length}")
    if (parameters.min_new_tokens or 0) > wanted:
        raise ValidationError(
            f"`min_new_tokens` must be <= `max_new_tokens`. Given: {parameters.min_new_tokens} and {wanted}"
        )
    return wanted


def _check_alternatives(input_length: int, parameters: Parameters) -> None:
    wanted = input_length * parameters.prefill_top_n_tokens
    if wanted > MAX_PROMPT_ALTERNATIVES:
        raise ValidationError(
            f"{parameters.prefill_top_n_tokens} alternatives of each of {input_length} prompt tokens are {wanted}; "
            f"allowed are {MAX_PROMPT_ALTERNATIVES}"
        )


async def validate(
    inputs: str | Sequence[int],
    parameters: Parameters,
    limits: Limits,
    encoder: Encoder,
    *,
    add_special_tokens: bool = True,
) -> Valid:
    """Check, tokenize off the event loop, check lengths. `inputs` is a text, or token ids that are taken as they are.

    The request's id is 0: whoever submits it gives it one.
    """
    check(parameters, limits)
    if not inputs:
        raise ValidationError("`inputs` cannot be empty")
    truncate = parameters.truncate
    if truncate is not None and not 0 < truncate <= limits.max_input_tokens:
        raise ValidationError(
            f"`truncate` must be strictly positive and less than {limits.max_input_tokens}. Given: {truncate}"
        )
    if isinstance(inputs, str):
        ids: Sequence[int] = (await encoder.encode_async(inputs, add_special_tokens)).ids
        if not ids:
            raise ValidationError("`inputs` cannot be empty")
    else:
        ids = inputs
        outside = next((token_id for token_id in ids if not 0 <= token_id < limits.vocab_size), None)
        if outside is not None:
            raise ValidationError(f"`inputs` names token {outside}; this model has {limits.vocab_size} tokens")
    if truncate is not None:
        ids = ids[-truncate:]
    max_new_tokens = check_length(len(ids), parameters, limits)
    _check_alternatives(len(ids), parameters)
    if parameters.grammar is not None and not limits.grammar:
        raise ValidationError("grammar is not supported")
    # Long texts have ids that go over the wire as they are.
    return _build(ids if isinstance(ids, TokenIds) else tuple(ids), parameters, limits, max_new_tokens)


def _build(ids: Sequence[int], p: Parameters, limits: Limits, max_new_tokens: int) -> Valid:
    samples = p.samples
    seed = secrets.randbits(64) if p.seed is None else p.seed
    sampling = SamplingParams(
        do_sample=samples,
        temperature=_within_float32(p.temperature),
        top_k=p.top_k or 0,
        top_p=1.0 if p.top_p is None else p.top_p,
        min_p=p.min_p or 0.0,
        typical_p=1.0 if p.typical_p is None else p.typical_p,
        seed=seed,
        repetition_penalty=_within_float32(p.repetition_penalty),
        frequency_penalty=p.frequency_penalty or 0.0,
        presence_penalty=p.presence_penalty or 0.0,
        logit_bias=tuple(p.logit_bias.items()),
        watermark=p.watermark,
        grammar=p.grammar,
    )
    stop = StopRules(
        max_new_tokens=max_new_tokens,
        min_new_tokens=p.min_new_tokens or 0,
        ignore_eos=p.ignore_eos,
        stop_token_ids=tuple(p.stop_token_ids),
        stop_strings=tuple(p.stop),
    )
    request = Request(
        request_id=0,
        input_ids=ids,
        sampling=sampling,
        stop=stop,
        logprobs=p.logprobs,
        top_n_tokens=p.top_n_tokens or 0,
        prefill_logprobs=p.prefill and limits.prefill_logprobs,
        prefill_top_n_tokens=p.prefill_top_n_tokens,
        adapter_id=p.adapter_id,
        cache_salt=p.cache_salt,
    )
    return Valid(request, seed if samples else None, p.prompt_only)


def copies(valid: Valid, count: int, *, seeds_follow: bool) -> list[Valid]:
    """`count` independent generations of one request: the first as it is, the others with seeds of their own.

    With `seeds_follow` those are the seed's successors, so that a given seed still fixes every answer.
    """
    request, made = valid.request, [valid]
    for number in range(1, count):
        seed = (request.sampling.seed + number) % 2**64 if seeds_follow else secrets.randbits(64)
        sampling = replace(request.sampling, seed=seed)
        shown = None if valid.seed is None else seed
        made.append(replace(valid, request=replace(request, sampling=sampling), seed=shown))
    return made


def mean_logprob(logprobs: Sequence[float]) -> float:
    """What `best_of` compares. An answer without tokens, or without known log-probabilities, is the worst."""
    known = [value for value in logprobs if not math.isnan(value)]
    return sum(known) / len(known) if known else -math.inf


def _within_float32(value: float | None) -> float:
    return 1.0 if value is None else min(max(value, _SMALLEST), _LARGEST)
