"""One forward pass, from what the batcher wants (StepPlan) to tensors (StepInput); `runner` has what needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from tgi_model_server.plan import PREVIOUS_TOKEN, StepPlan, StepResult
from tgi_model_server.runner import DeviceLost, Runner, StepOutput
from tgi_model_server.transfer import pinned_copy, to_device

__all__ = [
    "PREVIOUS_TOKEN",
    "AttentionPlan",
    "DeviceLost",
    "Runner",
    "StepInput",
    "StepOutput",
    "StepPlan",
    "StepResult",
    "refill",
    "step_input",
]


class AttentionPlan(Protocol):
    """Made by a Device from a StepPlan; opaque to models, which hand it to the attention op."""


@dataclass(slots=True)
class StepInput:
    """The tensors of one step, on the device."""

    input_ids: torch.Tensor
    """int32 or int64 [num_tokens]; `PREVIOUS_TOKEN` where `slots` tells whose."""
    positions: torch.Tensor
    """int32 or int64 [num_tokens]"""
    last_token: torch.Tensor
    """int32 or int64 [sampled rows]: flat index of each sampled row's last new token."""
    attention: AttentionPlan
    slots: torch.Tensor | None = None
    """int32 [num_tokens]: the slot of each token's row; None where all tokens are known."""
    numbers: torch.Tensor | None = None
    """int32: the one buffer that the others are views of."""
    whole: bool = False
    """Whether the hidden states of all new tokens are wanted, as log-probabilities of prompts need them."""

    @property
    def wanted(self) -> torch.Tensor | None:
        """int32 or int64: flat indices of the tokens whose hidden states are wanted; None: of all, in their order."""
        return None if self.whole or self.last_token.shape[0] == self.input_ids.shape[0] else self.last_token


def step_input(
    plan: StepPlan,
    attention: AttentionPlan,
    device: torch.device,
    *,
    sampled: int | None = None,
    ahead: bool = False,
) -> StepInput:
    """`plan` as tensors, moved in one piece. `sampled` fills up the list of sampled tokens to that length; `ahead`:
    tokens may be `PREVIOUS_TOKEN`.
    """
    numbers = to_device(_numbers(plan, sampled), torch.int32, device)
    tokens, each = plan.num_tokens, _aligned(plan.num_tokens)
    ids, positions, slots = (numbers[start : start + tokens] for start in (0, each, 2 * each))
    last_token = numbers[3 * each :]
    return StepInput(
        ids, positions, last_token, attention, slots if ahead else None, numbers, bool(plan.prompt_targets)
    )


def refill(step: StepInput, plan: StepPlan, attention: AttentionPlan) -> StepInput:
    """`plan`, of the same size, in the tensors of `step`, in the order of the device's work."""
    assert step.numbers is not None, "made by step_input"
    numbers = _numbers(plan, step.last_token.shape[0])
    step.numbers.copy_(pinned_copy(numbers, torch.int32, step.numbers.device), non_blocking=True)
    return replace(step, attention=attention)


def _numbers(plan: StepPlan, sampled: int | None) -> npt.NDArray[np.int32]:
    """Ids, positions and slots of the tokens, and the sampled rows' last tokens; each part but the last aligned."""
    tokens, each = plan.num_tokens, _aligned(plan.num_tokens)
    lens = np.asarray(plan.query_lens, np.int64)
    ends = lens.cumsum()
    last = ends[plan.sample_rows] - 1
    out = np.zeros(3 * each + (len(last) if sampled is None else sampled), np.int32)
    out[:tokens] = plan.token_ids
    # Position of a token: its place in the step, moved by as much as its row begins elsewhere.
    out[each : each + tokens] = np.arange(tokens) + np.repeat(np.asarray(plan.kv_lens, np.int64) - ends, lens)
    out[2 * each : 2 * each + tokens] = np.repeat(np.asarray(plan.slots, np.int64), lens)
    out[3 * each : 3 * each + len(last)] = last
    return out


def _aligned(size: int) -> int:
    """Vector loads need 16 bytes."""
    return -(-size // 4) * 4
