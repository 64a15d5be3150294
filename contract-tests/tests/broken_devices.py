"""Devices with one defect each, and the contract over every one of them: `test_broken_devices` runs this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F

from tgi_contract_tests.device import DeviceContract
from tgi_model_server.device import AttentionShape, Bucket, Device, Forward, KVLayout, MemoryFigures, Norm, StepLimits
from tgi_model_server.parallel import Group, WrappedGroup
from tgi_model_server.plan import StepPlan
from tgi_model_server.reference import ReferenceOps, ReferencePlan, split_heads
from tgi_model_server.step import AttentionPlan, StepInput
from tgi_model_server.testing.devices import ReferenceDevice, StaticDevice

Pair = tuple[torch.Tensor, torch.Tensor]


class SoundDevice(ReferenceDevice):
    """No defect: a place to put one."""


class _WithOps(ReferenceDevice):
    OPS: ClassVar[type[ReferenceOps]] = ReferenceOps

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ops = self.OPS()


class ForgetsTheBias(_WithOps):
    class OPS(ReferenceOps):
        def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return super().linear(x, weight, None if x.shape[0] == 1 else bias)


class RoundsInLinear(_WithOps):
    class OPS(ReferenceOps):
        def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            half = None if bias is None else bias.bfloat16()
            return F.linear(x.bfloat16(), weight.bfloat16(), half).to(x.dtype)


class NormsOverTheWholeRow(_WithOps):
    class OPS(ReferenceOps):
        def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            wide = x.float()
            mean = wide.square().flatten(1).mean(-1).view(-1, *[1] * (x.dim() - 1))
            return (wide * torch.rsqrt(mean + eps)).to(x.dtype) * weight


class DropsTheResidual(_WithOps):
    class OPS(ReferenceOps):
        def linear_add(
            self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
        ) -> torch.Tensor:
            return super().linear_add(x, weight, bias, torch.zeros_like(residual) if len(x) > 1 else residual)


class RotatesNeighbours(_WithOps):
    """Pairs (2i, 2i + 1), the other convention."""

    class OPS(ReferenceOps):
        def rope(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
            def turn(x: torch.Tensor) -> torch.Tensor:
                out, n = x.clone(), 2 * cos.shape[-1]
                one, two = x[..., 0:n:2].float(), x[..., 1:n:2].float()
                out[..., 0:n:2] = one * cos[:, None] - two * sin[:, None]
                out[..., 1:n:2] = two * cos[:, None] + one * sin[:, None]
                return out

            return turn(q), turn(k)


class GatesTheWrongHalf(_WithOps):
    class OPS(ReferenceOps):
        def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
            up, gate = gate_up.float().chunk(2, dim=-1)
            return (F.silu(gate) * up).to(gate_up.dtype)


class NormsAfterTheProduct(_WithOps):
    class OPS(ReferenceOps):
        def norm_linear(
            self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            out = self.linear(x, weight, bias)
            return self.rms_norm(out, torch.ones_like(out[0]), norm.eps)


class LogitsWithoutTheNorm(_WithOps):
    class OPS(ReferenceOps):
        def logits(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor) -> torch.Tensor:
            del norm
            return self.linear(x, weight, None).float()


class ChoosesTheLastOfEquals(_WithOps):
    class OPS(ReferenceOps):
        def greedy(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tokens, sums = super().greedy(logits.flip(-1))
            return logits.shape[-1] - 1 - tokens, sums


class SumsHalfTheVocabulary(_WithOps):
    class OPS(ReferenceOps):
        def greedy(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tokens, _ = super().greedy(logits)
            return tokens, logits[:, : logits.shape[-1] // 2].logsumexp(-1)


class RotatesTheValues(_WithOps):
    """Only in the whole piece; the single operations are sound."""

    class OPS(ReferenceOps):
        def rope_attention(
            self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any
        ) -> torch.Tensor:
            shape = more[3]
            q, k, v = split_heads(qkv.clone(), shape)
            v.copy_(self.rope(v, v, cos, sin)[0])
            turned = torch.cat((q, k, v), dim=1).flatten(1)
            return super().rope_attention(turned, cos, sin, *more, **named)


class NormsInPlace(_WithOps):
    class OPS(ReferenceOps):
        def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            return x.copy_(super().rms_norm(x, weight, eps))


class WritesOneFurther(_WithOps):
    """The last new token of a full page lands in the next page."""

    class OPS(ReferenceOps):
        def write_kv(
            self, k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, plan: AttentionPlan
        ) -> None:
            assert isinstance(plan, ReferencePlan)
            slots, size = plan.cache_slots, plan.layout.page_size
            full = (slots % size == size - 1) & (slots + 1 < k_pool.shape[0] * size)
            super().write_kv(k, v, k_pool, v_pool, replace(plan, cache_slots=slots + full))


class _AttentionOps(ReferenceOps):
    """Attention with a changed plan, heads or window."""

    def change(self, plan: ReferencePlan, window: int | None) -> tuple[ReferencePlan, int | None]:
        return plan, window

    def attention(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        plan: AttentionPlan,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        assert isinstance(plan, ReferencePlan)
        plan, sliding_window = self.change(plan, sliding_window)
        return super().attention(q, k_pool, v_pool, plan, scale=scale, sliding_window=sliding_window)


class IgnoresTheWindow(_WithOps):
    class OPS(_AttentionOps):
        def change(self, plan: ReferencePlan, window: int | None) -> tuple[ReferencePlan, int | None]:
            return plan, None if window == 3 else window


class WindowIsOneTooWide(_WithOps):
    class OPS(_AttentionOps):
        def change(self, plan: ReferencePlan, window: int | None) -> tuple[ReferencePlan, int | None]:
            return plan, None if window is None else window + 1


class ReadsToTheEndOfThePage(_WithOps):
    class OPS(_AttentionOps):
        def change(self, plan: ReferencePlan, window: int | None) -> tuple[ReferencePlan, int | None]:
            size = plan.layout.page_size
            return replace(plan, kv_lens=tuple(-(-length // size) * size for length in plan.kv_lens)), window


class MixesUpHeadGroups(_WithOps):
    """Head h reads KV head h mod kv_heads."""

    class OPS(_AttentionOps):
        def attention(
            self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, plan: AttentionPlan, **more: Any
        ) -> torch.Tensor:
            assert isinstance(plan, ReferencePlan)
            heads = k_pool.shape[2 if plan.layout.order == "NHD" else 1]
            swapped = q.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1, 2)  # type: ignore[no-untyped-call]
            out = super().attention(swapped, k_pool, v_pool, plan, **more)
            back = out.unflatten(1, (heads, -1)).transpose(1, 2).flatten(1, 2)  # type: ignore[no-untyped-call]
            return cast(torch.Tensor, back)


class KeepsThePlansLists(ReferenceDevice):
    def plan_attention(
        self, plan: StepPlan, shape: AttentionShape, layout: KVLayout, bucket: Bucket | None = None
    ) -> ReferencePlan:
        planned = super().plan_attention(plan, shape, layout, bucket)
        return replace(planned, pages=cast(tuple[tuple[int, ...], ...], plan.pages))


class DropsTheLastOddColumn(_WithOps):
    """Its matrix unit works in pairs."""

    class OPS(ReferenceOps):
        def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            out = super().linear(x, weight, bias)
            out[:, out.shape[1] // 2 * 2 :] = 0
            return out


class TakesEveryPageForItsOwn(ReferenceDevice):
    """A page belongs to the first row that names it."""

    def plan_attention(
        self, plan: StepPlan, shape: AttentionShape, layout: KVLayout, bucket: Bucket | None = None
    ) -> ReferencePlan:
        planned, taken = super().plan_attention(plan, shape, layout, bucket), set[int]()
        rows = []
        for pages in planned.pages:
            rows.append(tuple(0 if page in taken else page for page in pages))
            taken.update(pages)
        return replace(planned, pages=tuple(rows))


class _OfRanks(ReferenceDevice):
    GROUP: ClassVar[type[WrappedGroup]] = WrappedGroup

    def collectives(self, group: Group) -> Group:
        return self.GROUP(group)


class AddsNothingUp(_OfRanks):
    class GROUP(WrappedGroup):
        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            return x


class AddsToOtherBits(_OfRanks):
    """Each rank adds in an order of its own."""

    class GROUP(WrappedGroup):
        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            return super().all_reduce(x) * (1 + self.rank * 1e-6)


class KeepsItsOwnProduct(_WithOps, _OfRanks):
    """Where the sum is normed next."""

    class OPS(ReferenceOps):
        def linear_reduce(
            self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *more: Any, normed_next: bool
        ) -> torch.Tensor:
            total = super().linear_reduce(x, weight, bias, *more, normed_next=normed_next)
            return more[0] + self.linear(x, weight, bias) if normed_next else total


class LeavesTheSumUnfinished(_WithOps, _OfRanks):
    """What norms it has it right; what it leaves for later is the sum without the residual."""

    class OPS(ReferenceOps):
        finished: torch.Tensor | None = None

        def linear_reduce(
            self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *more: Any, normed_next: bool
        ) -> torch.Tensor:
            total = super().linear_reduce(x, weight, bias, *more, normed_next=normed_next)
            self.finished = total if normed_next else None
            return total - more[0] if normed_next else total

        def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            finished, self.finished = self.finished, None
            return super().rms_norm(x if finished is None else finished, weight, eps)


class GathersBackwards(_OfRanks):
    class GROUP(WrappedGroup):
        def all_gather(self, x: torch.Tensor) -> torch.Tensor:
            parts = super().all_gather(x).chunk(self.world_size, dim=1)
            return torch.cat(parts[::-1], dim=1)


class KeepsItsOwn(_OfRanks):
    class GROUP(WrappedGroup):
        def broadcast(self, x: torch.Tensor) -> None:
            super().broadcast(x.clone())


class MoreFreeThanThereIs(ReferenceDevice):
    def memory(self) -> MemoryFigures:
        return MemoryFigures(1 << 20, 1 << 30)


class HandsOutUsedMemory(ReferenceDevice):
    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return super().zeros(shape, dtype) + 1


class LacksABucket(StaticDevice):
    """The largest decode step must be padded to a bucket that nobody compiled."""

    def buckets(self, limits: StepLimits) -> Sequence[Bucket]:
        return [bucket for bucket in super().buckets(limits) if bucket.num_rows < limits.max_rows]


class RepeatsTheCapturedStep(StaticDevice):
    """Computes with the inputs that it captured."""

    def capture(self, forward: Forward, example: StepInput, bucket: Bucket) -> Forward:  # noqa: ARG002
        return lambda _step: forward(example)


class _Contract(DeviceContract):
    longest = 60
    head_dims = (16,)
    dtypes = ("float32",)
    defect: ClassVar[type[ReferenceDevice]] = ReferenceDevice
    world_sizes = ()

    def make_device(self) -> Device:
        return self.defect()


DEFECTS = [
    each
    for each in list(globals().values())
    if isinstance(each, type)
    and issubclass(each, ReferenceDevice)
    and each.__module__ == __name__
    and not each.__name__.startswith("_")
]
for _defect in DEFECTS:
    _settings = {"defect": _defect, "world_sizes": (2,) if issubclass(_defect, _OfRanks) else ()}
    globals()[f"Test{_defect.__name__}"] = type(f"Test{_defect.__name__}", (_Contract,), _settings)
