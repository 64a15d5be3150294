"""Sampler: from a step's logits to its tokens and log-probabilities, each row by its own request's rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tgi_gateway.types import Request
from tgi_model_server.plan import StepPlan
from tgi_model_server.reference import ReferenceOps
from tgi_model_server.runner import StepOutput
from tgi_model_server.sampling import filters
from tgi_model_server.sampling.grammar import Constraint
from tgi_model_server.sampling.masks import Masks, PendingMasks, RowMasks
from tgi_model_server.sampling.penalties import TokenCounts
from tgi_model_server.sampling.uniform import uniform
from tgi_model_server.sampling.watermark import Watermark
from tgi_model_server.transfer import to_device


@dataclass(frozen=True, slots=True)
class Sampled:
    """A step's choices, still on the device."""

    tokens: torch.Tensor
    """int64 [sampled rows]"""
    scored: Sequence[int] = ()
    """Indices into `tokens` of those that wanted log-probabilities."""
    logprobs: torch.Tensor | None = None
    """float32 [scored]"""
    top_sizes: Sequence[int] = ()
    """Per scored row: how many of the most likely tokens it wants."""
    top_ids: torch.Tensor | None = None
    """int64 [scored, largest top size], most likely first"""
    top_logprobs: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Slot:
    """What sampling needs to know of the request in a slot."""

    request: Request
    greedy: bool
    penalized: bool
    scored: bool
    forbidden_early: torch.Tensor
    """Ids that may not be chosen before `min_new_tokens`, int64."""
    bias_ids: torch.Tensor | None
    bias: torch.Tensor | None


