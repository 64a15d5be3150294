"""DeviceContract: every operation of a Device against the reference in float32, and its plans, buckets and figures.

Needs torch and the model server: ``pip install "tgi-contract-tests[device]"``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from tgi_contract_tests.known import KnownFailures
from tgi_contract_tests.rules import DeviceRule, broken_device
from tgi_model_server.buckets import choose_bucket, pad_plan
from tgi_model_server.device import AttentionShape, Bucket, Device, HeadNorms, KVLayout, Norm, StepLimits
from tgi_model_server.plan import StepPlan
from tgi_model_server.reference import ReferenceOps, reference_plan
from tgi_model_server.step import AttentionPlan, StepInput, refill, step_input

CPU = torch.device("cpu")
REFERENCE = ReferenceOps()
TOKENS = (1, 7, 33)
DTYPES = ("float32", "bfloat16", "float16")
STALE = 64.0
"""What lies in pages that a row may not read: large enough to be seen in any result, small enough for float16."""


class DeviceContract(KnownFailures):
    """Override `make_device`; name the class ``Test...``."""

    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    """What the device computes in."""
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 3e-3}
    """Largest error against the reference in float32, relative to the largest value of the result."""
    head_dims: ClassVar[tuple[int, ...]] = (16, 64, 128)
    longest: ClassVar[int] = 700
    """KV length of the longest row in the attention tests."""

    def make_device(self) -> Device:
        raise NotImplementedError("override make_device")

    @pytest.fixture
    def device(self) -> Device:
        return self.make_device()

    @pytest.fixture(params=DTYPES)
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        if request.param not in self.dtypes:
            pytest.skip(f"not among the class's `dtypes`: {request.param}")
        dtype = getattr(torch, request.param)
        assert isinstance(dtype, torch.dtype)
        return dtype

    # Figures.

    def test_memory_figures_are_bytes_of_this_device(self, device: Device) -> None:
        memory = device.memory()
        self.demand(0 < memory.free <= memory.total, "memory-figures", f"{memory}")

    def test_facts_are_of_the_known_kinds(self, device: Device) -> None:
        self.demand(bool(device.name) and bool(device.collective_backend), "facts", "an empty name")
        self.demand(device.pipeline_depth in (1, 2), "facts", f"pipeline_depth is {device.pipeline_depth}")
        chosen = device.default_dtype(torch.bfloat16, 1_000_000)
        self.demand(str(chosen).removeprefix("torch.") in self.dtypes, "facts", f"default_dtype is {chosen}")

    def test_kv_layout_is_one_that_the_pool_can_make(self, device: Device, dtype: torch.dtype) -> None:
        layout = device.kv_layout(_shape(dtype))
        self.demand(layout.page_size >= 1 and layout.order in ("NHD", "HND"), "kv-layout", f"{layout}")

    def test_pool_memory_is_zero_and_can_be_written(self, device: Device, dtype: torch.dtype) -> None:
        pools = [device.zeros((3, 5, 2, 7), dtype) for _ in range(2)]
        for pool in pools:
            right = pool.shape == (3, 5, 2, 7) and pool.dtype == dtype and pool.device.type == device.torch_device.type
            self.demand(right, "kv-layout", f"zeros gave {pool.dtype} {list(pool.shape)} on {pool.device}")
            self.demand(not pool.any(), "kv-layout", "zeros gave memory that is not zero")
            pool.fill_(1)
        pools[0].zero_()
        self.demand(bool((pools[1] == 1).all()), "kv-layout", "zeros gave the same memory twice")

    # Operations.

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_linear(self, device: Device, dtype: torch.dtype, tokens: int, has_bias: bool) -> None:
        x, weight = _random(dtype, tokens, 96), _random(dtype, 80, 96)
        bias = _random(dtype, 80) if has_bias else None
        packed = device.ops.pack_linear(_to(device, weight))
        found = device.ops.linear(_to(device, x), packed, None if bias is None else _to(device, bias))
        wanted = REFERENCE.linear(x.float(), weight.float(), None if bias is None else bias.float())
        self.check_close(found, wanted, dtype, "linear")

    @pytest.mark.parametrize("tokens", TOKENS)
    def test_rms_norm(self, device: Device, dtype: torch.dtype, tokens: int) -> None:
        x, weight = _random(dtype, tokens, 96) * 3, _random(dtype, 96)
        found = device.ops.rms_norm(_to(device, x), _to(device, weight), 1e-5)
        self.check_close(found, REFERENCE.rms_norm(x.float(), weight.float(), 1e-5), dtype, "rms_norm")

    @pytest.mark.parametrize("tokens", TOKENS)
    def test_rms_norm_of_heads(self, device: Device, dtype: torch.dtype, tokens: int) -> None:
        """As Qwen3 norms its queries: three dimensions, a view into the stacked projection."""
        stacked, weight = _random(dtype, tokens, 4 * 16 + 32), _random(dtype, 16)
        heads = _to(device, stacked)[:, :64].view(tokens, 4, 16)
        wanted = REFERENCE.rms_norm(stacked[:, :64].reshape(tokens, 4, 16).float(), weight.float(), 1e-5)
        self.check_close(device.ops.rms_norm(heads, _to(device, weight), 1e-5), wanted, dtype, "rms_norm of heads")

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_linear_add(self, device: Device, dtype: torch.dtype, tokens: int, has_bias: bool) -> None:
        x, weight, residual = _random(dtype, tokens, 96), _random(dtype, 80, 96), _random(dtype, tokens, 80)
        bias = _random(dtype, 80) if has_bias else None
        packed = device.ops.pack_linear(_to(device, weight))
        theirs = None if bias is None else _to(device, bias)
        found = device.ops.linear_add(_to(device, x), packed, theirs, _to(device, residual))
        ours = None if bias is None else bias.float()
        wanted = REFERENCE.linear_add(x.float(), weight.float(), ours, residual.float())
        self.check_close(found, wanted, dtype, "linear_add")

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_norm_linear(self, device: Device, dtype: torch.dtype, tokens: int, has_bias: bool) -> None:
        x, factor, weight = _random(dtype, tokens, 96) * 3, _random(dtype, 96), _random(dtype, 80, 96)
        bias = _random(dtype, 80) if has_bias else None
        packed = device.ops.pack_linear(_to(device, weight))
        theirs = None if bias is None else _to(device, bias)
        found = device.ops.norm_linear(_to(device, x), Norm(_to(device, factor), 1e-5), packed, theirs)
        ours = None if bias is None else bias.float()
        wanted = REFERENCE.norm_linear(x.float(), Norm(factor.float(), 1e-5), weight.float(), ours)
        self.check_close(found, wanted, dtype, "norm_linear")

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_norm_gated(self, device: Device, dtype: torch.dtype, tokens: int, has_bias: bool) -> None:
        x, factor, weight = _random(dtype, tokens, 96), _random(dtype, 96), _random(dtype, 160, 96) / 4
        bias = _random(dtype, 160) if has_bias else None
        packed = device.ops.pack_linear(_to(device, weight))
        theirs = None if bias is None else _to(device, bias)
        found = device.ops.norm_gated(_to(device, x), Norm(_to(device, factor), 1e-5), packed, theirs)
        ours = None if bias is None else bias.float()
        wanted = REFERENCE.norm_gated(x.float(), Norm(factor.float(), 1e-5), weight.float(), ours)
        self.check_close(found, wanted, dtype, "norm_gated")

    @pytest.mark.parametrize("rows", TOKENS)
    def test_logits(self, device: Device, dtype: torch.dtype, rows: int) -> None:
        x, factor, weight = _random(dtype, rows, 96) * 3, _random(dtype, 96), _random(dtype, 300, 96)
        packed = device.ops.pack_linear(_to(device, weight))
        found = device.ops.logits(_to(device, x), Norm(_to(device, factor), 1e-5), packed)
        self.demand(found.dtype == torch.float32, "ops", f"logits are {found.dtype}; float32 is needed")
        wanted = REFERENCE.logits(x.float(), Norm(factor.float(), 1e-5), weight.float())
        self.check_close(found, wanted, dtype, "logits")

    @pytest.mark.parametrize("rows", TOKENS)
    def test_argmax_takes_the_first_of_the_largest(self, device: Device, rows: int) -> None:
        logits = torch.randint(0, 50, (rows, 5003), generator=_generator()).float()
        found = device.ops.argmax(_to(device, logits))
        self.demand(found.dtype == torch.int64, "ops", f"argmax gave {found.dtype}")
        first = [row.tolist().index(row.max().item()) for row in logits]
        self.demand(found.tolist() == first, "ops", f"argmax gave {found.tolist()} instead of {first}")

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("rotary_dim", [16, 8])
    def test_rope(self, device: Device, dtype: torch.dtype, tokens: int, rotary_dim: int) -> None:
        stacked = _random(dtype, tokens, 6 * 16 + 24)  # q and k are views into the stacked projection
        angles = torch.arange(tokens)[:, None] * torch.rand(rotary_dim // 2, generator=_generator())[None, :]
        cos, sin = angles.cos(), angles.sin()

        def split(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return source[:, :64].view(tokens, 4, 16), source[:, 64:96].view(tokens, 2, 16)

        q, k = split(_to(device, stacked))
        found = device.ops.rope(q, k, _to(device, cos), _to(device, sin))
        wanted = REFERENCE.rope(*split(stacked.float()), cos, sin)
        for one, other, name in zip(found, wanted, ("q", "k"), strict=True):
            self.check_close(one, other, dtype, f"rope of {name}")

    @pytest.mark.parametrize("tokens", TOKENS)
    def test_silu_mul(self, device: Device, dtype: torch.dtype, tokens: int) -> None:
        gate_up = _random(dtype, tokens, 160) * 4
        found = device.ops.silu_mul(_to(device, gate_up))
        self.check_close(found, REFERENCE.silu_mul(gate_up.float()), dtype, "silu_mul")

    def test_operations_leave_their_inputs_alone(self, device: Device, dtype: torch.dtype) -> None:
        """All but the residual of linear_add, which may be overwritten, and the pools of write_kv, which must."""
        x, weight = _to(device, _random(dtype, 7, 96)), _to(device, _random(dtype, 96))
        packed = device.ops.pack_linear(_to(device, _random(dtype, 80, 96)))
        kept = x.clone()
        device.ops.rms_norm(x, weight, 1e-5)
        device.ops.silu_mul(x)
        device.ops.linear(x, packed, None)
        device.ops.linear_add(x, packed, None, _to(device, _random(dtype, 7, 80)))
        device.ops.norm_linear(x, Norm(weight, 1e-5), packed, None)
        device.ops.norm_gated(x, Norm(weight, 1e-5), packed, None)
        device.ops.logits(x, Norm(weight, 1e-5), packed)
        self.demand(torch.equal(x, kept), "ops", "an operation changed its input")

    # Attention.

    def test_write_kv_changes_the_named_slots_and_no_other(self, device: Device, dtype: torch.dtype) -> None:
        shape = _shape(dtype)
        layout = device.kv_layout(shape)
        plan = _plan(layout.page_size, [(1, layout.page_size + 1), (5, 5), (layout.page_size, 2 * layout.page_size)])
        pools = _pools(layout, shape, _num_pages(plan))
        new = [_random(dtype, plan.num_tokens, shape.num_kv_heads, shape.head_dim) for _ in range(2)]
        theirs = [_to(device, pool) for pool in pools]
        with torch.inference_mode():
            device.ops.write_kv(
                _to(device, new[0]),
                _to(device, new[1]),
                theirs[0],
                theirs[1],
                device.plan_attention(plan, shape, layout),
            )
        REFERENCE.write_kv(new[0], new[1], pools[0], pools[1], reference_plan(plan, layout, CPU))
        for found, wanted, name in zip(theirs, pools, ("keys", "values"), strict=True):
            self.demand(torch.equal(found.cpu(), wanted), "attention", f"the pool of {name} differs after write_kv")

    def test_attention_at_each_length(self, device: Device, dtype: torch.dtype) -> None:
        """One row: decoded, prefilled whole, and the second half of a prompt."""
        shape = _shape(dtype)
        page = device.kv_layout(shape).page_size
        for length in sorted({1, 7, page - 1, page, page + 1, self.longest} - {0}):
            for new in sorted({1, length, (length + 1) // 2}):
                self.check_attention(device, [(new, length)], shape)

    @pytest.mark.parametrize("seed", range(4))
    def test_attention_of_mixed_rows(self, device: Device, dtype: torch.dtype, seed: int) -> None:
        """Decode rows, whole prompts and chunks together, over scattered pages."""
        draw = random.Random(seed)
        rows = []
        for _ in range(draw.choice((2, 5, 9))):
            kv_len = draw.choice((draw.randint(1, 20), draw.randint(1, self.longest)))
            rows.append((draw.choice((1, 1, draw.randint(1, kv_len))), kv_len))
        self.check_attention(device, rows, _shape(dtype))

    def test_attention_of_many_decode_rows(self, device: Device, dtype: torch.dtype) -> None:
        draw = random.Random(0)
        self.check_attention(device, [(1, draw.randint(1, self.longest)) for _ in range(31)], _shape(dtype))

    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
    def test_attention_of_head_groups(self, device: Device, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
        shape = replace(_shape(dtype), num_heads=heads, num_kv_heads=kv_heads)
        self.check_attention(device, [(1, 40), (9, 30), (5, 5)], shape)

    def test_attention_of_head_dims(self, device: Device, dtype: torch.dtype) -> None:
        for head_dim in self.head_dims:
            self.check_attention(device, [(1, 40), (9, 30)], replace(_shape(dtype), head_dim=head_dim))

    def test_attention_in_a_sliding_window(self, device: Device, dtype: torch.dtype) -> None:
        shape = _shape(dtype)
        page = device.kv_layout(shape).page_size
        for window in sorted({1, 3, page, page + 1, 10 * self.longest}):
            rows = [(1, self.longest), (9, 3 * page), (page + 5, page + 5), (1, 2)]
            self.check_attention(device, rows, shape, window)

    def test_a_plan_may_be_changed_after_it_was_handed_over(self, device: Device, dtype: torch.dtype) -> None:
        """Its lists belong to the sequences, which grow while the step runs."""
        shape = _shape(dtype)
        layout = device.kv_layout(shape)
        plan = _plan(layout.page_size, [(1, layout.page_size + 3), (4, 4)])
        wanted = self._attend(device, plan, shape, None)

        def spoil(handed: StepPlan) -> None:
            for pages in handed.pages:
                assert isinstance(pages, list)
                pages[:] = [0] * len(pages)
            handed.kv_lens[:] = [1] * len(handed.kv_lens)

        copy = replace(plan, pages=[list(pages) for pages in plan.pages], kv_lens=list(plan.kv_lens))
        found = self._attend(device, copy, shape, None, after_planning=spoil)
        self.check_close(found, wanted, dtype, "attention after the plan's lists had changed", rule="plan")

    def test_padding_rows_change_nothing(self, device: Device, dtype: torch.dtype) -> None:
        shape = _shape(dtype)
        page = device.kv_layout(shape).page_size
        plan = _plan(page, [(1, page + 1), (1, 5), (1, 2 * page)])
        padded = pad_plan(plan, Bucket(8, 8), page)
        found = self._attend(device, padded, shape, None)[: plan.num_tokens]
        self.check_close(
            found, self._attend(device, plan, shape, None), dtype, "attention beside padding", rule="buckets"
        )

    @pytest.mark.parametrize("normed", [False, True])
    @pytest.mark.parametrize("rotary_dim", [16, 8])
    def test_rope_attention(self, device: Device, dtype: torch.dtype, normed: bool, rotary_dim: int) -> None:
        """The whole way from the stacked projection to the attended heads, for rows of all kinds and for few rows."""
        shape = _shape(dtype)
        layout = device.kv_layout(shape)
        page, width = layout.page_size, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        for rows in ([(1, 1)], [(1, page), (1, page + 1), (1, 3)], [(1, 9)] * 9, [(1, 40), (9, 30), (5, 5)]):
            plan = _plan(page, rows)
            tokens = plan.num_tokens
            _, _, _, pools = _layer(plan, shape, layout)
            qkv, factors = _random(dtype, tokens, width), [_random(dtype, shape.head_dim, seed=seed) for seed in (5, 6)]
            angles = torch.arange(tokens)[:, None] * torch.rand(rotary_dim // 2, generator=_generator())[None, :]
            theirs = [_to(device, pool) for pool in pools]
            with torch.inference_mode():
                found = device.ops.rope_attention(
                    _to(device, qkv),
                    _to(device, angles.cos()),
                    _to(device, angles.sin()),
                    theirs[0],
                    theirs[1],
                    device.plan_attention(plan, shape, layout),
                    shape,
                    norms=HeadNorms(_to(device, factors[0]), _to(device, factors[1]), 1e-5) if normed else None,
                    scale=shape.head_dim**-0.5,
                    sliding_window=None,
                )
            ours = [pool.float() for pool in pools]
            wanted = REFERENCE.rope_attention(
                qkv.float(),
                angles.cos(),
                angles.sin(),
                ours[0],
                ours[1],
                reference_plan(plan, layout, CPU),
                shape,
                norms=HeadNorms(factors[0].float(), factors[1].float(), 1e-5) if normed else None,
                scale=shape.head_dim**-0.5,
                sliding_window=None,
            )
            self.check_close(found, wanted, dtype, f"rope_attention of rows (new, length) {rows}", rule="attention")
            for one, other, name in zip(theirs, ours, ("keys", "values"), strict=True):
                self.check_close(one, other, dtype, f"the {name} that rope_attention stored", rule="attention")

    def check_attention(
        self, device: Device, rows: list[tuple[int, int]], shape: AttentionShape, window: int | None = None
    ) -> None:
        """Rows are (new tokens, KV length)."""
        plan = _plan(device.kv_layout(shape).page_size, rows)
        found = self._attend(device, plan, shape, window)
        what = f"attention of rows (new, length) {rows}, {shape}, sliding window {window}"
        self.check_close(found, _reference_attend(device, plan, shape, window), shape.dtype, what, rule="attention")

    def _attend(
        self,
        device: Device,
        plan: StepPlan,
        shape: AttentionShape,
        window: int | None,
        after_planning: Callable[[StepPlan], None] | None = None,
    ) -> torch.Tensor:
        """write_kv and attention of one layer on the device, over pages full of stale values."""
        layout = device.kv_layout(shape)
        q, k, v, pools = _layer(plan, shape, layout)
        keys, values = (_to(device, pool) for pool in pools)
        with torch.inference_mode():
            planned: AttentionPlan = device.plan_attention(plan, shape, layout)
            if after_planning is not None:
                after_planning(plan)
            device.ops.write_kv(_to(device, k), _to(device, v), keys, values, planned)
            return device.ops.attention(
                _to(device, q), keys, values, planned, scale=shape.head_dim**-0.5, sliding_window=window
            )

    # Buckets.

    def test_every_decode_step_has_a_bucket(self, device: Device) -> None:
        limits = StepLimits(max_rows=9, max_tokens=64, max_kv_len=256)
        buckets = device.buckets(limits)
        if not buckets:
            pytest.skip("the device has no buckets: shapes may vary freely")
        for rows in range(1, limits.max_rows + 1):
            plan = _plan(device.kv_layout(_shape(torch.float32)).page_size, [(1, 5)] * rows)
            fits = choose_bucket(plan, buckets) is not None
            self.demand(fits, "buckets", f"no bucket of {list(buckets)} holds {rows} decode rows of {limits}")

    def test_capture_equals_eager(self, device: Device, dtype: torch.dtype) -> None:
        shape = _shape(dtype)
        page = device.kv_layout(shape).page_size
        limits = StepLimits(max_rows=4, max_tokens=32, max_kv_len=64)
        model = _ToyModel(device, shape, pages=64)
        for bucket in device.buckets(limits) or (Bucket(4, 32),):
            example = model.input(pad_plan(StepPlan(), bucket, page), bucket)
            with torch.inference_mode():
                captured = device.capture(model.forward, example, bucket)
                for plan in _plans_for(bucket, page):
                    padded = pad_plan(plan, bucket, page)
                    rows = len(plan.sample_rows)
                    model.reset()
                    wanted = [each.clone() for each in model.forward(model.input(padded, bucket))]
                    model.reset()
                    found = captured(model.refill(example, padded, bucket))
                    what = f"the captured step of {bucket} against the eager one"
                    self.check_close(found[0][:rows], wanted[0][:rows].cpu().float(), dtype, what, rule="buckets")

    # Assertions.

    def demand(self, kept: bool, rule: DeviceRule, seen: str) -> None:
        if not kept:
            broken_device(rule, seen)

    def check_close(
        self,
        found: torch.Tensor,
        wanted: torch.Tensor,
        dtype: torch.dtype,
        what: str,
        rule: DeviceRule = "ops",
    ) -> None:
        """Same shape and dtype, and no value further off than the dtype's tolerance."""
        shape, got = tuple(wanted.shape), tuple(found.shape)
        self.demand(got == shape, rule, f"{what}: shape {got} instead of {shape}")
        off = (found.cpu().float() - wanted.cpu().float()).abs().max().item()
        largest = max(1.0, wanted.abs().max().item())
        allowed = self.tolerances[str(dtype).removeprefix("torch.")] * largest
        self.demand(off <= allowed, rule, f"{what}, {dtype}: off by {off:.3g} where {allowed:.3g} is allowed ({shape})")


