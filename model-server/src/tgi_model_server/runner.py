"""What the step loop drives: a Runner that starts steps, and the StepOutputs it gives. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tgi_gateway.types import Request
from tgi_model_server.kv.pages import PageAllocator
from tgi_model_server.kv.prefix import PrefixCache
from tgi_model_server.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from tgi_model_server.sampling.grammar import Constraint


class DeviceLost(Exception):
    """Raised by a Runner: no further step can run in this process. After any other error the step loop goes on."""


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


@runtime_checkable
class HoldsPages(Protocol):
    """What a Runner may offer besides: its memory is not addressed by pages, so it looks into their accounts."""

    def attach(self, pages: PageAllocator, prefix: PrefixCache | None) -> None:
        """A batcher begins, with nothing cached. From now on these are its accounts; none of another counts."""
        ...
