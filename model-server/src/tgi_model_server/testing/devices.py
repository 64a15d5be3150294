"""Devices for tests: the oracle, and one that can only run a few static shapes, as ahead-of-time compilers do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tgi_model_server.device import AttentionShape, Bucket, Forward, KVLayout, MemoryFigures, StepDefaults, StepLimits
from tgi_model_server.parallel import Group, Shard, WrappedGroup
from tgi_model_server.plan import StepPlan
from tgi_model_server.reference import ReferenceOps, ReferencePlan, reference_plan
from tgi_model_server.step import StepInput


@dataclass
class ReferenceDevice:
    """Runs `ReferenceOps` in whatever layout it is told."""

    layout: KVLayout = field(default_factory=lambda: KVLayout(4, "HND"))
    memory_bytes: int = 1 << 26
    name: str = "reference"
    pipeline_depth: int = 1
    collective_backend: str = "gloo"
    kv_dtypes: Sequence[torch.dtype] = (torch.float8_e4m3fn, torch.float8_e5m2)
    defaults: StepDefaults = field(default_factory=StepDefaults)

    def __post_init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.ops = ReferenceOps()

    def join(self, shard: Shard) -> None:
        del shard

    def collectives(self, group: Group) -> Group:
        return group

    def default_dtype(self, checkpoint_dtype: torch.dtype, num_parameters: int) -> torch.dtype:
        del checkpoint_dtype, num_parameters
        return torch.float32

    def memory(self) -> MemoryFigures:
        return MemoryFigures(self.memory_bytes, self.memory_bytes)

    def peak(self, work: Callable[[], None]) -> int | None:
        del work
        return None

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def kv_layout(self, shape: AttentionShape) -> KVLayout:
        del shape
        return self.layout

    def plan_attention(
        self, plan: StepPlan, shape: AttentionShape, layout: KVLayout, bucket: Bucket | None = None
    ) -> ReferencePlan:
        del shape, bucket
        return reference_plan(plan, layout, self.torch_device)

    def buckets(self, limits: StepLimits) -> Sequence[Bucket]:
        del limits
        return ()

    def prefers_captured(self, plan: StepPlan) -> bool:
        del plan
        return True

    def capture(self, forward: Forward, example: StepInput, bucket: Bucket) -> Forward:
        del example, bucket
        return forward


@dataclass
class StaticDevice(ReferenceDevice):
    """Two steps in flight, and a few shapes: anything else raises, as a compiled program would."""

    layout: KVLayout = field(default_factory=lambda: KVLayout(8, "NHD"))
    name: str = "static"
    pipeline_depth: int = 2
    runs: list[Bucket] = field(default_factory=list)
    """The buckets that ran, in order."""

    def buckets(self, limits: StepLimits) -> Sequence[Bucket]:
        decode = [Bucket(rows, rows) for rows in _doubling(1, limits.max_rows)]
        prefill = [Bucket(limits.max_rows + 1, tokens) for tokens in _doubling(32, limits.max_tokens + limits.max_rows)]
        return [*decode, *prefill]

    def capture(self, forward: Forward, example: StepInput, bucket: Bucket) -> Forward:
        forward(example)

        def compiled(step: StepInput) -> torch.Tensor:
            assert isinstance(step.attention, ReferencePlan)
            shapes = (step.input_ids.shape[0], step.positions.shape[0], len(step.attention.query_lens))
            if shapes != (bucket.num_tokens, bucket.num_tokens, bucket.num_rows):
                raise ValueError(f"compiled for {bucket}, called with {shapes}")
            if step.last_token.shape[0] != bucket.num_rows:
                raise ValueError(f"compiled for {bucket.num_rows} sampled rows, called with {step.last_token.shape[0]}")
            self.runs.append(bucket)
            return forward(step)

        return compiled


def _doubling(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... and the first one that reaches `last`."""
    out = [first]
    while out[-1] < last:
        out.append(out[-1] * 2)
    return out


@dataclass
class MeasuredDevice(ReferenceDevice):
    """Has the largest steps run, to see what they need, and finds that it is `step_bytes`."""

    step_bytes: int = 1 << 20
    measured: list[StepPlan] = field(default_factory=list)
    """What ran then."""
    measuring: bool = False

    def peak(self, work: Callable[[], None]) -> int | None:
        self.measuring = True
        work()
        self.measuring = False
        return self.step_bytes

    def plan_attention(
        self, plan: StepPlan, shape: AttentionShape, layout: KVLayout, bucket: Bucket | None = None
    ) -> ReferencePlan:
        if self.measuring:
            self.measured.append(plan)
        return super().plan_attention(plan, shape, layout, bucket)


class SmallerOnRank1(MeasuredDevice):
    """Of several ranks, the second has a sixteenth of the memory."""

    def join(self, shard: Shard) -> None:
        self.memory_bytes //= 16 if shard.rank == 1 else 1


class BrokenOnRank1(ReferenceDevice):
    """Of several ranks, the second has no memory at all, and fails rather than say so."""

    def join(self, shard: Shard) -> None:
        if shard.rank == 1:
            self.memory_bytes = 0

    def memory(self) -> MemoryFigures:
        if not self.memory_bytes:
            raise RuntimeError("no memory was found")
        return super().memory()


class HotOnRank1(ReferenceDevice):
    """Of several ranks, the second breaks at the first sequence of 64 tokens."""

    rank: int = 0

    def join(self, shard: Shard) -> None:
        self.rank = shard.rank

    def plan_attention(
        self, plan: StepPlan, shape: AttentionShape, layout: KVLayout, bucket: Bucket | None = None
    ) -> ReferencePlan:
        if self.rank == 1 and max(plan.kv_lens) >= 64:
            raise RuntimeError("the chip is too hot")
        return super().plan_attention(plan, shape, layout, bucket)


class _DeafGroup(WrappedGroup):
    """After a thousand sums waits for ever, as a chip does for a rank that never comes, unless it is told to stop."""

    def __init__(self, inner: Group) -> None:
        super().__init__(inner)
        self._sums = 0
        self._told = threading.Event()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._sums += 1
        if self._sums > 1000 and not self._told.wait(60):
            raise AssertionError("nobody told")
        return self._inner.all_reduce(x)

    def abort(self) -> None:
        self._told.set()
        self._inner.abort()


class DeafOnRank0(ReferenceDevice):
    """Of several ranks, the first hangs in an exchange after a while."""

    def collectives(self, group: Group) -> Group:
        return _DeafGroup(group) if group.rank == 0 else group
