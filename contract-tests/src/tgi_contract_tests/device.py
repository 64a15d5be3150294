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

from tgi_contract_tests.collectives import Collectives
from tgi_contract_tests.device_model import ToyModel, generator, on, plan_of, pools_of, random_of, shape_of
from tgi_contract_tests.rules import DeviceRule, broken_device
from tgi_model_server.buckets import choose_bucket, pad_plan
from tgi_model_server.device import AttentionShape, Bucket, Device, HeadNorms, KVLayout, Norm, StepLimits
from tgi_model_server.plan import StepPlan
from tgi_model_server.reference import ReferenceOps, reference_plan
from tgi_model_server.step import AttentionPlan

CPU = torch.device("cpu")
REFERENCE = ReferenceOps()
TOKENS = (1, 7, 33)
WIDTHS = ((64, 1), (72, 136), (200, 24), (1000, 503))
"""(in, out): the inner width a multiple of 8, as in every model; the outer one anything, as a vocabulary may be."""
DTYPES = ("float32", "bfloat16", "float16")


class DeviceContract(Collectives):
    """Override `make_device`; name the class ``Test...``."""

    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    """What the device computes in."""
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 3e-3}
    """Largest error against the reference in float32, relative to the largest value of the result."""
    head_dims: ClassVar[tuple[int, ...]] = (16, 64, 128)
    longest: ClassVar[int] = 700
    """KV length of the longest row in the attention tests."""

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
        layout = device.kv_layout(shape_of(dtype))
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
        x, weight = random_of(dtype, tokens, 96), random_of(dtype, 80, 96)
        bias = random_of(dtype, 80) if has_bias else None
        packed = device.ops.pack_linear(on(device, weight))
        found = device.ops.linear(on(device, x), packed, None if bias is None else on(device, bias))
        wanted = REFERENCE.linear(x.float(), weight.float(), None if bias is None else bias.float())
        self.check_close(found, wanted, dtype, "linear")

    @pytest.mark.parametrize("tokens", TOKENS)
    def test_rms_norm(self, device: Device, dtype: torch.dtype, tokens: int) -> None:
        x, weight = random_of(dtype, tokens, 96) * 3, random_of(dtype, 96)
        found = device.ops.rms_norm(on(device, x), on(device, weight), 1e-5)
        self.check_close(found, REFERENCE.rms_norm(x.float(), weight.float(), 1e-5), dtype, "rms_norm")

    @pytest.mark.parametrize("tokens", TOKENS)
    def test_rms_norm_of_heads(self, device: Device, dtype: torch.dtype, tokens: int) -> None:
        """As Qwen3 norms its queries: three dimensions, a view into the stacked projection."""
        stacked, weight = random_of(dtype, tokens, 4 * 16 + 32), random_of(dtype, 16)
        heads = on(device, stacked)[:, :64].view(tokens, 4, 16)
        wanted = REFERENCE.rms_norm(stacked[:, :64].reshape(tokens, 4, 16).float(), weight.float(), 1e-5)
        self.check_close(device.ops.rms_norm(heads, on(device, weight), 1e-5), wanted, dtype, "rms_norm of heads")

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_linear_add(self, device: Device, dtype: torch.dtype, tokens: int, has_bias: bool) -> None:
        x, weight, residual = random_of(dtype, tokens, 96), random_of(dtype, 80, 96), random_of(dtype, tokens, 80)
        bias = random_of(dtype, 80) if has_bias else None
        packed = device.ops.pack_linear(on(device, weight))
        theirs = None if bias is None else on(device, bias)
        found = device.ops.linear_add(on(device, x), packed, theirs, on(device, residual))
        ours = None if bias is None else bias.float()
        wanted = REFERENCE.linear_add(x.float(), weight.float(), ours, residual.float())
        self.check_close(found, wanted, dtype, "linear_add")

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_norm_linear(self, device: Device, dtype: torch.dtype, tokens: int, has_bias: bool) -> None:
        x, factor, weight = random_of(dtype, tokens, 96) * 3, random_of(dtype, 96), random_of(dtype, 80, 96)
        bias = random_of(dtype, 80) if has_bias else None
        packed = device.ops.pack_linear(on(device, weight))
        theirs = None if bias is None else on(device, bias)
        found = device.ops.norm_linear(on(device, x), Norm(on(device, factor), 1e-5), packed, theirs)
        ours = None if bias is None else bias.float()
        wanted = REFERENCE.norm_linear(x.float(), Norm(factor.float(), 1e-5), weight.float(), ours)
        self.check_close(found, wanted, dtype, "norm_linear")

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_norm_gated(self, device: Device, dtype: torch.dtype, tokens: int, has_bias: bool) -> None:
        x, factor, weight = random_of(dtype, tokens, 96), random_of(dtype, 96), random_of(dtype, 160, 96) / 4
        bias = random_of(dtype, 160) if has_bias else None
        packed = device.ops.pack_linear(on(device, weight))
        theirs = None if bias is None else on(device, bias)
        found = device.ops.norm_gated(on(device, x), Norm(on(device, factor), 1e-5), packed, theirs)
        ours = None if bias is None else bias.float()
        wanted = REFERENCE.norm_gated(x.float(), Norm(factor.float(), 1e-5), weight.float(), ours)
        self.check_close(found, wanted, dtype, "norm_gated")

    @pytest.mark.parametrize("rows", TOKENS)
    def test_logits(self, device: Device, dtype: torch.dtype, rows: int) -> None:
        x, factor, weight = random_of(dtype, rows, 96) * 3, random_of(dtype, 96), random_of(dtype, 300, 96)
        packed = device.ops.pack_linear(on(device, weight))
        found = device.ops.logits(on(device, x), Norm(on(device, factor), 1e-5), packed)
        self.demand(found.dtype == torch.float32, "ops", f"logits are {found.dtype}; float32 is needed")
        wanted = REFERENCE.logits(x.float(), Norm(factor.float(), 1e-5), weight.float())
        self.check_close(found, wanted, dtype, "logits")

    @pytest.mark.parametrize("rows", TOKENS)
    def test_greedy_takes_the_first_of_the_largest(self, device: Device, rows: int) -> None:
        logits = torch.randint(0, 50, (rows, 5003), generator=generator()).float()
        found, _ = device.ops.greedy(on(device, logits))
        self.demand(found.dtype == torch.int64, "ops", f"greedy gave {found.dtype}")
        first = [row.tolist().index(row.max().item()) for row in logits]
        self.demand(found.tolist() == first, "ops", f"greedy gave {found.tolist()} instead of {first}")

    @pytest.mark.parametrize("rows", TOKENS)
    def test_greedy_sums_the_whole_vocabulary(self, device: Device, rows: int) -> None:
        logits = torch.randn(rows, 5003, generator=generator()) * 8
        _, found = device.ops.greedy(on(device, logits))
        self.demand(found.dtype == torch.float32, "ops", f"greedy's sums are {found.dtype}; float32 is needed")
        self.check_close(found, logits.double().logsumexp(-1).float(), torch.float32, "logsumexp")

    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("rotary_dim", [16, 8])
    def test_rope(self, device: Device, dtype: torch.dtype, tokens: int, rotary_dim: int) -> None:
        stacked = random_of(dtype, tokens, 6 * 16 + 24)  # q and k are views into the stacked projection
        angles = torch.arange(tokens)[:, None] * torch.rand(rotary_dim // 2, generator=generator())[None, :]
        cos, sin = angles.cos(), angles.sin()

        def split(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return source[:, :64].view(tokens, 4, 16), source[:, 64:96].view(tokens, 2, 16)

        q, k = split(on(device, stacked))
        found = device.ops.rope(q, k, on(device, cos), on(device, sin))
        wanted = REFERENCE.rope(*split(stacked.float()), cos, sin)
        for one, other, name in zip(found, wanted, ("q", "k"), strict=True):
            self.check_close(one, other, dtype, f"rope of {name}")

    @pytest.mark.parametrize("tokens", TOKENS)
    def test_silu_mul(self, device: Device, dtype: torch.dtype, tokens: int) -> None:
        gate_up = random_of(dtype, tokens, 160) * 4
        found = device.ops.silu_mul(on(device, gate_up))
        self.check_close(found, REFERENCE.silu_mul(gate_up.float()), dtype, "silu_mul")

    @pytest.mark.parametrize(("inner", "outer"), WIDTHS)
    def test_operations_at_odd_widths(self, device: Device, dtype: torch.dtype, inner: int, outer: int) -> None:
        x, factor, weight = random_of(dtype, 7, inner), random_of(dtype, inner), random_of(dtype, outer, inner)
        bias, residual, ops = random_of(dtype, outer), random_of(dtype, 7, outer), device.ops
        theirs, norm, packed = on(device, x), Norm(on(device, factor), 1e-5), ops.pack_linear(on(device, weight))
        wide, ours, whole = x.float(), Norm(factor.float(), 1e-5), weight.float()
        pairs = {
            "linear": (ops.linear(theirs, packed, on(device, bias)), REFERENCE.linear(wide, whole, bias.float())),
            "linear_add": (
                ops.linear_add(theirs, packed, None, on(device, residual)),
                REFERENCE.linear_add(wide, whole, None, residual.float()),
            ),
            "norm_linear": (
                ops.norm_linear(theirs, norm, packed, None),
                REFERENCE.norm_linear(wide, ours, whole, None),
            ),
            "logits": (ops.logits(theirs, norm, packed), REFERENCE.logits(wide, ours, whole)),
            "rms_norm": (
                ops.rms_norm(theirs, norm.weight, norm.eps),
                REFERENCE.rms_norm(wide, ours.weight, ours.eps),
            ),
            "silu_mul": (ops.silu_mul(theirs), REFERENCE.silu_mul(wide)),
        }
        for name, (found, wanted) in pairs.items():
            self.check_close(found, wanted, dtype, f"{name} of widths {inner} and {outer}")

    def test_operations_leave_their_inputs_alone(self, device: Device, dtype: torch.dtype) -> None:
        """All but the residual of linear_add, which may be overwritten, and the pools of write_kv, which must."""
        x, weight = on(device, random_of(dtype, 7, 96)), on(device, random_of(dtype, 96))
        packed = device.ops.pack_linear(on(device, random_of(dtype, 80, 96)))
        kept = x.clone()
        device.ops.rms_norm(x, weight, 1e-5)
        device.ops.silu_mul(x)
        device.ops.linear(x, packed, None)
        device.ops.linear_add(x, packed, None, on(device, random_of(dtype, 7, 80)))
        device.ops.norm_linear(x, Norm(weight, 1e-5), packed, None)
        device.ops.norm_gated(x, Norm(weight, 1e-5), packed, None)
        device.ops.logits(x, Norm(weight, 1e-5), packed)
        self.demand(torch.equal(x, kept), "ops", "an operation changed its input")

    # Attention.

    def test_write_kv_changes_the_named_slots_and_no_other(self, device: Device, dtype: torch.dtype) -> None:
        shape = shape_of(dtype)
        layout = device.kv_layout(shape)
        plan = plan_of(layout.page_size, [(1, layout.page_size + 1), (5, 5), (layout.page_size, 2 * layout.page_size)])
        pools = pools_of(layout, shape, _num_pages(plan))
        new = [random_of(dtype, plan.num_tokens, shape.num_kv_heads, shape.head_dim) for _ in range(2)]
        theirs = [on(device, pool) for pool in pools]
        with torch.inference_mode():
            device.ops.write_kv(
                on(device, new[0]),
                on(device, new[1]),
                theirs[0],
                theirs[1],
                device.plan_attention(plan, shape, layout),
            )
        REFERENCE.write_kv(new[0], new[1], pools[0], pools[1], reference_plan(plan, layout, CPU))
        for found, wanted, name in zip(theirs, pools, ("keys", "values"), strict=True):
            self.demand(torch.equal(found.cpu(), wanted), "attention", f"the pool of {name} differs after write_kv")

    def test_attention_at_each_length(self, device: Device, dtype: torch.dtype) -> None:
        """One row: decoded, prefilled whole, and the second half of a prompt."""
        shape = shape_of(dtype)
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
        self.check_attention(device, rows, shape_of(dtype))

    def test_rows_may_share_the_pages_of_a_prefix(self, device: Device, dtype: torch.dtype) -> None:
        """As the prefix cache has it: the same pages at the head of several rows."""
        shape = shape_of(dtype)
        page = device.kv_layout(shape).page_size
        # What is new lies behind the shared pages, as in the engine: nobody writes to a page that another row reads.
        plan = plan_of(page, [(1, 2 * page + 3), (1, 2 * page + 1), (min(3, page), 3 * page), (1, 4)])
        for row in (1, 2):
            plan.pages[row] = [*plan.pages[0][:2], *plan.pages[row][2:]]
        self.check_close(
            self._attend(device, plan, shape, None),
            _reference_attend(device, plan, shape, None),
            dtype,
            "attention of rows that share two pages",
            rule="attention",
        )

    def test_many_rows_may_share_a_long_prefix(self, device: Device, dtype: torch.dtype) -> None:
        """Enough keys and rows for a device that reads shared ones once: prompts, decode rows, and some that share
        another prefix, or none.
        """
        shape = shape_of(dtype)
        page = device.kv_layout(shape).page_size
        common = max(1, 3 * self.longest // 4 // page)
        draw = random.Random(0)
        rows = [
            (new, common * page + new + draw.randint(0, page)) for new in (1, draw.randint(2, 9)) for _ in range(12)
        ]
        rows += [(20, common * page + 20), (3, 5), (1, 2), (self.longest // 2, self.longest)]
        draw.shuffle(rows)
        plan = plan_of(page, rows)
        heads: dict[bool, list[int]] = {}
        for row, (new, kv_len) in enumerate(rows):
            if kv_len - new >= common * page:
                mostly = draw.random() < 0.8
                own = plan.pages[row]
                assert isinstance(own, list)
                own[:common] = heads.setdefault(mostly, own[:common])
        self.check_close(
            self._attend(device, plan, shape, None),
            _reference_attend(device, plan, shape, None),
            dtype,
            f"attention of rows (new, length) {rows} that share {common} pages",
            rule="attention",
        )

    def test_attention_of_many_decode_rows(self, device: Device, dtype: torch.dtype) -> None:
        draw = random.Random(0)
        self.check_attention(device, [(1, draw.randint(1, self.longest)) for _ in range(31)], shape_of(dtype))

    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
    def test_attention_of_head_groups(self, device: Device, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
        shape = replace(shape_of(dtype), num_heads=heads, num_kv_heads=kv_heads)
        self.check_attention(device, [(1, 40), (9, 30), (5, 5)], shape)

    def test_attention_of_head_dims(self, device: Device, dtype: torch.dtype) -> None:
        for head_dim in self.head_dims:
            self.check_attention(device, [(1, 40), (9, 30)], replace(shape_of(dtype), head_dim=head_dim))

    def test_attention_in_a_sliding_window(self, device: Device, dtype: torch.dtype) -> None:
        shape = shape_of(dtype)
        page = device.kv_layout(shape).page_size
        for window in sorted({1, 3, page, page + 1, 10 * self.longest}):
            rows = [(1, self.longest), (9, 3 * page), (page + 5, page + 5), (1, 2)]
            self.check_attention(device, rows, shape, window)

    def test_a_plan_may_be_changed_after_it_was_handed_over(self, device: Device, dtype: torch.dtype) -> None:
        """Its lists belong to the sequences, which grow while the step runs."""
        shape = shape_of(dtype)
        layout = device.kv_layout(shape)
        plan = plan_of(layout.page_size, [(1, layout.page_size + 3), (4, 4)])
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
        shape = shape_of(dtype)
        page = device.kv_layout(shape).page_size
        plan = plan_of(page, [(1, page + 1), (1, 5), (1, 2 * page)])
        padded = pad_plan(plan, Bucket(8, 8), page)
        found = self._attend(device, padded, shape, None)[: plan.num_tokens]
        self.check_close(
            found, self._attend(device, plan, shape, None), dtype, "attention beside padding", rule="buckets"
        )

    @pytest.mark.parametrize("last_only", [False, True])
    @pytest.mark.parametrize("normed", [False, True])
    @pytest.mark.parametrize("rotary_dim", [16, 8])
    def test_rope_attention(
        self, device: Device, dtype: torch.dtype, normed: bool, rotary_dim: int, last_only: bool
    ) -> None:
        """The whole way from the stacked projection to the attended heads, for rows of all kinds and for few rows."""
        shape = shape_of(dtype)
        layout = device.kv_layout(shape)
        page, width = layout.page_size, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        for rows in ([(1, 1)], [(1, page), (1, page + 1), (1, 3)], [(1, 9)] * 9, [(1, 40), (9, 30), (5, 5)]):
            plan = plan_of(page, rows)
            tokens = plan.num_tokens
            _, _, _, pools = _layer(plan, shape, layout)
            qkv, factors = (
                random_of(dtype, tokens, width),
                [random_of(dtype, shape.head_dim, seed=seed) for seed in (5, 6)],
            )
            angles = torch.arange(tokens)[:, None] * torch.rand(rotary_dim // 2, generator=generator())[None, :]
            theirs = [on(device, pool) for pool in pools]
            with torch.inference_mode():
                found = device.ops.rope_attention(
                    on(device, qkv),
                    on(device, angles.cos()),
                    on(device, angles.sin()),
                    theirs[0],
                    theirs[1],
                    device.plan_attention(plan, shape, layout),
                    shape,
                    norms=HeadNorms(on(device, factors[0]), on(device, factors[1]), 1e-5) if normed else None,
                    scale=shape.head_dim**-0.5,
                    sliding_window=None,
                    last_only=last_only,
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
            if last_only:
                last = list(itertools.accumulate(plan.query_lens))
                found, wanted = (each[[after - 1 for after in last]] for each in (found, wanted))
            self.check_close(found, wanted, dtype, f"rope_attention of rows (new, length) {rows}", rule="attention")
            for one, other, name in zip(theirs, ours, ("keys", "values"), strict=True):
                self.check_close(one, other, dtype, f"the {name} that rope_attention stored", rule="attention")

    def check_attention(
        self, device: Device, rows: list[tuple[int, int]], shape: AttentionShape, window: int | None = None
    ) -> None:
        """Rows are (new tokens, KV length)."""
        plan = plan_of(device.kv_layout(shape).page_size, rows)
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
        keys, values = (on(device, pool) for pool in pools)
        with torch.inference_mode():
            planned: AttentionPlan = device.plan_attention(plan, shape, layout)
            if after_planning is not None:
                after_planning(plan)
            device.ops.write_kv(on(device, k), on(device, v), keys, values, planned)
            return device.ops.attention(
                on(device, q), keys, values, planned, scale=shape.head_dim**-0.5, sliding_window=window
            )

    # Buckets.

    def test_every_decode_step_has_a_bucket(self, device: Device) -> None:
        limits = StepLimits(max_rows=9, max_tokens=64, max_kv_len=256)
        buckets = device.buckets(limits)
        if not buckets:
            pytest.skip("the device has no buckets: shapes may vary freely")
        for rows in range(1, limits.max_rows + 1):
            plan = plan_of(device.kv_layout(shape_of(torch.float32)).page_size, [(1, 5)] * rows)
            fits = choose_bucket(plan, buckets) is not None
            self.demand(fits, "buckets", f"no bucket of {list(buckets)} holds {rows} decode rows of {limits}")

    def test_capture_equals_eager(self, device: Device, dtype: torch.dtype) -> None:
        shape = shape_of(dtype)
        page = device.kv_layout(shape).page_size
        limits = StepLimits(max_rows=4, max_tokens=32, max_kv_len=64)
        model = ToyModel(device, shape, pages=64)
        for bucket in device.buckets(limits) or (Bucket(4, 32),):
            example = model.input(pad_plan(StepPlan(), bucket, page), bucket)
            with torch.inference_mode():
                captured = device.capture(model.forward, example, bucket)
                for plan in _plans_for(bucket, page):
                    padded = pad_plan(plan, bucket, page)
                    rows = len(plan.sample_rows)
                    model.reset()
                    wanted = model.forward(model.input(padded, bucket)).cpu()
                    model.reset()
                    found = captured(model.refill(example, padded, bucket))
                    what = f"the captured step of {bucket} against the eager one"
                    self.check_close(found[:rows], wanted[:rows].float(), dtype, what, rule="buckets")

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


def _plans_for(bucket: Bucket, page_size: int) -> list[StepPlan]:
    """Steps that fit the bucket: few and many decode rows, and a chunk beside a decode row."""
    rows = [[(1, 3)], [(1, 3 + 5 * row) for row in range(bucket.num_rows)], [(5, 9), (1, 4)]]
    plans = [plan_of(page_size, each) for each in rows]
    return [plan for plan in plans if choose_bucket(plan, [bucket]) is not None]


def _num_pages(plan: StepPlan) -> int:
    return max((page for pages in plan.pages for page in pages), default=0) + 1


def _layer(
    plan: StepPlan, shape: AttentionShape, layout: KVLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """q, k, v of the new tokens, and pools that hold earlier tokens where a row reads and `STALE` elsewhere."""
    tokens, dim = plan.num_tokens, shape.head_dim
    q = random_of(shape.dtype, tokens, shape.num_heads, dim)
    k, v = (random_of(shape.dtype, tokens, shape.num_kv_heads, dim, seed=seed) for seed in (1, 2))
    pools = pools_of(layout, shape, _num_pages(plan))
    longest = max(plan.kv_lens)
    earlier = [
        random_of(shape.dtype, len(plan.kv_lens), longest, shape.num_kv_heads, dim, seed=seed) for seed in (3, 4)
    ]
    # One row after the other: of a page that several share, all must find what the same one of them wrote.
    for row, (kv_len, pages) in enumerate(zip(plan.kv_lens, plan.pages, strict=True)):
        past = StepPlan(query_lens=[kv_len], kv_lens=[kv_len], pages=[pages], token_ids=[0] * kv_len)
        keys, values = (each[row, :kv_len] for each in earlier)
        REFERENCE.write_kv(keys, values, pools[0], pools[1], reference_plan(past, layout, CPU))
    return q, k, v, pools


def _reference_attend(device: Device, plan: StepPlan, shape: AttentionShape, window: int | None) -> torch.Tensor:
    layout = device.kv_layout(shape)
    q, k, v, pools = _layer(plan, shape, layout)
    keys, values = (pool.float() for pool in pools)
    planned = reference_plan(plan, layout, CPU)
    REFERENCE.write_kv(k.float(), v.float(), keys, values, planned)
    return REFERENCE.attention(q.float(), keys, values, planned, scale=shape.head_dim**-0.5, sliding_window=window)