class _ToyModel:
    """One attention layer between an embedding and a head, out of the device's own operations."""

    VOCAB, HIDDEN = 40, 32

    def __init__(self, device: Device, shape: AttentionShape, pages: int) -> None:
        self._device, self._shape = device, shape
        self._layout = device.kv_layout(shape)
        heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self._embedding = _to(device, _random(shape.dtype, self.VOCAB, self.HIDDEN))
        stacked = _random(shape.dtype, (heads + 2 * kv_heads) * dim, self.HIDDEN)
        self._stacked = device.ops.pack_linear(_to(device, stacked))
        self._out = device.ops.pack_linear(_to(device, _random(shape.dtype, self.HIDDEN, heads * dim)))
        self._head = device.ops.pack_linear(_to(device, _random(shape.dtype, self.VOCAB, self.HIDDEN)))
        # Its rows read a past that nobody wrote.
        self._fresh = tuple(_to(device, torch.randn_like(pool)) for pool in _pools(self._layout, shape, pages))
        self._pools = tuple(pool.clone() for pool in self._fresh)

    def reset(self) -> None:
        """The pools as they were; in place, because a captured graph remembers their addresses."""
        for pool, fresh in zip(self._pools, self._fresh, strict=True):
            pool.copy_(fresh)

    def input(self, plan: StepPlan, bucket: Bucket) -> StepInput:
        return step_input(plan, self._attention(plan, bucket), self._device.torch_device, sampled=bucket.num_rows)

    def refill(self, step: StepInput, plan: StepPlan, bucket: Bucket) -> StepInput:
        """`plan` in the tensors of `step`, as the engine does it for a captured step."""
        return refill(step, plan, self._attention(plan, bucket))

    def _attention(self, plan: StepPlan, bucket: Bucket) -> AttentionPlan:
        return self._device.plan_attention(plan, self._shape, self._layout, bucket)

    def forward(self, step: StepInput) -> tuple[torch.Tensor, torch.Tensor]:
        ops, shape = self._device.ops, self._shape
        hidden = self._embedding[step.input_ids]
        sizes = [shape.num_heads * shape.head_dim, *[shape.num_kv_heads * shape.head_dim] * 2]
        stacked = torch.split(ops.linear(hidden, self._stacked, None), sizes, -1)
        q, k, v = (part.view(len(hidden), -1, shape.head_dim) for part in stacked)
        ops.write_kv(k, v, self._pools[0], self._pools[1], step.attention)
        mixed = ops.attention(
            q, self._pools[0], self._pools[1], step.attention, scale=shape.head_dim**-0.5, sliding_window=None
        )
        hidden = hidden + ops.linear(mixed.flatten(1), self._out, None)
        return ops.linear(hidden[step.last_token], self._head, None).float(), hidden


