"""The values that carry a request from the HTTP worker to the engine and its tokens back.

All are frozen and hold only numbers, strings, tuples and `TokenIds`, so that they cross process borders as they are.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self, SupportsIndex, cast, overload

if TYPE_CHECKING:
    _Array = array[int]
else:
    _Array = array  # cannot be subscripted before Python 3.12

FinishReason = Literal["length", "eos_token", "stop_sequence", "cancelled"]
GrammarKind = Literal["json", "regex", "json_schema", "choice", "lark"]
NO_LOGPROB = math.nan
"""Log-probability of a token whose request did not ask for it, and of a prompt's first token."""


MAX_GRAMMAR_CHARACTERS: Mapping[GrammarKind, int] = {
    "json": 1 << 17,
    "json_schema": 1 << 17,
    "choice": 1 << 17,
    "regex": 1 << 15,
    "lark": 1 << 15,
}
"""Of a grammar's source. Compilers recurse along references, and an engine sizes its stacks for so many."""
_JSON = json.JSONDecoder()
_EMBEDDED = re.compile(r"%json\s*(?={)")


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the generated text; ``source`` is the schema, expression or list as text."""

    kind: GrammarKind
    """json: any JSON; json_schema; regex; lark: a grammar in Lark's language, as llguidance reads it; choice: one of a
    JSON list of texts."""
    source: str
    """The schema, expression, grammar or list, as text."""

    def excess(self) -> str | None:
        """What is wrong with its length, if anything. JSON schemas in a Lark grammar count as such, all together."""
        own = len(self.source)
        if self.kind == "lark":
            schemas = _embedded_characters(self.source)
            own -= schemas
            if schemas > (allowed := MAX_GRAMMAR_CHARACTERS["json"]):
                return f"its JSON schemas have {schemas} characters; allowed are {allowed}"
        if own > (allowed := MAX_GRAMMAR_CHARACTERS[self.kind]):
            return f"it has {own} characters; allowed are {allowed}"
        return None


def _embedded_characters(lark: str) -> int:
    """Characters of the JSON objects that follow ``%json`` in a Lark grammar."""
    count = position = 0
    while (found := _EMBEDDED.search(lark, position)) is not None:
        try:
            _, position = _JSON.raw_decode(lark, found.end())
        except (ValueError, RecursionError):
            break
        count += position - found.end()
    return count


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Every field's default is neutral.

    Order of application: watermark, logit bias, repetition, frequency and presence penalties, grammar mask,
    temperature, top-k, top-p, min-p, typical-p, choice. Each of the last four sees the probabilities of what the one
    before has left, scaled to add up to 1. Only `repetition_penalty` sees the prompt; none sees another request.
    """

    do_sample: bool = False
    """False: greedy, the arg-max after penalties, of equals the lowest id. True: a draw with `seed`."""
    temperature: float = 1.0
    """Logits are divided by it, with `do_sample`; above 0."""
    top_k: int = 0
    """Draw from the so many most likely tokens; 0: off."""
    top_p: float = 1.0
    """Holtzman et al. 2020 (nucleus): draw from the most likely tokens, as few as add up to at least this and not less
    than one; 1.0: off."""
    min_p: float = 0.0
    """Draw from the tokens that are at least so many times as likely as the most likely one; 0.0: off."""
    typical_p: float = 1.0
    """Meister et al. 2022: draw from the tokens whose -log p is nearest to the entropy, as few as add up to at least
    this and not less than one; 1.0: off."""
    seed: int = 0
    """Unsigned 64 bit. Same request and seed: same tokens, whoever shares the batch."""
    repetition_penalty: float = 1.0
    """Keskar et al. 2019 (CTRL), for each token in prompt or output, once however often it occurs: a positive logit is
    divided by it, a negative one multiplied."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per earlier occurrence in the output."""
    presence_penalty: float = 0.0
    """Subtracted from a token's logit once if it occurs in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and what is added to its logit."""
    watermark: bool = False
    """Kirchenbauer et al. 2023, with `EngineOptions.watermark_gamma` and `watermark_delta`: a part of the vocabulary,
    chosen by the token before, gets higher logits."""
    grammar: Grammar | None = None
    """What the text has to be; None: anything."""


@dataclass(frozen=True, slots=True)
class StopRules:
    """When a request ends. Checked in this order: length, end-of-sequence or stop token, stop string."""

    max_new_tokens: int
    """The request ends with its so many-th token; at least 1."""
    min_new_tokens: int = 0
    """Until so many tokens exist, end-of-sequence and stop tokens cannot be chosen."""
    ignore_eos: bool = False
    """End-of-sequence is a token like any other."""
    stop_token_ids: tuple[int, ...] = ()
    """Each ends the request for the reason ``stop_sequence`` and is its last token, also when `ignore_eos` is set."""
    stop_strings: tuple[str, ...] = ()
    """Matched on text, in the HTTP worker, which then cancels the request in the engine; engines ignore them."""


