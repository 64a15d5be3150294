"""One forward pass, from what the batcher wants (StepPlan) to tensors (StepInput) and back (StepOutput, StepResult)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from tgi_gateway.types import Request
from tgi_model_server.plan import PREVIOUS_TOKEN, StepPlan, StepResult

if TYPE_CHECKING:
    from tgi_model_server.sampling.grammar import Constraint

__all__ = [
    "PREVIOUS_TOKEN",
    "AttentionPlan",
    "DeviceLost",
    "Runner",
    "StepInput",
    "StepOutput",
    "StepPlan",
    "StepResult",
]


class DeviceLost(Exception):
    """Raised by a Runner: no further step can run in this process. After any other error the step loop goes on."""


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


class StepOutput(Protocol):
    """A step under way on the device."""

    def wait(self) -> StepResult:
        """Block until the step is done and its results are on the host.

        An error ends every request of this step and of the steps started after it; `DeviceLost` ends the engine.
        May be called again, with the same outcome.
        """
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

    def admit(
        self, slot: int, request: Request, output_ids: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        """Set up the slot's sampling state; `output_ids` is what it had generated before a preemption.

        `constraint` is what was made of the request's grammar.

        An error fails this request alone: a `GatewayError` with its own text, anything else as a failed generation.
        """
        ...

    def release(self, slot: int) -> None:
        """The slot's sequence ended or was preempted, and no step in flight has it any more."""
        ...

    def run(self, plan: StepPlan) -> StepOutput:
        """Start one step. Rows whose token is `PREVIOUS_TOKEN` use what their slot sampled last.

        Steps take effect in the order of these calls: a row may read pages that an earlier step wrote, even in flight.
        """
        ...
