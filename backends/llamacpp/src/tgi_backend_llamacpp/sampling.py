"""Sampling: from logits to tokens and log-probabilities, each row by its own request's rules. NumPy alone.

The rules, their order and the draws are those of `tgi_gateway.types.SamplingParams`, as in the torch engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt

from tgi_backend_llamacpp import filters
from tgi_backend_llamacpp.filters import Logits, Row
from tgi_gateway.errors import BackendFailed
from tgi_gateway.types import NO_LOGPROB, Request, SamplingParams
from tgi_model_server.plan import StepPlan, StepResult
from tgi_model_server.runner import StepOutput
from tgi_model_server.sampling.grammar import Constraint
from tgi_model_server.sampling.masks import Masks, PendingMasks, RowMasks
from tgi_model_server.sampling.uniform import uniform

NOT_A_NUMBER = "the model computes what is no number: its file is damaged, or its values exceed their type"


@dataclass(slots=True)
class _Slot:
    """What sampling needs to know of the request in a slot."""

    request: Request
    greedy: bool
    plain: bool
    """Its distribution is the model's own."""
    scored: bool
    forbidden_early: npt.NDArray[np.int64]
    """Ids that may not be chosen before `min_new_tokens`."""
    bias_ids: npt.NDArray[np.int64]
    bias: Row
    repeated: npt.NDArray[np.bool_] | None
    """Per token: in prompt or output. None: no penalties."""
    counts: npt.NDArray[np.int32] | None
    """Per token: how often in the output."""


class _Scores:
    """Logits of a step, whose sums wait until a log-probability is asked for: they take longer than all else that there
    is to do between two steps, and can be had beside the next one.
    """

    __slots__ = ("_highest", "_logits", "_sums")

    def __init__(self, logits: Logits, highest: Sequence[float]) -> None:
        """`highest` of each row; rows where it is not finite have no scores."""
        self._logits = logits
        self._highest = highest
        self._sums: dict[int, float] | None = None

    def sum_of(self, row: int) -> float:
        """The logarithm of the row's sum of exponentials."""
        if self._sums is None:
            sound = [row for row, highest in enumerate(self._highest) if isfinite(highest)]
            logits = self._logits if len(sound) == len(self._logits) else self._logits[sound]
            sums = filters.log_sums(logits, [self._highest[row] for row in sound])
            self._sums = dict(zip(sound, sums, strict=True))
        return self._sums[row]

    def of(self, row: int, token: int) -> float:
        """The token's log-probability, of the model's own distribution."""
        score: float = self._logits.item(row, token)
        return score - self.sum_of(row)


class _Score:
    """One of them, as `StepResult.logprobs` may have it."""

    __slots__ = ("_row", "_scores", "_token")

    def __init__(self, scores: _Scores, row: int, token: int) -> None:
        self._scores = scores
        self._row = row
        self._token = token

    def __float__(self) -> float:
        return self._scores.of(self._row, self._token)


