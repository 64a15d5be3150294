"""LlamaRunner: one step is one batch of llama.cpp, prompts and single tokens mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tgi_backend_llamacpp.filters import Logits, Row, log_sums, most_likely
from tgi_backend_llamacpp.native import Context, Indices, Model
from tgi_backend_llamacpp.sampling import Sampler
from tgi_backend_llamacpp.sequences import SequenceMap
from tgi_gateway.errors import ValidationError
from tgi_gateway.types import Request
from tgi_model_server.kv.pages import PageAllocator
from tgi_model_server.kv.prefix import PrefixCache
from tgi_model_server.plan import StepPlan, StepResult
from tgi_model_server.sampling.grammar import Constraint

PAGE_SIZE = 32
"""Tokens; what prefixes are compared by, no unit of llama.cpp's."""
OUTPUT_ROWS = 128
"""Most rows of logits that exist at a time, unless more sequences are decoded at once."""


class LlamaRunner:
    """Implements `runner.Runner` and `runner.HoldsPages`. A step is done when `run` returns."""

    page_size = PAGE_SIZE
    pipeline_depth = 1

    def __init__(
        self,
        model: Model,
        context: Context,
        *,
        num_pages: int,
        max_sequences: int,
        adapters: Mapping[str, Any],
        max_saved_pages: int | None = None,
    ) -> None:
        """`max_saved_pages`: of prefixes that no running request has; see `sequences`."""
        self.num_pages = num_pages
        self.max_sequences = max_sequences
        self._context = context
        self._adapters = adapters
        self._sampler = Sampler(model.vocab_size, model.end_token_ids)
        self._sequences = SequenceMap(context, PAGE_SIZE, max_sequences, max_saved_pages)

    def attach(self, pages: PageAllocator, prefix: PrefixCache | None) -> None:
        self._sequences.attach(pages, prefix)

    def admit(
        self, slot: int, request: Request, output_ids: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        adapter = request.adapter_id
        if adapter is not None and adapter not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise ValidationError(f"there is no adapter `{adapter}`; loaded with --lora-adapters: {known}")
        self._sampler.admit(slot, request, output_ids, constraint)

    def release(self, slot: int) -> None:
        self._sampler.release(slot)
        self._sequences.release(slot)

    def run(self, plan: StepPlan) -> _Done:
        pending = self._sampler.begin(plan)
        try:
            starts = [kv_len - query_len for kv_len, query_len in zip(plan.kv_lens, plan.query_lens, strict=True)]
            self._sequences.prepare(plan.slots, starts, plan.pages)
            logits, prompts = self._compute(plan)
        finally:
            masks = pending() if pending is not None else None
        result = self._sampler.sample(logits, plan, masks) if plan.sample_rows else StepResult([], [])
        result.prompt_logprobs, result.prompt_top = prompts.logprobs, prompts.top
        done = _Done(result)
        if masks is not None:
            self._sampler.sampled(plan, done)
        return done

    def _compute(self, plan: StepPlan) -> tuple[Logits, _PromptScores]:
        """float32 logits [sampled rows, vocabulary], and what is told of prompts."""
        if not self._adapters and not plan.prompt_targets:
            return self._decode_whole(plan), _PromptScores()
        adapters = [self._sampler.adapter(slot) for slot in plan.slots]
        if not plan.prompt_targets and len(set(adapters)) == 1:
            self._use(adapters[0])
            return self._decode_whole(plan), _PromptScores()
        return self._compute_parts(plan, adapters)

    def _decode_whole(self, plan: StepPlan) -> Logits:
        """The plan as it is. Nothing but lists for steps without prompts, which are the many."""
        if plan.is_decode:
            return self._context.decode(plan.token_ids, plan.positions(), plan.slots, plan.sample_rows)
        owners = np.repeat(np.asarray(plan.slots, np.int32), plan.query_lens)
        last = np.cumsum(plan.query_lens)[plan.sample_rows] - 1
        return self._context.decode(plan.token_ids, plan.positions(), owners, last)

    def _compute_parts(self, plan: StepPlan, adapters: Sequence[str | None]) -> tuple[Logits, _PromptScores]:
        """The same with a batch for every adapter, and for every prompt of which all logits are wanted."""
        step = _Flat(plan)
        chosen: dict[int, Row] = {}
        prompts = _PromptScores()
        sampled = set(plan.sample_rows)
        # llama.cpp applies an adapter to a whole batch.
        for adapter in set(adapters):
            rows = [row for row, wanted in enumerate(adapters) if wanted == adapter]
            together = [row for row in rows if row not in plan.prompt_targets]
            if together:
                last = [row for row in together if row in sampled]
                logits = self._decode(adapter, step, step.tokens_of(together), step.ends[last] - 1)
                chosen.update(zip(last, logits.copy(), strict=True))
            for row in rows:
                if row in plan.prompt_targets:
                    chosen[row] = self._read_prompt(adapter, step, row, plan, prompts)
        if not plan.sample_rows:
            return np.empty((0, 0), np.float32), prompts
        return np.stack([chosen[row] for row in plan.sample_rows]), prompts

    def _read_prompt(self, adapter: str | None, step: _Flat, row: int, plan: StepPlan, prompts: _PromptScores) -> Row:
        """The row's last logits; `prompts` learns of its targets, each after the token of the row at its place."""
        targets, wanted = plan.prompt_targets[row], plan.prompt_top.get(row, 0)
        logprobs = prompts.logprobs[row] = []
        top: list[tuple[tuple[int, float], ...]] = []
        if wanted:
            prompts.top[row] = top
        tokens = step.tokens_of([row])
        for begin in range(0, len(tokens), OUTPUT_ROWS):
            piece = tokens[begin : begin + OUTPUT_ROWS]
            logits = self._decode(adapter, step, piece, piece)
            wholes = log_sums(logits, logits.max(1).tolist())
            for scores, whole, target in zip(logits, wholes, targets[begin : begin + len(piece)], strict=False):
                logprobs.append(float(scores[target] - whole))
                if wanted:
                    top.append(most_likely(scores, wanted, whole))
        last: Row = logits[-1].copy()
        return last

    def _decode(self, adapter: str | None, step: _Flat, tokens: Indices, wanted: Indices) -> Logits:
        """The logits at `wanted`, which are some of `tokens`; both are places in the step, ascending."""
        self._use(adapter)
        places = np.searchsorted(tokens, wanted)
        return self._context.decode(step.token_ids[tokens], step.positions[tokens], step.owners[tokens], places)

    def _use(self, adapter: str | None) -> None:
        self._context.use_adapter(None if adapter is None else self._adapters[adapter])


@dataclass(frozen=True, slots=True)
class _PromptScores:
    """Of prompts' tokens, by row: `StepResult.prompt_logprobs` and `StepResult.prompt_top`."""

    logprobs: dict[int, list[float]] = field(default_factory=dict)
    top: dict[int, list[tuple[tuple[int, float], ...]]] = field(default_factory=dict)


class _Flat:
    """A plan's new tokens as arrays, one row after the other."""

    def __init__(self, plan: StepPlan) -> None:
        self.token_ids = np.asarray(plan.token_ids, np.int32)
        self.positions = np.asarray(plan.positions(), np.int32)
        self.owners = np.repeat(np.asarray(plan.slots, np.int32), plan.query_lens)
        self.ends = np.cumsum(plan.query_lens)
        """Per row: the place after its last token."""
        self._starts = self.ends - plan.query_lens

    def tokens_of(self, rows: Sequence[int]) -> Indices:
        return np.concatenate([np.arange(self._starts[row], self.ends[row]) for row in rows])


@dataclass(frozen=True, slots=True)
class _Done:
    """Implements `runner.StepOutput`."""

    result: StepResult

    def wait(self) -> StepResult:
        return self.result
