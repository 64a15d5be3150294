"""The device: what differs on this chip. It computes on the CPU, and behaves like a chip of static shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from tgi_model_server.device import AttentionShape, Bucket, Forward, KVLayout, MemoryFigures, StepDefaults, StepLimits
from tgi_model_server.parallel import Group, Shard
from tgi_model_server.plan import StepPlan
from tgi_model_server.reference import ReferenceOps, ReferencePlan, reference_plan
from tgi_model_server.step import StepInput


class ToyOps(ReferenceOps):
    """Level 1: what the chip does faster. What is not here runs as in `reference.py`."""

    def pack_linear(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t().contiguous()  # as this chip's matrix unit reads it

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = x.float() @ weight.float()
        return (out if bias is None else out + bias.float()).to(x.dtype)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)


class ToyDevice:
    """`tgi_model_server.device.Device` says what each member means."""

    name = "toychip"
    pipeline_depth = 2
    defaults = StepDefaults(max_rows=8, prefill_tokens=256)
    collective_backend = "gloo"
    kv_dtypes: Sequence[torch.dtype] = ()

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.ops = ToyOps()

    def join(self, shard: Shard) -> None:
        """With --num-shard: take the chip of this rank. Here all ranks share the CPU."""

    def collectives(self, group: Group) -> Group:
        return group

    def default_dtype(self, checkpoint_dtype: torch.dtype, num_parameters: int) -> torch.dtype:  # noqa: ARG002
        return torch.float32

    def memory(self) -> MemoryFigures:
        return MemoryFigures(total=1 << 30, free=1 << 28)

    def peak(self, work: Callable[[], None]) -> int | None:  # noqa: ARG002
        return None  # not known: the engine estimates it

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    # Level 2: how the KV pool lies in memory, and what attention needs to know of a step.

    def kv_layout(self, shape: AttentionShape) -> KVLayout:  # noqa: ARG002
        return KVLayout(page_size=8, order="HND")

    def plan_attention(
        self,
        plan: StepPlan,
        shape: AttentionShape,  # noqa: ARG002
        layout: KVLayout,
        bucket: Bucket | None = None,  # noqa: ARG002
    ) -> ReferencePlan:
        return reference_plan(plan, layout, self.torch_device)

    # Level 3: the shapes that are compiled when the engine starts.

    def buckets(self, limits: StepLimits) -> Sequence[Bucket]:
        rows = {1, 2, 4, limits.max_rows}
        tokens = {limits.max_rows + 32, limits.max_tokens + limits.max_rows}
        decode = [Bucket(each, each) for each in sorted(rows) if each <= limits.max_rows]
        return [*decode, *(Bucket(limits.max_rows + 1, each) for each in sorted(tokens))]

    def prefers_captured(self, plan: StepPlan) -> bool:  # noqa: ARG002
        return True

    def capture(self, forward: Forward, example: StepInput, bucket: Bucket) -> Forward:
        forward(example)  # a real chip compiles here

        def compiled(step: StepInput) -> torch.Tensor:
            if step.input_ids.shape[0] != bucket.num_tokens:
                raise ValueError(f"compiled for {bucket}, called with {step.input_ids.shape[0]} tokens")
            return forward(step)

        return compiled
