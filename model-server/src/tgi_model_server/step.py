"""One forward pass, from what the batcher wants (StepPlan) to tensors (StepInput) and back (StepOutput, StepResult)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tgi_gateway.types import Request

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
    """Per row: page ids covering at least `kv_len` tokens. Owned by the sequence: copy, do not keep."""
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


class AttentionPlan(Protocol):
    """Made by a Device from a StepPlan; opaque to models, which hand it to the attention op."""


@dataclass(slots=True)
class StepInput:
    """The tensors of one step, on the device."""

    input_ids: torch.Tensor
    """int64 [num_tokens]"""
    positions: torch.Tensor
    """int64 [num_tokens]"""
    last_token: torch.Tensor
    """int64 [sampled rows]: flat index of each sampled row's last new token."""
    attention: AttentionPlan


@dataclass(slots=True)
class StepResult:
    """What a step produced, on the host. Lists follow `StepPlan.sample_rows`."""

    token_ids: list[int]
    logprobs: list[float]
    """NaN for rows that did not ask."""
    top: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    """Index into `token_ids` -> most likely tokens with log-probabilities, most likely first."""
    prompt_logprobs: dict[int, list[float]] = field(default_factory=dict)
    """Row -> log-probabilities of `StepPlan.prompt_targets`."""


class StepOutput(Protocol):
    """A step under way on the device."""

    def wait(self) -> StepResult:
        """Block until the step is done and its results are on the host."""
        ...


class Runner(Protocol):
    """What the step loop drives: a model with its KV pool and sampler. All calls come from the loop's thread."""

    @property
    def page_size(self) -> int: ...

    @property
    def num_pages(self) -> int:
        """Pages of the pool, ids ``0 .. num_pages - 1``. Page 0 is never given to a sequence: padding writes there."""
        ...

    @property
    def max_sequences(self) -> int:
        """Slots of per-sequence state."""
        ...

    @property
    def pipeline_depth(self) -> int:
        """Steps that may be in flight; 1 means `run` returns a finished step."""
        ...

    def admit(self, slot: int, request: Request, output_ids: Sequence[int]) -> None:
        """Set up the slot's sampling state; `output_ids` is what it had generated before a preemption."""
        ...

    def release(self, slot: int) -> None:
        """The slot's sequence ended or was preempted."""
        ...

    def run(self, plan: StepPlan) -> StepOutput:
        """Start one step. Rows whose token is `PREVIOUS_TOKEN` use what their slot sampled last."""
        ...
