"""Masks: which tokens each constrained row of a step may choose, computed on the host while the forward pass runs.

A mask follows the token before it, so that token has to be known here first. Where a step is done when `run` returns
(depth 1), all are known when the next step begins, and a thread computes its masks beside the forward pass. Where a
step is planned while the one before runs (depth 2), the forward pass is started first, then the tokens of the step
before are awaited, which by then are all but there, and only the choice of the new tokens comes after the masks. So
constrained rows are in every step, and the others lose nothing to them: meanwhile the device runs the forward pass.

A mask that cannot be computed ends its own request. A grammar goes before `min_new_tokens` and `ignore_eos`: an answer
that is complete ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from tgi_gateway.errors import GatewayError, ValidationError
from tgi_gateway.types import FinishReason, Request
from tgi_model_server.plan import StepPlan
from tgi_model_server.runner import StepOutput
from tgi_model_server.sampling.grammar import Constraint, Words, clear

_THREAD_WORDS = 1 << 14
"""Masks of fewer words in all are computed sooner than another thread wakes up."""
_PARALLEL_ROWS = 8
"""Fewer masks are computed one after the other: a mask takes about 20 us, waking the other threads as much."""


@dataclass(frozen=True, slots=True)
class RowMasks:
    """The masks of one step."""

    rows: Sequence[int]
    """Indices of the constrained rows among the sampled ones."""
    words: Words
    """int32 [rows, words], one bit per token: may be chosen."""
    endings: dict[int, FinishReason | GatewayError]
    """Index among the sampled rows -> how its request ends instead of taking a token. Its mask allows everything."""
    forbidden: npt.NDArray[np.bool_] | None = None
    """bool [rows, at least the vocabulary]: the inverse of `words`, where the host may as well unpack them."""


@dataclass(slots=True)
class _Slot:
    constraint: Constraint
    preferred: Words | None
    """Tokens to choose from, as long as the grammar leaves any; None: all."""
    preferred_early: Words
    """The same before `min_new_tokens`."""
    awaited: tuple[StepOutput, int] | None = field(default=None)
    """Where the token is that the constraint has to see next: a step and an index among its sampled rows."""


PendingMasks: TypeAlias = Callable[[], RowMasks]
"""Gives the masks. To be called once, whatever happens to the step."""


class Masks:
    """The constraints of all slots. Its methods are called from the step loop's thread."""

    def __init__(self, *, overlap: bool) -> None:
        """`overlap`: when a step begins, the one before is done, so its masks need not wait for anything."""
        self._overlap = overlap
        self._slots: dict[int, _Slot] = {}

    def admit(self, slot: int, constraint: Constraint, request: Request, output_ids: Sequence[int]) -> None:
        """Raises `ValidationError` if the grammar cannot follow what was generated."""
        constraint.advance(output_ids)
        error = constraint.error
        if error is not None:
            raise ValidationError(f"the grammar cannot be followed further: {error}")
        vocabulary = constraint.vocabulary
        without_eos = vocabulary.producible.copy()
        clear(without_eos, vocabulary.eos_token_ids)
        early = without_eos.copy()
        clear(early, request.stop.stop_token_ids)
        self._slots[slot] = _Slot(constraint, without_eos if request.stop.ignore_eos else None, early)

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def begin(self, plan: StepPlan) -> PendingMasks | None:
        """Start computing the masks of `plan`, before its forward pass; None if no row needs one."""
        if not self._slots:
            return None
        wanted: list[tuple[int, _Slot, bool]] = []
        for index, (row, allow_eos) in enumerate(zip(plan.sample_rows, plan.allow_eos, strict=True)):
            state = self._slots.get(plan.slots[row])
            if state is not None:
                wanted.append((index, state, allow_eos))
        if not wanted:
            return None
        if not self._overlap:
            return lambda: self._compute(wanted)
        if len(wanted) * wanted[0][1].constraint.vocabulary.words < _THREAD_WORDS:
            masks = self._compute(wanted)
            return lambda: masks
        future: Future[RowMasks] = self._thread.submit(self._compute, wanted)
        return future.result

    def sampled(self, plan: StepPlan, output: StepOutput) -> None:
        """The tokens of `plan` will be in `output`."""
        if not self._slots:
            return
        for index, row in enumerate(plan.sample_rows):
            state = self._slots.get(plan.slots[row])
            if state is not None:
                state.awaited = (output, index)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(max(1, min(8, (os.cpu_count() or 1) // 2)))

    def _compute(self, wanted: Sequence[tuple[int, _Slot, bool]]) -> RowMasks:
        masks = np.full((len(wanted), wanted[0][1].constraint.vocabulary.words), -1, np.int32)
        endings: dict[int, FinishReason | GatewayError] = {}
        live: list[int] = []
        for place, (_, state, _) in enumerate(wanted):
            if self._catch_up(state) and not state.constraint.matcher.is_error():
                live.append(place)
        if len(live) < _PARALLEL_ROWS:
            for place in live:
                fill_next_token_bitmask(wanted[place][1].constraint.matcher, masks, place)
        else:
            fill_next_token_bitmask_par(
                self._executor, [(wanted[place][1].constraint.matcher, place) for place in live], masks
            )
        masks &= wanted[0][1].constraint.vocabulary.producible
        possible: list[bool] = np.any(masks, axis=1).tolist()
        for place, (index, state, allow_eos) in enumerate(wanted):
            matcher = state.constraint.matcher
            if matcher.is_error() or not possible[place]:
                endings[index] = _ending(state.constraint)
                masks[place] = -1
                continue
            preferred = state.preferred if allow_eos else state.preferred_early
            if preferred is not None:
                kept = masks[place] & preferred
                if kept.any():
                    masks[place] = kept
        forbidden = None
        if self._overlap:
            forbidden = np.unpackbits(~masks.view(np.uint8), axis=1, bitorder="little").view(np.bool_)
        return RowMasks([index for index, _, _ in wanted], masks, endings, forbidden)

    def _catch_up(self, state: _Slot) -> bool:
        """Let the constraint see the token that was sampled last. False if that ended the request."""
        awaited, state.awaited = state.awaited, None
        if awaited is not None:
            output, index = awaited
            result = output.wait()
            if index in result.endings:
                return False
            state.constraint.push(result.token_ids[index : index + 1])
        return True


def _ending(constraint: Constraint) -> FinishReason | GatewayError:
    """How a request ends whose grammar leaves no token."""
    error = constraint.error
    if error is None and constraint.matcher.is_accepting():
        return "eos_token"  # complete, and the model has no token to say so
    return ValidationError(f"the grammar cannot be followed further: {error or 'no token of this model continues it'}")