class TokenIds(_Array):
    """Token ids as an ``array("i")`` that is equal to the tuple of the same numbers, and hashed like it.

    To make 32,000 Python numbers of a long prompt takes a millisecond, for which an engine's own thread would wait;
    NumPy and other arrays take these as they are.
    """

    __slots__ = ()

    def __new__(cls, ids: Iterable[int] | bytes = ()) -> Self:
        return cast("Self", super().__new__(cls, "i", ids))

    @overload
    def __getitem__(self, at: SupportsIndex) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> Self: ...

    def __getitem__(self, at: SupportsIndex | slice) -> int | Self:
        found = super().__getitem__(at)
        return found if isinstance(found, int) else type(self)(found)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, tuple):
            return len(self) == len(other) and tuple(self) == other
        return super().__eq__(other)

    def __hash__(self) -> int:  # type: ignore[override]  # arrays have none, because they may change
        return hash(tuple(self))


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. `request_id` is unique among the open requests of one engine, unsigned 64 bit."""

    request_id: int
    """Names the request in `cancel` and in its events."""
    input_ids: Sequence[int]
    """A tuple, or `TokenIds`, which what came over the wire has. Nobody changes it."""
    sampling: SamplingParams
    """How its tokens are chosen."""
    stop: StopRules
    """When it ends."""
    logprobs: bool = False
    """Whether each token's log-probability (log-softmax of the raw logits) is wanted."""
    top_n_tokens: int = 0
    """Report the so many most likely tokens beside each token."""
    prefill_logprobs: bool = False
    """Whether the log-probabilities of the prompt's tokens are wanted, each after those before it."""
    prefill_top_n_tokens: int = 0
    """With `prefill_logprobs`: report the so many most likely tokens beside each of the prompt's tokens."""
    adapter_id: str | None = None
    """Name of the LoRA adapter to answer with; None: the model itself."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    priority: int = 0
    """Lower enters first."""
    name: str = ""
    """The HTTP request's id, by which its tenant may cancel it through any HTTP worker; engines ignore it."""
    tenant: str = ""
    """Whose request it is, where there are several API keys; engines ignore it."""
    traceparent: str = ""
    """W3C trace context of the span that it belongs to; empty: it is not traced. Engines ignore it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a finished request."""

    prompt_tokens: int
    """Tokens of the prompt."""
    generated_tokens: int
    """Tokens that were emitted, with the one that ended the request."""
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, in order of generation. `top` is sorted, most likely first."""

    request_id: int
    """Whose token it is."""
    token_id: int
    """Below `ModelInfo.vocab_size`."""
    logprob: float = NO_LOGPROB
    """Natural logarithm, log-softmax of the raw logits; `NO_LOGPROB` unless `Request.logprobs` asked for it."""
    top: tuple[tuple[int, float], ...] = ()
    """As many (id, log-probability) pairs as `Request.top_n_tokens` asked for."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The request's last event. Its final token, if any, came before as a `Token`."""

    request_id: int
    """Who has ended."""
    reason: FinishReason
    """length, eos_token, stop_sequence (a stop token), or cancelled."""
    usage: Usage
    """What it has cost."""
    queue_s: float = 0.0
    """Seconds from submission to the first step that ran it."""
    prefill_logprobs: tuple[float, ...] = ()
    """One per prompt token, the first `NO_LOGPROB`; empty unless asked for."""
    prefill_top: tuple[tuple[tuple[int, float], ...], ...] = ()
    """One per prompt token, most likely first, of the first none; empty unless asked for."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request's last event, if it could not be finished. `error_type` is one of `errors.by_type`."""

    request_id: int
    """Who has ended."""
    error_type: str
    """`GatewayError.error_type` of the error that it stands for."""
    message: str
    """`GatewayError.detail` of it: what the client may read."""
    retry_after_s: float = 0.0
    """When to come again, for a request that was refused; 0.0: not known."""


Event = Token | Finished | Failed


@dataclass(frozen=True, slots=True)
class StepEvents:
    """All events of one engine step: token columns of equal length, then endings.

    Row i says that request ``request_ids[i]`` got ``token_ids[i]``. A request may own several rows (speculation), in
    order of generation. Within one StepEvents every token precedes every ending.
    """

    request_ids: list[int] = field(default_factory=list)
    """Of each token: whose it is."""
    token_ids: list[int] = field(default_factory=list)
    """The tokens."""
    logprobs: list[float] = field(default_factory=list)
    """Their log-probabilities, or `NO_LOGPROB`."""
    top: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    """Row -> most likely tokens, only for rows whose request asked."""
    finished: list[Finished] = field(default_factory=list)
    """Endings of this step."""
    failed: list[Failed] = field(default_factory=list)
    """The others."""

    def __bool__(self) -> bool:
        return bool(self.request_ids or self.finished or self.failed)

    def events(self) -> Iterator[Event]:
        """The same as single events, in order."""
        for row, (request_id, token_id) in enumerate(zip(self.request_ids, self.token_ids, strict=True)):
            yield Token(request_id, token_id, self.logprobs[row], self.top.get(row, ()))
        yield from self.finished
        yield from self.failed

    @staticmethod
    def pack(events: Iterable[Event]) -> StepEvents:
        """Inverse of `events`."""
        step = StepEvents()
        for event in events:
            match event:
                case Token():
                    if event.top:
                        step.top[len(step.request_ids)] = event.top
                    step.request_ids.append(event.request_id)
                    step.token_ids.append(event.token_id)
                    step.logprobs.append(event.logprob)
                case Finished():
                    step.finished.append(event)
                case Failed():
                    step.failed.append(event)
        return step