class Sampler:
    """The rules of all slots, and the counts that penalties work on. Belongs to the step loop's thread."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._slots: dict[int, _Slot] = {}
        self._masks = Masks(overlap=True)

    def admit(self, slot: int, request: Request, output_ids: Sequence[int], constraint: Constraint | None) -> None:
        """Raises `ValidationError` for a grammar at its limits."""
        sampling = request.sampling
        if constraint is not None:
            self._masks.admit(slot, constraint, request, output_ids)
        penalized = (
            sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
        )
        counts = repeated = None
        if penalized:
            counts = np.bincount(np.asarray(output_ids, np.int64), minlength=self._vocab_size).astype(np.int32)
            repeated = counts > 0
            repeated[np.asarray(request.input_ids, np.int64)] = True
        bias = dict(sampling.logit_bias)
        self._slots[slot] = _Slot(
            request=request,
            greedy=not sampling.do_sample or sampling.temperature <= 0.0,
            plain=not penalized and not bias,
            scored=request.logprobs or request.top_n_tokens > 0,
            forbidden_early=np.array(sorted({*self._eos, *request.stop.stop_token_ids}), np.int64),
            bias_ids=np.array(list(bias), np.int64),
            bias=np.array(list(bias.values()), np.float32),
            repeated=repeated,
            counts=counts,
        )

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)
        self._masks.release(slot)

    def adapter(self, slot: int) -> str | None:
        """The adapter that the slot's request wants."""
        return self._slots[slot].request.adapter_id

    def begin(self, plan: StepPlan) -> PendingMasks | None:
        """Before the step is computed: start what its sampling needs besides. See `Masks.begin`."""
        return self._masks.begin(plan)

    def sampled(self, plan: StepPlan, output: StepOutput) -> None:
        """After `plan` was sampled: `output` is where its tokens are."""
        self._masks.sampled(plan, output)

    def sample(self, logits: Logits, plan: StepPlan, masks: RowMasks | None) -> StepResult:
        """Choose a token for each of `plan.sample_rows`; float32 logits [sampled rows, vocabulary] stay as they are."""
        result = StepResult([], [], endings={} if masks is None else dict(masks.endings))
        forbidden: dict[int, npt.NDArray[np.bool_]] = {}
        if masks is not None:
            assert masks.forbidden is not None, "masks of steps that are done at once come unpacked"
            forbidden = dict(zip(masks.rows, masks.forbidden[:, : self._vocab_size], strict=True))
        best = logits.argmax(1).tolist()
        highest = [logits.item(place) for place in enumerate(best)]
        slots = [self._slots[plan.slots[row]] for row in plan.sample_rows]
        scores: _Scores | None = None
        for index, (row, slot) in enumerate(zip(plan.sample_rows, slots, strict=True)):
            raw = logits[index]
            if not isfinite(highest[index]):  # a maximum is NaN if any is
                result.endings[index] = BackendFailed(NOT_A_NUMBER)
                result.token_ids.append(best[index])
                result.logprobs.append(NO_LOGPROB)
                continue
            allow_eos = plan.allow_eos[index] or plan.slots[row] in self._masks  # masks know what may end their answer
            if slot.plain and slot.greedy and allow_eos and index not in forbidden:
                token: int = best[index]
            else:
                token = self._choose(slot, raw.copy(), forbidden.get(index), allow_eos, plan.output_lens[index])
            result.token_ids.append(token)
            if slot.counts is not None and slot.repeated is not None:
                slot.counts[token] += 1
                slot.repeated[token] = True
            if not slot.scored:
                result.logprobs.append(NO_LOGPROB)
                continue
            # Of a copy, since llama.cpp writes the next step's to where these are.
            scores = scores or _Scores(logits.copy(), highest)
            result.logprobs.append(_Score(scores, index, token))
            if slot.request.top_n_tokens:
                result.top[index] = filters.most_likely(raw, slot.request.top_n_tokens, scores.sum_of(index))
        return result

    def _choose(
        self, slot: _Slot, logits: Row, forbidden: npt.NDArray[np.bool_] | None, allow_eos: bool, output_len: int
    ) -> int:
        sampling = slot.request.sampling
        if slot.bias_ids.size:
            logits[slot.bias_ids] += slot.bias
        if slot.counts is not None and slot.repeated is not None:
            _penalize(logits, sampling, slot.repeated, slot.counts)
        if not allow_eos:
            logits[slot.forbidden_early] = -np.inf
        if forbidden is not None:
            logits[forbidden] = -np.inf
        if slot.greedy:
            return int(logits.argmax())
        logits /= np.float32(sampling.temperature)
        if sampling.top_k > 0:
            filters.top_k(logits, sampling.top_k)
        if sampling.top_p < 1.0:
            filters.top_p(logits, sampling.top_p)
        if sampling.min_p > 0.0:
            filters.min_p(logits, sampling.min_p)
        if sampling.typical_p < 1.0:
            filters.typical_p(logits, sampling.typical_p)
        return filters.draw(logits, uniform(sampling.seed, output_len))


def _penalize(
    logits: Row, sampling: SamplingParams, repeated: npt.NDArray[np.bool_], counts: npt.NDArray[np.int32]
) -> None:
    penalty = np.float32(sampling.repetition_penalty)
    if penalty != 1.0:
        some = logits[repeated]
        logits[repeated] = np.where(some > 0, some / penalty, some * penalty)
    logits -= counts * np.float32(sampling.frequency_penalty)
    logits -= (counts > 0) * np.float32(sampling.presence_penalty)
