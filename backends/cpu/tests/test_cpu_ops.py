"""The CPU's operations against the reference, and the promise that rows do not influence each other."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from tgi_backend_cpu.attention import PAGE_SIZE, CpuAttentionPlan
from tgi_backend_cpu.ops import CpuOps, _in_fixed_blocks
from tgi_model_server.device import KVLayout
from tgi_model_server.machine import rounds_alike
from tgi_model_server.plan import StepPlan
from tgi_model_server.reference import ReferenceOps, reference_plan

OPS, REFERENCE = CpuOps(), ReferenceOps()
LAYOUT = KVLayout(PAGE_SIZE)
ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 64, 100)
DTYPES = [torch.float32, torch.bfloat16]
ids = str


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random_tensor(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    tolerance = 2e-5 if ours.dtype is torch.float32 else 2e-2
    scale = float(reference.float().abs().max())
    assert float((ours.float() - reference.float()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("out", "size"), [(48, 48), (96, 250), (64, 1024), (40, 3000), (700, 64)])
def test_linear_gives_every_row_the_same_result_in_any_number_of_rows(out: int, size: int, dtype: torch.dtype) -> None:
    weight, bias = random_tensor(out, size, dtype=dtype, seed=1), random_tensor(out, dtype=dtype, seed=2)
    x = random_tensor(100, size, dtype=dtype)
    packed = OPS.pack_linear(weight)
    for each in (None, bias):
        whole = OPS.linear(x, packed, each)
        assert_close(whole, REFERENCE.linear(x, weight, each))
        for rows in ROWS:
            assert torch.equal(OPS.linear(x[:rows], packed, each), whole[:rows]), f"{rows} rows"
    assert OPS.linear(x[:0], packed, None).shape == (0, out)


def test_linear_without_onednn_gives_every_row_the_same_result_in_any_number_of_rows() -> None:
    weight, bias, x = random_tensor(40, 300, seed=1), random_tensor(40, seed=2), random_tensor(100, 300)
    whole = _in_fixed_blocks(x, weight, bias)
    assert_close(whole, REFERENCE.linear(x, weight, bias))
    for rows in ROWS:
        assert torch.equal(_in_fixed_blocks(x[:rows], weight, bias), whole[:rows]), f"{rows} rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_norms_and_activation_equal_the_reference_row_by_row(dtype: torch.dtype) -> None:
    x, residual = random_tensor(33, 96, dtype=dtype), random_tensor(33, 96, dtype=dtype, seed=1)
    weight = random_tensor(96, dtype=dtype, seed=2)
    assert_close(OPS.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    assert_close(OPS.silu_mul(x), REFERENCE.silu_mul(x))
    square = random_tensor(96, 96, dtype=dtype, seed=3)
    added = OPS.linear_add(x, OPS.pack_linear(square), None, residual.clone())
    assert_close(added, REFERENCE.linear_add(x, square, None, residual))
    for row in range(33):
        one = slice(row, row + 1)
        assert torch.equal(OPS.rms_norm(x[one], weight, 1e-5), OPS.rms_norm(x, weight, 1e-5)[one])
        assert torch.equal(OPS.silu_mul(x[one]), OPS.silu_mul(x)[one])


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("rotary", [16, 8])
def test_rope_equals_the_reference_on_views_of_the_stacked_projection(rotary: int, dtype: torch.dtype) -> None:
    q, k, _ = random_tensor(7, 8, 16, dtype=dtype).split_with_sizes((4, 2, 2), 1)
    cos, sin = random_tensor(7, rotary // 2, seed=1), random_tensor(7, rotary // 2, seed=2)
    for ours, reference in zip(OPS.rope(q, k, cos, sin), REFERENCE.rope(q, k, cos, sin), strict=True):
        assert_close(ours, reference)


class Step:
    """One step's rows over random keys and values that are already in the pools."""

    def __init__(self, lens: list[tuple[int, int]], kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        rng = random.Random(0)
        self.plan = StepPlan()
        total = sum(-(-kv // PAGE_SIZE) for _, kv in lens)
        order = rng.sample(range(1, total + 1), total)
        for slot, (query_len, kv_len) in enumerate(lens):
            self.plan.slots.append(slot)
            self.plan.query_lens.append(query_len)
            self.plan.kv_lens.append(kv_len)
            self.plan.pages.append([order.pop() for _ in range(-(-kv_len // PAGE_SIZE))])
            self.plan.token_ids += [0] * query_len
        size = (total + 1, PAGE_SIZE, kv_heads, head_dim)
        self.keys = random_tensor(*size, dtype=dtype, seed=1)
        self.values = random_tensor(*size, dtype=dtype, seed=2)

    def attention(self, q: torch.Tensor, window: int | None) -> torch.Tensor:
        plan = CpuAttentionPlan(self.plan)
        return OPS.attention(q, self.keys, self.values, plan, scale=0.2, sliding_window=window)

    def reference(self, q: torch.Tensor, window: int | None) -> torch.Tensor:
        plan = reference_plan(self.plan, LAYOUT, q.device)
        return REFERENCE.attention(q, self.keys, self.values, plan, scale=0.2, sliding_window=window)


STEPS = {
    "decode": [(1, 1), (1, 33), (1, 32), (1, 256), (1, 257), (1, 700), (1, 20)],
    "decode alone": [(1, 90)],
    "prefill": [(60, 60), (2, 2), (300, 300)],
    "chunks": [(50, 700), (7, 100), (130, 513)],
    "mixed": [(1, 300), (40, 40), (1, 5), (33, 600), (1, 6), (1, 1100)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("window", [None, 1, 20, 150])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=ids)
@pytest.mark.parametrize("rows", STEPS)
def test_attention_equals_the_reference(
    rows: str, heads: tuple[int, int], window: int | None, dtype: torch.dtype
) -> None:
    step = Step(STEPS[rows], heads[1], 16, dtype)
    q = random_tensor(step.plan.num_tokens, heads[0], 16, dtype=dtype, seed=3)
    assert_close(step.attention(q, window), step.reference(q, window))


@pytest.mark.skipif(not rounds_alike(), reason="on this processor MKL rounds by the number of rows")
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=ids)
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("head_dim", [16, 64])
def test_attention_of_a_token_is_the_same_decoded_or_in_any_chunk(
    head_dim: int, heads: tuple[int, int], window: int | None, dtype: torch.dtype
) -> None:
    length = 620
    whole = Step([(length, length)], heads[1], head_dim, dtype)
    q = random_tensor(length, heads[0], head_dim, dtype=dtype, seed=3)
    expected = whole.attention(q, window)
    for first, last in [
        (0, 1),
        (0, 17),
        (31, 33),
        (40, 300),
        (255, 257),
        (300, 302),
        (511, 512),
        (512, 613),
        (619, 620),
    ]:
        part = StepPlan(
            slots=[0], query_lens=[last - first], kv_lens=[last], pages=whole.plan.pages, token_ids=[0] * (last - first)
        )
        others = StepPlan(
            slots=[0, 1, 2, 3],
            query_lens=[1, last - first, 5, 1],
            kv_lens=[9, last, 400, 610],
            pages=[whole.plan.pages[0]] * 4,
            token_ids=[0] * (last - first + 7),
        )
        plan = CpuAttentionPlan(part)
        alone = OPS.attention(q[first:last], whole.keys, whole.values, plan, scale=0.2, sliding_window=window)
        assert torch.equal(alone, expected[first:last]), f"{first}..{last} alone"
        several = torch.cat((q[:1], q[first:last], q[:6]))
        plan = CpuAttentionPlan(others)
        together = OPS.attention(several, whole.keys, whole.values, plan, scale=0.2, sliding_window=window)
        assert torch.equal(together[1 : 1 + last - first], expected[first:last]), f"{first}..{last} with others"


def test_write_kv_puts_each_token_where_the_plan_says() -> None:
    step = Step([(3, 35), (1, 1), (40, 40)], 2, 8, torch.float32)
    k, v = random_tensor(44, 2, 8, seed=4), random_tensor(44, 2, 8, seed=5)
    keys, values = step.keys.clone(), step.values.clone()
    OPS.write_kv(k, v, step.keys, step.values, CpuAttentionPlan(step.plan))
    REFERENCE.write_kv(k, v, keys, values, reference_plan(step.plan, LAYOUT, k.device))
    assert torch.equal(step.keys, keys)
    assert torch.equal(step.values, values)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_pages_of_8_bits_are_written_and_read_as_the_reference_does(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    step = Step([(3, 35), (1, 70), (40, 40)], 2, 8, dtype)
    k, v = (random_tensor(44, 2, 8, dtype=dtype, seed=seed) * 1e3 for seed in (4, 5))
    q = random_tensor(44, 4, 8, dtype=dtype, seed=6) * 1e-3
    keys, values = step.keys.to(kv_dtype), step.values.to(kv_dtype)
    theirs = keys.clone(), values.clone()
    plan, reference = CpuAttentionPlan(step.plan), reference_plan(step.plan, LAYOUT, k.device)
    OPS.write_kv(k, v, keys, values, plan)
    REFERENCE.write_kv(k, v, *theirs, reference)
    for found, wanted in ((keys, theirs[0]), (values, theirs[1])):
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
        assert bool(found.float().isfinite().all()), "too large a number becomes the largest"
    found = OPS.attention(q, keys, values, plan, scale=0.2, sliding_window=None)
    assert_close(found, REFERENCE.attention(q, keys, values, reference, scale=0.2, sliding_window=None))
