"""What the host tells a step (StepPlan) and hears from it (StepResult): lists of numbers, no tensors, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import SupportsFloat

from tgi_gateway.errors import GatewayError
from tgi_gateway.types import FinishReason

PREVIOUS_TOKEN = -1
"""In `StepPlan.token_ids`: the token that this row's slot sampled last; its value may still be on the device."""


@dataclass(slots=True)
class StepPlan:
    """What one step computes: host lists, no tensors. A row is one sequence's part of the step.

    Flat lists hold the rows' new tokens one row after the other, ``sum(query_lens)`` in all.
    """

    slots: list[int] = field(default_factory=list)
    """Per row: the sequence's place in per-sequence device state, ``0 .. max_sequences - 1``."""
    query_lens: list[int] = field(default_factory=list)
    """Per row: new tokens, at least 1. Decode rows have 1, prefill rows a chunk."""
    kv_lens: list[int] = field(default_factory=list)
    """Per row: KV length after this step; the new tokens' positions are ``kv_len - query_len .. kv_len - 1``."""
    pages: list[Sequence[int]] = field(default_factory=list)
    """Per row: page ids covering at least `kv_len` tokens. Owned by the sequence: copy, do not keep. As long as a slot
    has the same list, it only grows at its end."""
    token_ids: list[int] = field(default_factory=list)
    """Flat: token ids, or `PREVIOUS_TOKEN`."""
    sample_rows: list[int] = field(default_factory=list)
    """Rows, ascending, whose last new token's logits are sampled."""
    allow_eos: list[bool] = field(default_factory=list)
    """Per sampled row: False while `min_new_tokens` is not reached."""
    output_lens: list[int] = field(default_factory=list)
    """Per sampled row: tokens generated before this one. Seeds the draw, so preemption does not change the outcome."""
    prompt_targets: dict[int, list[int]] = field(default_factory=dict)
    """Row -> the tokens that follow its new tokens in the prompt, where prompt log-probabilities are wanted:
    ``query_len`` of them, or one fewer in the chunk that ends the prompt."""
    prompt_top: dict[int, int] = field(default_factory=dict)
    """Row of `prompt_targets` -> how many most likely tokens are wanted beside each target."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_decode(self) -> bool:
        """Every row has exactly one new token."""
        return len(self.token_ids) == len(self.slots)

    def positions(self) -> list[int]:
        """Flat: position of each new token."""
        out: list[int] = []
        for query_len, kv_len in zip(self.query_lens, self.kv_lens, strict=True):
            out.extend(range(kv_len - query_len, kv_len))
        return out

    def cache_slots(self, page_size: int) -> list[int]:
        """Flat: where each new token's K and V go, ``page * page_size + offset``."""
        out: list[int] = []
        for query_len, kv_len, pages in zip(self.query_lens, self.kv_lens, self.pages, strict=True):
            out.extend(pages[p // page_size] * page_size + p % page_size for p in range(kv_len - query_len, kv_len))
        return out


@dataclass(slots=True)
class StepResult:
    """What a step produced, on the host. Lists follow `StepPlan.sample_rows`."""

    token_ids: list[int]
    logprobs: list[SupportsFloat]
    """NaN for rows that did not ask. They need not be numbers yet: `float` makes one of each before it is told, perhaps
    in another thread, while the next step is computed.
    """
    top: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    """Index into `token_ids` -> most likely tokens with log-probabilities, most likely first."""
    prompt_logprobs: dict[int, list[float]] = field(default_factory=dict)
    """Row -> log-probabilities of `StepPlan.prompt_targets`."""
    prompt_top: dict[int, list[tuple[tuple[int, float], ...]]] = field(default_factory=dict)
    """Row of `StepPlan.prompt_top` -> for each target the most likely tokens, most likely first."""
    endings: dict[int, FinishReason | GatewayError] = field(default_factory=dict)
    """Index into `token_ids` -> how that row's request ends here; its token counts for nothing."""
