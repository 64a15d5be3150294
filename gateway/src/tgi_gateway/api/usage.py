"""Token counts as OpenAI's routes tell them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from msgspec import UNSET, Struct, UnsetType

from tgi_gateway.api.answers import Reader
from tgi_gateway.api.generation import Generation
from tgi_gateway.api.serving import Answer


class PromptTokensDetails(Struct):
    cached_tokens: int


class CompletionTokensDetails(Struct):
    reasoning_tokens: int


class Usage(Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


def cached_tokens(generation: Generation) -> int | None:
    """Prompt tokens from the prefix cache; None if the engine failed before it told them."""
    return None if generation.finished is None else generation.finished.usage.cached_tokens


@dataclass(frozen=True, slots=True)
class Totals:
    """Token counts of one choice."""

    generated: int
    cached: int | None
    thinking: int = 0


def totals_of(generation: Generation, reader: Reader | None = None) -> Totals:
    thinking = 0 if reader is None else reader.thinking_tokens
    return Totals(generation.generated_tokens, cached_tokens(generation), thinking)


def usage_from(prompt_tokens: int, totals: Sequence[Totals]) -> Usage:
    """Of one prompt and its choices."""
    completion = sum(each.generated for each in totals)
    thinking = sum(each.thinking for each in totals)
    cached = [each.cached for each in totals if each.cached is not None]
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion,
        total_tokens=prompt_tokens + completion,
        prompt_tokens_details=PromptTokensDetails(min(cached)) if cached else UNSET,
        completion_tokens_details=CompletionTokensDetails(thinking) if thinking else UNSET,
    )


def usage_of(answers: Sequence[Answer], readers: Sequence[Reader] = ()) -> Usage:
    totals = [
        totals_of(answer.generation, reader) for answer, reader in zip_longest(answers, readers) if answer is not None
    ]
    return usage_from(len(answers[0].valid.request.input_ids), totals)