class Sampler:
    """Per-slot rules and device state: the last token of each slot, and the counts that penalties work on."""

    def __init__(
        self,
        *,
        vocab_size: int,
        max_sequences: int,
        eos_token_ids: Sequence[int],
        device: torch.device,
        watermark: Watermark | None = None,
        greedy: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        peek: bool = True,
    ) -> None:
        """`greedy` is the device's, else the reference's.

        `peek`: looking at a value costs nothing, as steps run in the caller's thread.
        """
        self._peek = peek
        self._greedy = greedy or ReferenceOps().greedy
        self._vocab_size = vocab_size
        # Some models name a padding id of their tokenizer that they have no logit for.
        self._eos = tuple(token for token in eos_token_ids if token < vocab_size)
        self._device = device
        self._slots: dict[int, _Slot] = {}
        self._counts = TokenCounts(max_sequences, vocab_size, device)
        self._watermark = watermark or Watermark(vocab_size, 0.5, 2.0)
        self._masks = Masks(overlap=peek)
        self._batch: _Batch | None = None
        self.last_tokens = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        """int64 [max_sequences]: what each slot sampled last."""

    def admit(
        self, slot: int, request: Request, output_ids: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        """Raises `ValidationError` for a grammar at its limits."""
        assert (constraint is None) == (request.sampling.grammar is None), "a grammar is compiled before it comes here"
        sampling = request.sampling
        if constraint is not None:
            self._masks.admit(slot, constraint, request, output_ids)
        penalized = (
            sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
        )
        if penalized:
            self._counts.reset(slot, request.input_ids, output_ids)
        bias = dict(sampling.logit_bias)
        self._slots[slot] = _Slot(
            request=request,
            greedy=not sampling.do_sample or sampling.temperature <= 0.0,
            penalized=penalized,
            scored=request.logprobs or request.top_n_tokens > 0,
            forbidden_early=self._tensor(sorted({*self._eos, *request.stop.stop_token_ids}), torch.int64),
            bias_ids=self._tensor(list(bias), torch.int64) if bias else None,
            bias=self._tensor(list(bias.values()), torch.float32) if bias else None,
        )
        known = output_ids or request.input_ids
        if known:
            # Not by assignment, which would copy the number from the host and wait for the steps in flight.
            self.last_tokens[slot].fill_(known[-1])
        self._batch = None

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)
        self._masks.release(slot)
        self._batch = None

    def begin(self, plan: StepPlan) -> PendingMasks | None:
        """Before the forward pass of `plan`: start what its sampling needs from the host. See `Masks.begin`."""
        return self._masks.begin(plan)

    def sampled(self, plan: StepPlan, output: StepOutput) -> None:
        """After `plan` was sampled: `output` is where its tokens will be."""
        self._masks.sampled(plan, output)

    def sample(self, logits: torch.Tensor, plan: StepPlan, masks: RowMasks | None = None) -> Sampled:
        """Choose a token for each of `plan.sample_rows`; float32 logits [sampled rows, vocabulary] are overwritten."""
        slots = [plan.slots[row] for row in plan.sample_rows]
        batch = self._batch
        if batch is None or batch.slots != slots:
            batch = self._batch = _Batch(slots, [self._slots[slot] for slot in slots], self._device)
        # Log-probabilities are the model's own, before anything that a request changes.
        best = self._greedy(logits) if batch.scored else None
        raw, changed = logits, masks is not None or batch.changes_logits or not all(plan.allow_eos)
        if changed:
            if batch.scored:
                raw = logits.clone()
            self._process(logits, batch, plan)
            if masks is not None:
                _forbid(logits, masks)
        tokens = self._choose(logits, batch, plan.output_lens, None if changed else best)
        self.last_tokens.index_copy_(0, batch.slot_ids, tokens)
        if batch.penalized is not None:
            self._counts.add(batch.penalized.slot_ids, tokens.index_select(0, batch.penalized.rows))
        if best is None:
            return Sampled(tokens)
        logprobs = batch.of_scored(raw.gather(1, tokens[:, None])[:, 0] - best[1])
        if not batch.largest_top:
            return Sampled(tokens, batch.scored, logprobs)
        top = batch.of_scored(raw).topk(min(batch.largest_top, self._vocab_size), dim=-1)
        top_logprobs = top.values - batch.of_scored(best[1])[:, None]
        return Sampled(tokens, batch.scored, logprobs, batch.top_sizes, top.indices, top_logprobs)

    def _process(self, logits: torch.Tensor, batch: _Batch, plan: StepPlan) -> None:
        """What changes the distribution whether or not the row is greedy, in place."""
        for row in batch.watermarked:
            self._watermark.apply(logits, row, int(self.last_tokens[batch.slots[row]]))
        for row, ids, bias in batch.biased:
            logits[row].index_add_(0, ids, bias)
        if batch.penalized is not None:
            part = batch.penalized
            penalized = self._counts.penalize(
                logits.index_select(0, part.rows), part.slot_ids, part.repetition, part.frequency, part.presence
            )
            logits.index_copy_(0, part.rows, penalized)
        for row, (slot, allowed) in enumerate(zip(batch.slots, plan.allow_eos, strict=True)):
            if not allowed and slot not in self._masks:  # masks know what may end their answer
                logits[row].index_fill_(0, self._slots[slot].forbidden_early, -math.inf)

    def _choose(
        self,
        logits: torch.Tensor,
        batch: _Batch,
        output_lens: Sequence[int],
        best: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """`best`: what `greedy` says of these logits, where that is known."""
        drawn = batch.drawn
        if drawn is None:
            return (best or self._greedy(logits))[0]
        all_drawn = len(drawn.indices) == len(batch.slots)
        chosen = logits if all_drawn else logits.index_select(0, drawn.rows)
        chosen = drawn.filter(chosen / drawn.temperature, self._peek)
        numbers = [uniform(drawn.seeds[i], output_lens[row]) for i, row in enumerate(drawn.indices)]
        picked = filters.draw(chosen, self._tensor(numbers, torch.float64)[:, None])
        if all_drawn:
            return picked
        return (best or self._greedy(logits))[0].index_copy_(0, drawn.rows, picked)

    def _tensor(self, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return to_device(values, dtype, self._device)


class _Batch:
    """The rules of one composition of slots as tensors; kept from step to step while the composition stays."""

    def __init__(self, slots: list[int], rules: list[_Slot], device: torch.device) -> None:
        self.slots = slots
        self.slot_ids = to_device(slots, torch.int64, device)
        self.watermarked = [row for row, rule in enumerate(rules) if rule.request.sampling.watermark]
        self.biased = [
            (row, rule.bias_ids, rule.bias)
            for row, rule in enumerate(rules)
            if rule.bias_ids is not None and rule.bias is not None
        ]
        self.scored = [row for row, rule in enumerate(rules) if rule.scored]
        self.scored_rows = to_device(self.scored, torch.int64, device)
        self.top_sizes = [rules[row].request.top_n_tokens for row in self.scored]
        self.largest_top = max(self.top_sizes, default=0)
        penalized = [row for row, rule in enumerate(rules) if rule.penalized]
        self.penalized = _Penalized(penalized, slots, rules, device) if penalized else None
        self.changes_logits = bool(self.watermarked or self.biased or self.penalized)
        drawn = [row for row, rule in enumerate(rules) if not rule.greedy]
        self.drawn = _Drawn(drawn, rules, device) if drawn else None

    def of_scored(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of `values` that want log-probabilities."""
        return values if len(self.scored) == len(self.slots) else values.index_select(0, self.scored_rows)


class _Penalized:
    def __init__(self, rows: list[int], slots: list[int], rules: list[_Slot], device: torch.device) -> None:
        params = [rules[row].request.sampling for row in rows]
        self.rows = to_device(rows, torch.int64, device)
        self.slot_ids = to_device([slots[row] for row in rows], torch.int64, device)
        self.repetition = _column([each.repetition_penalty for each in params], device)
        self.frequency = _column([each.frequency_penalty for each in params], device)
        self.presence = _column([each.presence_penalty for each in params], device)


@dataclass(frozen=True, slots=True)
class _Filter:
    """The rows, among the drawn ones, that use a filter, and its parameter for each, [rows, 1]."""

    rows: torch.Tensor
    values: torch.Tensor
    everyone: bool
    largest: int = field(default=0)


class _Drawn:
    def __init__(self, rows: list[int], rules: list[_Slot], device: torch.device) -> None:
        params = [rules[row].request.sampling for row in rows]
        self.indices = rows
        self.rows = to_device(rows, torch.int64, device)
        self.seeds = [each.seed for each in params]
        self.temperature = _column([each.temperature for each in params], device)
        # A neutral row is left out rather than filtered with a neutral value, whose rounding might remove a token.
        self._top_k = _filter([float(each.top_k) for each in params], 0.0, device)
        self._top_p = _filter([each.top_p for each in params], 1.0, device)
        self._min_p = _filter([each.min_p for each in params], 0.0, device)
        self._typical_p = _filter([each.typical_p for each in params], 1.0, device)

    def filter(self, logits: torch.Tensor, peek: bool) -> torch.Tensor:
        """float32 logits [drawn rows, vocabulary], already divided by the temperature."""
        if (top_k := self._top_k) is not None:
            logits = _apply(top_k, logits, filters.top_k(_select(top_k, logits), top_k.values.long(), top_k.largest))
        if (top_p := self._top_p) is not None:
            logits = _apply(top_p, logits, filters.top_p(_select(top_p, logits), top_p.values, peek=peek))
        if (min_p := self._min_p) is not None:
            logits = _apply(min_p, logits, filters.min_p(_select(min_p, logits), min_p.values))
        if (typical := self._typical_p) is not None:
            kept = filters.typical_p(_select(typical, logits), typical.values, peek=peek)
            logits = _apply(typical, logits, kept)
        return logits


def _forbid(logits: torch.Tensor, masks: RowMasks) -> None:
    """Set what may not be chosen to -inf in float32 logits [sampled rows, vocabulary], in place."""
    rows, width = len(masks.rows), logits.shape[1]
    if masks.forbidden is not None:
        forbidden = torch.from_numpy(masks.forbidden)[:, :width]
    else:
        # An eighth of the bytes to move, and the device has the time to unpack them.
        packed = to_device(masks.words.view(np.uint8), torch.uint8, logits.device)
        bits = to_device([1, 2, 4, 8, 16, 32, 64, 128], torch.uint8, logits.device)
        forbidden = ((packed[:, :, None] & bits) == 0).view(rows, -1)[:, :width]
    if rows == logits.shape[0]:
        logits.masked_fill_(forbidden, -math.inf)
        return
    index = to_device(masks.rows, torch.int64, logits.device)
    logits.index_copy_(0, index, logits.index_select(0, index).masked_fill_(forbidden, -math.inf))


def _filter(values: list[float], neutral: float, device: torch.device) -> _Filter | None:
    rows = [row for row, value in enumerate(values) if value != neutral]
    if not rows:
        return None
    used = [values[row] for row in rows]
    index = to_device(rows, torch.int64, device)
    return _Filter(index, _column(used, device), len(rows) == len(values), int(max(used)))


def _select(part: _Filter, logits: torch.Tensor) -> torch.Tensor:
    return logits if part.everyone else logits.index_select(0, part.rows)


def _apply(part: _Filter, logits: torch.Tensor, filtered: torch.Tensor) -> torch.Tensor:
    return filtered if part.everyone else logits.index_copy(0, part.rows, filtered)


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return to_device(values, torch.float32, device)[:, None]