def _plans_for(bucket: Bucket, page_size: int) -> list[StepPlan]:
    """Steps that fit the bucket: few and many decode rows, and a chunk beside a decode row."""
    rows = [[(1, 3)], [(1, 3 + 5 * row) for row in range(bucket.num_rows)], [(5, 9), (1, 4)]]
    plans = [_plan(page_size, each) for each in rows]
    return [plan for plan in plans if choose_bucket(plan, [bucket]) is not None]


def _shape(dtype: torch.dtype) -> AttentionShape:
    return AttentionShape(num_heads=4, num_kv_heads=2, head_dim=16, dtype=dtype, kv_dtype=dtype)


def _plan(page_size: int, rows: list[tuple[int, int]]) -> StepPlan:
    """Rows of (new tokens, KV length), each on pages of its own that lie scattered over the pool."""
    needed = [-(-kv_len // page_size) for _, kv_len in rows]
    pages = list(range(1, sum(needed) + 1))
    random.Random(len(rows)).shuffle(pages)
    at = itertools.accumulate(needed, initial=0)
    tokens = sum(query_len for query_len, _ in rows)
    return StepPlan(
        slots=list(range(len(rows))),
        query_lens=[query_len for query_len, _ in rows],
        kv_lens=[kv_len for _, kv_len in rows],
        pages=[pages[start : start + count] for start, count in zip(at, needed, strict=False)],
        token_ids=[token % _ToyModel.VOCAB for token in range(tokens)],
        sample_rows=list(range(len(rows))),
        allow_eos=[True] * len(rows),
        output_lens=[0] * len(rows),
    )


def _num_pages(plan: StepPlan) -> int:
    return max((page for pages in plan.pages for page in pages), default=0) + 1


def _layer(
    plan: StepPlan, shape: AttentionShape, layout: KVLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """q, k, v of the new tokens, and pools that hold earlier tokens where a row reads and `STALE` elsewhere."""
    tokens, dim = plan.num_tokens, shape.head_dim
    q = _random(shape.dtype, tokens, shape.num_heads, dim)
    k, v = (_random(shape.dtype, tokens, shape.num_kv_heads, dim, seed=seed) for seed in (1, 2))
    pools = _pools(layout, shape, _num_pages(plan))
    past = StepPlan(
        query_lens=list(plan.kv_lens), kv_lens=list(plan.kv_lens), pages=plan.pages, token_ids=[0] * sum(plan.kv_lens)
    )
    earlier = [_random(shape.dtype, past.num_tokens, shape.num_kv_heads, dim, seed=seed) for seed in (3, 4)]
    REFERENCE.write_kv(earlier[0], earlier[1], pools[0], pools[1], reference_plan(past, layout, CPU))
    return q, k, v, pools


def _reference_attend(device: Device, plan: StepPlan, shape: AttentionShape, window: int | None) -> torch.Tensor:
    layout = device.kv_layout(shape)
    q, k, v, pools = _layer(plan, shape, layout)
    keys, values = (pool.float() for pool in pools)
    planned = reference_plan(plan, layout, CPU)
    REFERENCE.write_kv(k.float(), v.float(), keys, values, planned)
    return REFERENCE.attention(q.float(), keys, values, planned, scale=shape.head_dim**-0.5, sliding_window=window)


def _pools(layout: KVLayout, shape: AttentionShape, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = [pages, layout.page_size, shape.num_kv_heads, shape.head_dim]
    if layout.order == "HND":
        size[1], size[2] = size[2], size[1]
    return torch.full(size, STALE, dtype=shape.kv_dtype), torch.full(size, -STALE, dtype=shape.kv_dtype)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(dtype: torch.dtype, *size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=_generator(seed)).to(dtype)


def _to(device: Device, tensor: torch.Tensor) -> torch.Tensor:
    """Always a copy: an operation that writes over its inputs must not reach the reference's."""
    return tensor.to(device.torch_device, copy=True)
