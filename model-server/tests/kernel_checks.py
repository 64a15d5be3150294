"""Every kernel against the reference: on the accelerator, or in Triton's interpreter on the CPU.

`test_kernels` runs this file in a process of its own, because Triton decides at import whether kernels are interpreted.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch

from tgi_contract_tests.device import DeviceContract
from tgi_model_server.buckets import pad_plan
from tgi_model_server.device import AttentionShape, Bucket, Device, Forward, HeadNorms, KVLayout, StepLimits
from tgi_model_server.kernels import sampling
from tgi_model_server.kernels.decode import choose_splits
from tgi_model_server.kernels.launch import Tuning, interpreted
from tgi_model_server.kernels.ops import TritonOps
from tgi_model_server.kernels.plan import FixedPlan, PageLists, TritonAttentionPlan, triton_plan
from tgi_model_server.kernels.shared import attend_shared, choose_shared_splits, merge_shared
from tgi_model_server.kernels.sharing import Group, find_lonely, find_sharing
from tgi_model_server.plan import StepPlan
from tgi_model_server.reference import ReferenceOps, reference_plan
from tgi_model_server.sampling import filters
from tgi_model_server.sampling.uniform import uniform
from tgi_model_server.step import AttentionPlan, StepInput
from tgi_model_server.testing.devices import ReferenceDevice

PLACE = torch.device("cpu" if interpreted() else torch.accelerator.current_accelerator() or "cpu")
assert interpreted() or PLACE.type != "cpu", "without an accelerator set TRITON_INTERPRET=1"

OPS, REFERENCE = TritonOps(), ReferenceOps()
SMALL = Tuning(decode_keys=16, prefill_queries=16, prefill_keys=16, split_keys=32, shared_keys=40)
"""Several tiles and splits on a few dozen keys."""
MANY_CORES = 1000
CHUNK = 256 if interpreted() else 4096
"""Of the vocabulary, for one program: the interpreter's running sums are slow."""
FOREIGN = 77.0
"""What lies in a pool where no row reads."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter rounds by cutting off; chips take the root and the exponential from tables.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
Rows = Sequence[tuple[int, int]]
"""(new tokens, KV length)"""


@pytest.fixture(autouse=True)
def fresh_numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other numbers at every run, a failure shows the seed; and NaN in new memory, where torch can do that."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    # The contract makes its tensors on the CPU.
    place = PLACE if request.cls is None else torch.device("cpu")
    torch.use_deterministic_algorithms(PLACE.type == "cpu")
    monkeypatch.setattr(sampling, "_CHUNK", CHUNK)
    monkeypatch.setattr(sampling, "_BLOCK", CHUNK // 4)
    with torch.inference_mode(), place:
        yield


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    assert isinstance(request.param, torch.dtype)
    return request.param


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """`wanted` is float32; errors are relative to its largest value."""
    assert found.shape == wanted.shape
    off = (found.float() - wanted).abs().max().item()
    assert off <= TOLERANCES[found.dtype] * max(1.0, wanted.abs().max().item()), f"off by {off}"


# Norms and activation.


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("width", [1, 96, 1024, 1500])
def test_rms_norm_of_rows_in_a_wider_tensor(dtype: torch.dtype, tokens: int, width: int) -> None:
    x, weight = torch.randn(tokens, width + 5).to(dtype)[:, 3 : width + 3], torch.randn(width).to(dtype)
    close(OPS.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x.float(), weight.float(), 1e-5))


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_rms_norm_of_heads_inside_a_stacked_projection(dtype: torch.dtype, heads: int) -> None:
    stacked, weight = torch.randn(7, heads + 2, 20).to(dtype), torch.randn(20).to(dtype)
    x = stacked[:, 1 : heads + 1]
    close(OPS.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x.float(), weight.float(), 1e-6))


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_add_puts_the_sum_into_the_residual(dtype: torch.dtype, tokens: int, has_bias: bool) -> None:
    x, weight, residual = (torch.randn(*size).to(dtype) for size in ((tokens, 96), (80, 96), (tokens, 80)))
    bias = torch.randn(80).to(dtype) if has_bias else None
    wide = None if bias is None else bias.float()
    wanted = REFERENCE.linear_add(x.float(), weight.float(), wide, residual.float())
    assert OPS.linear_add(x, weight, bias, residual) is residual
    close(residual, wanted)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("width", [1, 80, 1024, 1500])
def test_silu_mul(dtype: torch.dtype, tokens: int, width: int) -> None:
    gate_up = (torch.randn(tokens, 2 * width + 3) * 4).to(dtype)[:, : 2 * width]
    close(OPS.silu_mul(gate_up), REFERENCE.silu_mul(gate_up.float()))


def test_silu_of_a_very_negative_gate_is_zero_and_not_nan() -> None:
    assert OPS.silu_mul(torch.tensor([[-1e4, 3.0]])).item() == 0.0


def test_no_tokens_are_no_trouble() -> None:
    assert OPS.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    assert OPS.silu_mul(torch.empty(0, 8)).shape == (0, 4)
    assert [each.shape for each in OPS.greedy(torch.empty(0, 8))] == [(0,), (0,)]


# Rope and the pools.


def stacked_heads(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k and v as views into one projection."""
    projection = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    return projection.view(tokens, -1, dim).split_with_sizes((heads, kv_heads, kv_heads), 1)


def angles(tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    turns = torch.rand(tokens, half) * 100
    return turns.cos(), turns.sin()


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "half"), [(4, 2, 16, 8), (3, 1, 20, 10), (9, 9, 128, 16)])
def test_rope_turns_whole_and_partial_heads(
    dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int, half: int
) -> None:
    q, k, _ = stacked_heads(tokens, heads, kv_heads, dim, dtype)
    cos, sin = angles(tokens, half)
    wanted = REFERENCE.rope(q.float(), k.float(), cos, sin)
    for found, other in zip(OPS.rope(q, k, cos, sin), wanted, strict=True):
        close(found, other)


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("has_norms", [False, True])
def test_rope_write_kv_is_norm_then_rope_then_write(
    dtype: torch.dtype, order: Literal["NHD", "HND"], has_norms: bool
) -> None:
    shape, layout = AttentionShape(6, 3, 20, dtype, dtype), KVLayout(4, order)
    plan = make_plan(4, [(1, 4), (5, 5), (4, 9)])
    q, k, v = stacked_heads(plan.num_tokens, 6, 3, 20, dtype)
    cos, sin = angles(plan.num_tokens, 8)
    pools, theirs = make_pools(plan, shape, layout), make_pools(plan, shape, layout)
    weights = (torch.randn(20).to(dtype), torch.randn(20).to(dtype))
    norms = HeadNorms(*weights, 1e-6) if has_norms else None
    found = OPS.rope_write_kv(q, k, v, cos, sin, *pools, make_triton_plan(plan, shape, layout), norms)

    wide_q, wide_k = q.float(), k.float()
    if has_norms:
        wide_q, wide_k = (
            REFERENCE.rms_norm(heads, weight.float(), 1e-6)
            for heads, weight in zip((wide_q, wide_k), weights, strict=True)
        )
    wide_q, wide_k = REFERENCE.rope(wide_q, wide_k, cos, sin)
    wide = (theirs[0].float().clone(), theirs[1].float().clone())
    REFERENCE.write_kv(wide_k, v.float(), *wide, reference_plan(plan, layout, PLACE))
    close(found, wide_q)
    close(pools[0], wide[0])
    assert torch.equal(pools[1].float(), wide[1])
    untouched = wide[0] == theirs[0].float()
    assert torch.equal(pools[0][untouched], theirs[0][untouched])


def test_write_kv_converts_to_the_dtype_of_the_pool() -> None:
    shape, layout = AttentionShape(2, 2, 16, torch.float32, torch.float16), KVLayout(4)
    plan = make_plan(4, [(3, 7)])
    _, k, v = stacked_heads(3, 2, 2, 16, torch.float32)
    pools, theirs = make_pools(plan, shape, layout), make_pools(plan, shape, layout)
    OPS.write_kv(k, v, *pools, make_triton_plan(plan, shape, layout))
    REFERENCE.write_kv(k, v, *theirs, reference_plan(plan, layout, PLACE))
    for found, wanted in zip(pools, theirs, strict=True):
        assert torch.equal(found, wanted)


def step_of_float8(kv_dtype: torch.dtype, scale: float = 1.0) -> tuple[float, float]:
    """(largest difference, largest number) of what kernels and the reference store and make of a pool of 8 bits."""
    shape, layout = AttentionShape(4, 2, 20, torch.bfloat16, kv_dtype), KVLayout(4)
    plan = make_plan(4, [(1, 30), (5, 9), (1, 61)])
    q, k, v = stacked_heads(plan.num_tokens, 4, 2, 20, torch.bfloat16)
    k, v = k * scale, v * scale
    pools, theirs = make_pools(plan, shape, layout), make_pools(plan, shape, layout)
    planned = make_triton_plan(plan, shape, layout)
    OPS.write_kv(k, v, *pools, planned)
    REFERENCE.write_kv(k, v, *theirs, reference_plan(plan, layout, PLACE))
    off = largest = 0.0
    for found, wanted in zip(pools, theirs, strict=True):
        assert bool(found.float().isfinite().all())
        off = max(off, (found.float() - wanted.float()).abs().max().item())
        largest = max(largest, found.float().abs().max().item())
    # From here on both read the same numbers.
    ops = TritonOps(SMALL)
    found = ops.attention(q, *pools, planned, scale=0.2, sliding_window=None)
    keys, values = (pool.float() for pool in pools)
    theirs_plan = reference_plan(plan, layout, PLACE)
    wanted = REFERENCE.attention(q.float(), keys, values, theirs_plan, scale=0.2, sliding_window=None)
    close(found, wanted)
    return off, largest


@pytest.mark.parametrize(("kv_dtype", "digits"), [(torch.float8_e4m3fn, 3), (torch.float8_e5m2, 2)])
def test_pools_of_8_bits_keep_what_the_reference_keeps_and_are_read_exactly(kv_dtype: torch.dtype, digits: int) -> None:
    off, largest = step_of_float8(kv_dtype)
    # The interpreter cuts off where chips round.
    assert off <= (2.0**-digits * largest if interpreted() else 0.0)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_8_bits_cannot_hold_becomes_their_largest_number(kv_dtype: torch.dtype) -> None:
    assert step_of_float8(kv_dtype, scale=1e6)[1] == torch.finfo(kv_dtype).max


def test_rope_write_kv_saturates_too() -> None:
    shape, layout = AttentionShape(4, 2, 20, torch.bfloat16, torch.float8_e4m3fn), KVLayout(4)
    plan = make_plan(4, [(3, 7)])
    q, k, v = stacked_heads(3, 4, 2, 20, torch.bfloat16)
    pools = make_pools(plan, shape, layout)
    cos, sin = angles(3, 8)
    OPS.rope_write_kv(q, k * 1e4, v * 1e4, cos, sin, *pools, make_triton_plan(plan, shape, layout))
    for pool in pools:
        assert pool.float().abs().max().item() == 448.0


# Plans.


def make_plan(page_size: int, rows: Rows) -> StepPlan:
    """Rows on scattered pages of their own; page 0 is nobody's."""
    needed = [-(-kv_len // page_size) for _, kv_len in rows]
    pages = list(range(1, sum(needed) + 1))
    random.Random(len(rows)).shuffle(pages)
    starts = itertools.accumulate(needed, initial=0)
    return StepPlan(
        slots=list(range(len(rows))),
        query_lens=[query_len for query_len, _ in rows],
        kv_lens=[kv_len for _, kv_len in rows],
        pages=[pages[start : start + count] for start, count in zip(starts, needed, strict=False)],
        token_ids=[0] * sum(query_len for query_len, _ in rows),
        sample_rows=list(range(len(rows))),
        allow_eos=[True] * len(rows),
        output_lens=[0] * len(rows),
    )


def make_pools(plan: StepPlan, shape: AttentionShape, layout: KVLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers at the rows' keys and values, FOREIGN ones everywhere else; the same at each call."""
    pages = max(page for pages in plan.pages for page in pages) + 1
    size = (pages, layout.page_size, shape.num_kv_heads, shape.head_dim)
    generator = torch.Generator(PLACE).manual_seed(1)
    pools: list[torch.Tensor] = []
    past = StepPlan(query_lens=plan.kv_lens, kv_lens=plan.kv_lens, pages=plan.pages, token_ids=[0] * sum(plan.kv_lens))
    slots = torch.tensor(past.cache_slots(layout.page_size))
    for _ in range(2):
        pool = torch.full(size, -FOREIGN if pools else FOREIGN)
        pool.flatten(0, 1)[slots] = torch.randn(len(slots), *size[2:], generator=generator)
        pool = pool if layout.order == "NHD" else pool.transpose(1, 2).contiguous()
        pools.append(pool.to(shape.kv_dtype))
    return pools[0], pools[1]


def make_triton_plan(
    plan: StepPlan, shape: AttentionShape, layout: KVLayout, tuning: Tuning = SMALL, cores: int = MANY_CORES
) -> TritonAttentionPlan:
    return triton_plan(plan, shape, layout, device=PLACE, cores=cores, tuning=tuning)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_plans_name_the_slots_that_the_step_names(page_size: int) -> None:
    plan = make_plan(page_size, [(5, 5), (1, 16), (1, 17), (3, 33), (16, 16)])
    shape, layout = AttentionShape(2, 1, 16, torch.float32, torch.float32), KVLayout(page_size)
    made = make_triton_plan(plan, shape, layout)
    assert made.cache_slots.tolist() == plan.cache_slots(page_size)
    assert made.kv_lens.tolist() == [16, 17, 5, 33, 16], "rows with one new token come first"
    assert made.decode_lens.tolist() == [16, 17]
    fixed = FixedPlan(Bucket(5, plan.num_tokens), 40, shape, layout, device=PLACE, cores=1, tuning=SMALL)
    fixed.update(plan)
    assert fixed.alone.cache_slots.tolist() == plan.cache_slots(page_size)
    assert fixed.alone.decode_lens.tolist() == [0, 16, 17, 0, 0]
    tiles = made.tiles.tolist()
    assert sorted(first for _, first in fixed.alone.tiles.tolist()[: len(tiles)]) == sorted(first for _, first in tiles)
    assert {row for row, _ in fixed.alone.tiles.tolist()[len(tiles) :]} == {-1}, "what is left of the tiles is no work"


def test_tiles_with_the_most_keys_come_first_and_each_new_token_has_one() -> None:
    plan = make_plan(4, [(20, 20), (1, 50), (9, 90)])
    shape = AttentionShape(2, 1, 16, torch.bfloat16, torch.bfloat16)
    made = make_triton_plan(plan, shape, KVLayout(4))
    covered = [(place, first) for place, first in made.tiles.tolist()]
    assert covered == [(2, 8), (2, 0), (1, 16), (1, 8), (1, 0)], "tiles of 16 rows have 8 tokens of 2 heads"


def test_a_fixed_plan_keeps_its_addresses_and_forgets_the_step_before() -> None:
    shape, layout = AttentionShape(4, 2, 16, torch.float32, torch.float32), KVLayout(4)
    fixed = FixedPlan(Bucket(4, 40), 128, shape, layout, device=PLACE, cores=MANY_CORES, tuning=SMALL)
    tables = (fixed.alone.page_table, fixed.alone.tiles, fixed.alone.cache_slots)
    addresses = [table.data_ptr() for table in tables]
    for rows in ([(30, 128), (1, 99)], [(1, 1), (1, 2), (3, 7)], [(1, 127), (1, 4), (1, 5)]):
        plan = pad_plan(make_plan(4, rows), Bucket(4, 40), 4)
        check_attention(plan, shape, layout, fixed.update(plan), tokens=sum(query_len for query_len, _ in rows))
    tables = (fixed.alone.page_table, fixed.alone.tiles, fixed.alone.cache_slots)
    assert addresses == [table.data_ptr() for table in tables]


def test_rows_without_tokens_change_nothing_for_the_others() -> None:
    shape, layout = AttentionShape(4, 2, 16, torch.float32, torch.float32), KVLayout(4)
    bucket = Bucket(9, 16)
    fixed = FixedPlan(bucket, 128, shape, layout, device=PLACE, cores=MANY_CORES, tuning=SMALL)
    for rows in ([(13, 60), (1, 99), (2, 2)], [(1, 9), (12, 90), (1, 5)]):
        plan = make_plan(4, rows)
        padded = pad_plan(plan, bucket, 4)
        assert 0 in padded.query_lens
        check_attention(padded, shape, layout, fixed.update(padded), tokens=plan.num_tokens)


def share(plan: StepPlan, rows: Sequence[int], pages: int) -> StepPlan:
    """`plan` with the first pages of these rows those of the first one of them, as far as it has so many."""
    pages = min(pages, len(plan.pages[rows[0]]))
    return replace(
        plan,
        pages=[
            [*plan.pages[rows[0]][:pages], *own[pages:]] if row in rows else list(own)
            for row, own in enumerate(plan.pages)
        ],
    )


MIXED_ROWS = [(1, 61), (5, 30), (1, 41), (1, 99), (1, 44), (1, 12), (1, 70)]
PROMPT_ROWS = [(2, 61), (2, 58), (12, 60), (1, 77), (1, 70), (3, 99), (2, 2), (19, 90)]


Case = tuple[torch.dtype, Rows, list[list[int]], int, int]
SHARING: dict[str, Case] = {
    "decode": (torch.float32, MIXED_ROWS, [[0, 2, 3]], 9, 10),
    "two groups": (torch.bfloat16, MIXED_ROWS, [[0, 2, 3], [4, 6]], 10, 10),
    "prompts": (torch.float32, PROMPT_ROWS, [[0, 1, 2]], 12, 10),
    "prompts, one program for each tile": (torch.float32, PROMPT_ROWS, [[0, 1, 2]], 12, 1),
    "prompts and decode": (torch.bfloat16, PROMPT_ROWS, [[7, 0, 3, 1]], 12, 10),
    "two groups of both": (torch.float16, PROMPT_ROWS, [[1, 0], [4, 5]], 12, 10),
    "short prompts and a long one": (torch.float32, [(50, 90), *[(5, 45)] * 6], [[0, 2, 3, 5, 6]], 10, 1),
}


@pytest.mark.parametrize(("dtype", "rows", "groups", "pages", "cores"), SHARING.values(), ids=SHARING)
def test_rows_that_begin_alike_read_their_keys_together(
    dtype: torch.dtype, rows: Rows, groups: list[list[int]], pages: int, cores: int
) -> None:
    shape, layout = AttentionShape(2, 1, 16, dtype, dtype), KVLayout(4)
    tuning = replace(SMALL, shared_queries=16, split_keys=16)
    plan = make_plan(4, rows)
    for group in groups:
        plan = share(plan, group, pages)
    planned = make_triton_plan(plan, shape, layout, tuning, cores)
    assert planned.shared is not None
    sharing = {row for group in groups for row in group}
    assert sorted(planned.shared.lens.tolist()) == sorted(4 * pages * (row in sharing) for row in range(len(rows)))
    assert (planned.shared.most_splits > 1) == (cores > 1)
    check_attention(plan, shape, layout, planned, tuning=tuning)

    bucket = Bucket(len(rows) + 2, plan.num_tokens + 5)
    fixed = FixedPlan(bucket, 128, shape, layout, device=PLACE, cores=cores, tuning=tuning)
    padded = pad_plan(plan, bucket, 4)
    assert fixed.update(padded) is fixed.together
    check_attention(padded, shape, layout, fixed.together, tokens=plan.num_tokens, tuning=tuning)


@pytest.mark.parametrize("rows", [[(5, 61)], [(1, 30), (7, 90), (3, 12), (9, 77)]])
def test_keys_of_few_prompts_are_split_among_programs(rows: Rows) -> None:
    shape, layout = AttentionShape(2, 1, 16, torch.float32, torch.float32), KVLayout(4)
    tuning = replace(SMALL, split_keys=16, lonely_keys=32)
    plan = make_plan(4, rows)
    planned = make_triton_plan(plan, shape, layout, tuning, 40)
    assert planned.shared is not None
    alone = [(kv_len - new) // 4 * 4 for new, kv_len in rows if new > 1 and kv_len - new >= 32]
    assert sorted(filter(None, planned.shared.lens.tolist())) == sorted(alone)
    assert planned.shared.most_splits > 1
    check_attention(plan, shape, layout, planned, tuning=tuning)

    bucket = Bucket(len(rows) + 2, plan.num_tokens + 5)
    fixed = FixedPlan(bucket, 128, shape, layout, device=PLACE, cores=40, tuning=tuning)
    padded = pad_plan(plan, bucket, 4)
    assert fixed.update(padded) is fixed.together
    check_attention(padded, shape, layout, fixed.together, tokens=plan.num_tokens, tuning=tuning)


def test_buffers_of_fixed_size_forget_what_rows_shared_and_windows_share_nothing() -> None:
    shape, layout, bucket = AttentionShape(2, 2, 16, torch.float32, torch.float32), KVLayout(4), Bucket(4, 12)
    fixed = FixedPlan(bucket, 64, shape, layout, device=PLACE, cores=4, tuning=SMALL)
    plan = pad_plan(share(make_plan(4, [(2, 62), (3, 59), (1, 57)]), [0, 1, 2], 14), bucket, 4)
    assert fixed.update(plan) is fixed.together
    check_attention(plan, shape, layout, fixed.together, window=7, tokens=6)
    plan = pad_plan(make_plan(4, [(1, 62), (3, 59), (2, 57)]), bucket, 4)
    assert fixed.update(plan) is fixed.alone
    for planned in (fixed.alone, fixed.together):
        check_attention(plan, shape, layout, planned, tokens=6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "kv_dtype", "tuning"),
    [
        (6, 2, 20, torch.float8_e4m3fn, SMALL),
        (20, 1, 16, torch.float8_e5m2, Tuning(shared_keys=40)),
        (2, 2, 128, torch.bfloat16, Tuning(shared_keys=40)),
    ],
)
def test_shared_keys_of_other_shapes_and_8_bits(
    heads: int, kv_heads: int, dim: int, kv_dtype: torch.dtype, tuning: Tuning
) -> None:
    shape, layout = AttentionShape(heads, kv_heads, dim, torch.bfloat16, kv_dtype), KVLayout(4, "HND")
    plan = share(make_plan(4, PROMPT_ROWS[:4]), [0, 1, 3], 13)
    planned = make_triton_plan(plan, shape, layout, tuning, cores=4)
    assert planned.shared is not None
    check_attention(plan, shape, layout, planned, tuning=tuning)


def test_what_rows_share_is_merged_into_what_another_way_made_of_their_own_keys() -> None:
    shape, layout = AttentionShape(6, 2, 20, torch.float32, torch.float32), KVLayout(4)
    sharing, keys = [1, 3, 7], 48
    plan = share(make_plan(4, PROMPT_ROWS), sharing, keys // 4)
    planned = make_triton_plan(plan, shape, layout)
    assert planned.shared is not None
    q, _, _ = stacked_heads(plan.num_tokens, 6, 2, 20, torch.float32)
    pools = make_pools(plan, shape, layout)
    wanted = REFERENCE.attention(q, *pools, reference_plan(plan, layout, PLACE), scale=0.3, sliding_window=None)
    state = attend_shared(q, *pools, planned.page_table, planned.shared, scale=0.3, tuning=SMALL)
    found, own_lse = wanted.clone(), torch.full((plan.num_tokens, 6), float("nan"))
    token = 0
    for row, (query_len, kv_len) in enumerate(PROMPT_ROWS):
        for position in range(kv_len - query_len, kv_len):
            if row in sharing and query_len > 1:
                at = torch.arange(keys, position + 1)
                own = [pool[torch.tensor(plan.pages[row])[at // 4], at % 4].repeat_interleave(3, 1) for pool in pools]
                scores = torch.einsum("hd,khd->hk", q[token], own[0]) * 0.3
                found[token] = torch.einsum("hk,khd->hd", scores.softmax(-1), own[1])
                own_lse[token] = scores.logsumexp(-1) / math.log(2)
            token += 1
    assert (found - wanted).abs().max() > 0.1
    # The first row is none of them.
    first = PROMPT_ROWS[0][0]
    tables = (planned.tiles, planned.query_lens, planned.query_starts)
    merge_shared(found, own_lse[first:], first, state, *tables, kv_heads=2, tuning=SMALL)
    close(found, wanted)


def test_sharing_is_found_where_it_pays_and_as_long_as_it_goes() -> None:
    plan = make_plan(4, [(1, 61), (1, 62), (1, 63), (1, 64), (5, 61), (1, 9)])
    plan = share(share(plan, [0, 1, 2, 3, 4], 2), [2, 3], 15)
    assert find_sharing(plan, 4, worth=40, per_tile=10) == [Group([3, 2], 60)]
    assert find_sharing(plan, 4, worth=61, per_tile=10) == []
    (found,) = find_sharing(plan, 4, worth=32, per_tile=10)
    assert (sorted(found.rows), found.keys) == ([0, 1, 2, 3, 4], 8), "nine tokens fit one tile instead of five"
    (found,) = find_sharing(plan, 4, worth=24, per_tile=8, most_tiles=2)
    assert sorted(found.rows) == [0, 1, 2, 3, 4], "the fifth needs another tile, but is not left alone"
    assert find_sharing(plan, 4, worth=24, per_tile=8, most_tiles=1) == []


def test_prompts_share_what_is_older_than_all_their_new_tokens() -> None:
    plan = share(make_plan(4, [(3, 40), (9, 40), (2, 41)]), [0, 1, 2], 10)
    assert find_sharing(plan, 4, worth=1, per_tile=16) == [Group([2, 0, 1], 28)]
    assert find_sharing(plan, 4, worth=1, per_tile=12) == [Group([2, 0], 36)]
    assert find_sharing(plan, 4, worth=1, per_tile=1) == [], "rows that fill their tiles save nothing together"


def test_prompts_stand_alone_where_they_are_few_and_have_many_keys() -> None:
    plan = make_plan(4, [(3, 43), (9, 60), (1, 99), *[(5, 20)] * 9])
    limits = {"keys": 40, "per_tile": 8}
    assert find_lonely(plan, 4, [], fill=4, most_tiles=9, **limits) == [Group([0], 40), Group([1], 48)]
    assert find_lonely(plan, 4, [Group([1, 2], 20)], fill=4, most_tiles=9, **limits) == [Group([0], 40)]
    assert find_lonely(plan, 4, [], fill=3, most_tiles=9, **limits) == [], "they fill the chip"
    assert find_lonely(plan, 4, [], fill=4, most_tiles=2, **limits) == [Group([0], 40)]


def test_lists_of_pages_are_converted_once_and_followed_as_they_grow() -> None:
    lists = PageLists()
    one, other = [3, 4, 5], [6]
    for _ in range(40):
        arrays = lists.arrays([one, other])
        assert [array[: len(each)].tolist() for array, each in zip(arrays, (one, other), strict=True)] == [one, other]
        one.append(len(one))
    kept = lists.arrays([one, other])[1]
    assert lists.arrays([other])[0] is kept
    assert lists.arrays([[9, 8]])[0][:2].tolist() == [9, 8]


@pytest.mark.parametrize("seed", range(40))
def test_sharing_is_found_exactly_where_some_rows_are_worth_it(seed: int) -> None:
    draw = random.Random(seed)
    rows = [(draw.choice((1, 1, draw.randint(2, 9))), draw.randint(10, 60)) for _ in range(4)]
    plan = make_plan(2, rows)
    for first in (0, 1, 2):
        plan = share(plan, [row for row in range(first, 4) if draw.random() < 0.7] or [0], draw.randint(0, 20))
    worth, per_tile = draw.randint(1, 60), draw.choice((1, 4, 8))

    def saved(group: Sequence[int], keys: int) -> int:
        needed = [-(-rows[row][0] // per_tile) for row in group]
        return keys * (sum(needed) - -(-sum(rows[row][0] for row in group) // per_tile))

    def common_keys(group: Sequence[int]) -> int:
        past = min((rows[row][1] - rows[row][0]) // 2 for row in group)
        same = (len({plan.pages[row][page] for row in group}) == 1 for page in range(past))
        return 2 * len(list(itertools.takewhile(bool, same)))

    groups = [group for count in (2, 3, 4) for group in itertools.combinations(range(4), count)]
    best = max(saved(group, common_keys(group)) for group in groups)
    found = find_sharing(plan, 2, worth=worth, per_tile=per_tile)
    assert bool(found) == (best >= worth)
    for each in found:
        assert each.keys == common_keys(each.rows)
        assert saved(each.rows, each.keys) >= worth


@pytest.mark.parametrize("seed", range(20))
def test_pages_in_common_are_counted_as_by_looking_at_each(seed: int) -> None:
    draw = random.Random(seed)
    one = draw.sample(range(1, 99), draw.randint(1, 30))
    same = draw.randint(0, len(one))
    other = one[:same] + draw.sample(range(100, 200), draw.randint(0, 9))
    plan = replace(make_plan(1, [(1, len(one) + 1), (1, len(other) + 1)]), pages=[[*one, 300], [*other, 301]])
    found = find_sharing(plan, 1, worth=1, per_tile=8)
    assert [group.keys for group in found] == ([same] if same else [])


def test_a_fixed_plan_refuses_steps_that_are_not_of_its_size() -> None:
    shape, layout = AttentionShape(4, 2, 16, torch.float32, torch.float32), KVLayout(4)
    fixed = FixedPlan(Bucket(2, 2), 64, shape, layout, device=PLACE, cores=1, tuning=SMALL)
    with pytest.raises(ValueError, match="3 tokens in 1 rows"):
        fixed.update(make_plan(4, [(3, 3)]))
    with pytest.raises(ValueError, match="a row has 65 tokens"):
        fixed.update(make_plan(4, [(1, 65), (1, 1)]))


# Attention.


def check_attention(
    plan: StepPlan,
    shape: AttentionShape,
    layout: KVLayout,
    planned: TritonAttentionPlan,
    window: int | None = None,
    tokens: int | None = None,
    tuning: Tuning = SMALL,
) -> None:
    """Against the reference in float32, over pools with NaN behind each row's end; `tokens`: those before padding."""
    q, _, _ = stacked_heads(plan.num_tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype)
    k_pool, v_pool = (
        pool.float().masked_fill(pool.float().abs() == FOREIGN, float("nan")).to(pool.dtype)
        for pool in make_pools(plan, shape, layout)
    )
    scale = shape.head_dim**-0.5
    found = TritonOps(tuning).attention(q, k_pool, v_pool, planned, scale=scale, sliding_window=window)
    wanted = REFERENCE.attention(
        q.float(),
        k_pool.float(),
        v_pool.float(),
        reference_plan(plan, layout, PLACE),
        scale=scale,
        sliding_window=window,
    )
    close(found[:tokens], wanted[:tokens])
    lasts = planned.of_last_tokens()
    if lasts is planned:
        return
    found = TritonOps(tuning).attention(q, k_pool, v_pool, lasts, scale=scale, sliding_window=window)
    real = plan.num_tokens if tokens is None else tokens
    last = [after - 1 for after in itertools.accumulate(plan.query_lens) if after <= real]
    close(found[last], wanted[last])


PAGE = 8
LENGTHS = [1, 7, PAGE, PAGE + 1, 3 * PAGE, 15 * PAGE + 3]


WAYS: list[tuple[torch.dtype, Literal["NHD", "HND"], int | None]] = [
    *((torch.float32, "NHD", window) for window in (None, 1, 17, 1000)),
    (torch.float32, "HND", 17),
    (torch.float32, "HND", None),
    (torch.bfloat16, "NHD", None),
    (torch.float16, "HND", 17),
]


@pytest.mark.parametrize(("dtype", "order", "window"), WAYS)
@pytest.mark.parametrize("cores", [1, 10, MANY_CORES])
def test_decode_at_all_lengths_in_any_number_of_splits(
    dtype: torch.dtype, order: Literal["NHD", "HND"], window: int | None, cores: int
) -> None:
    shape, layout = AttentionShape(4, 2, 16, dtype, dtype), KVLayout(PAGE, order)
    plan = make_plan(PAGE, [(1, length) for length in LENGTHS])
    planned = make_triton_plan(plan, shape, layout, cores=cores)
    assert planned.decode_splits == {1: 1, 10: 2, MANY_CORES: 4}[cores]
    check_attention(plan, shape, layout, planned, window)


@pytest.mark.parametrize(("dtype", "order", "window"), WAYS)
def test_prefill_of_prompts_and_chunks_at_all_lengths(
    dtype: torch.dtype, order: Literal["NHD", "HND"], window: int | None
) -> None:
    shape, layout = AttentionShape(4, 2, 16, dtype, dtype), KVLayout(PAGE, order)
    rows = [(new, length) for length in LENGTHS for new in sorted({min(2, length), length, (length + 1) // 2})]
    plan = make_plan(PAGE, rows)
    check_attention(plan, shape, layout, make_triton_plan(plan, shape, layout), window)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 16), (6, 2, 20), (8, 1, 64), (20, 1, 16), (4, 4, 128)])
@pytest.mark.parametrize("tuning", [SMALL, Tuning()], ids=["small tiles", "default tiles"])
def test_attention_of_head_groups_and_sizes(heads: int, kv_heads: int, dim: int, tuning: Tuning) -> None:
    shape, layout = AttentionShape(heads, kv_heads, dim, torch.float32, torch.float32), KVLayout(PAGE)
    plan = make_plan(PAGE, [(5, 5), (1, 40), (9, 30), (1, 1)])
    check_attention(plan, shape, layout, make_triton_plan(plan, shape, layout, tuning), tuning=tuning)


def test_attention_of_very_large_scores_does_not_overflow() -> None:
    shape, layout = AttentionShape(2, 1, 16, torch.float32, torch.float32), KVLayout(PAGE)
    plan = make_plan(PAGE, [(1, 100), (20, 60)])
    q = torch.randn(21, 2, 16) * 1e4
    pools = make_pools(plan, shape, layout)
    planned, theirs = make_triton_plan(plan, shape, layout), reference_plan(plan, layout, PLACE)
    found = TritonOps(SMALL).attention(q, *pools, planned, scale=1.0, sliding_window=None)
    wanted = REFERENCE.attention(q, *pools, theirs, scale=1.0, sliding_window=None)
    # A score of 1e5 carries an error of 1e-2, which the exponential sees: near ties differ, but nothing is infinite.
    assert torch.isfinite(found).all()
    assert ((found - wanted).abs() < 1e-2).float().mean() > 0.9


def test_splits_fill_the_chip_and_no_more() -> None:
    tuning = Tuning(max_splits=32, split_keys=256)
    assert choose_splits(256, 8, 4096, 132, tuning) == 1
    assert choose_splits(1, 8, 131072, 132, tuning) == 32
    assert choose_splits(4, 8, 131072, 132, tuning) == 16
    assert choose_splits(1, 8, 100, 132, tuning) == 1, "one split is no work to reduce"
    assert choose_splits(0, 8, 100, 132, tuning) == 1


def test_programs_that_share_keys_leave_little_of_the_chip_idle() -> None:
    tuning = Tuning(max_splits=32, split_keys=256)

    def choose(tiles: int, keys: int, most: int = 99) -> int:
        return choose_shared_splits(tiles, 8, keys, 132, most, tuning)

    assert choose(16, 32_000) == 1, "128 programs for 132 cores"
    assert choose(4, 32_000) == 4
    assert choose(4, 700) == 2, "no split is shorter than 256 keys"
    assert choose(1, 10**6) == 16
    assert choose(40, 10**6) == 1, "results of many programs take memory"
    assert choose(1, 10**6, 5) == 5
    assert choose(0, 0) == 1


# Sampling.


@pytest.mark.parametrize("vocabulary", [1, 7, CHUNK // 4, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_greedy_at_all_sizes(dtype: torch.dtype, vocabulary: int) -> None:
    logits = torch.randn(5, vocabulary + 3).to(dtype)[:, :vocabulary] * 8
    tokens, sums = OPS.greedy(logits)
    assert tokens.tolist() == [row.tolist().index(row.max().item()) for row in logits]
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_greedy_leaves_out_what_is_ruled_out() -> None:
    logits = torch.full((2, 2 * CHUNK + 5), float("-inf"))
    logits[0, 7], logits[1, [CHUNK + 1, 2 * CHUNK + 1]] = -3.0, 100.0
    tokens, sums = OPS.greedy(logits)
    assert tokens.tolist() == [7, CHUNK + 1]
    torch.testing.assert_close(sums, torch.tensor([-3.0, 100.0 + math.log(2.0)]))


def test_greedy_takes_the_first_of_equals_wherever_they_are() -> None:
    logits, block = torch.zeros(4, 3 * CHUNK + 5), CHUNK // 4
    for row, places in enumerate([(3 * CHUNK, 3 * CHUNK + 4), (CHUNK - 1, CHUNK), (block - 1, block, 2 * CHUNK), ()]):
        logits[row, list(places)] = 1.0
    assert OPS.greedy(logits)[0].tolist() == [3 * CHUNK, CHUNK - 1, block - 1, 0]


def test_greedy_stays_in_the_vocabulary_whatever_the_logits() -> None:
    logits, place = torch.randn(3, CHUNK + 5), CHUNK + 3
    logits[0] = float("-inf")
    logits[1, place] = float("nan")
    logits[2] = float("nan")
    assert OPS.greedy(logits)[0].tolist() == [0, place, 0]
    seeds = torch.arange(3)
    assert OPS.sample(logits, torch.ones(3), seeds, seeds).tolist() == [0, place, 0]


@pytest.mark.parametrize("vocabulary", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_sample_draws_what_the_reference_draws_but_for_rounding(vocabulary: int, spread: float) -> None:
    rows = 24
    logits = torch.randn(rows, vocabulary + 3)[:, :vocabulary] * spread
    temperature = torch.rand(rows) * 1.5 + 0.1
    draw = random.Random(int(torch.randint(1 << 31, (1,))))
    seeds, indices = [draw.getrandbits(64) for _ in range(rows)], [draw.randrange(1 << 20) for _ in range(rows)]
    numbers = torch.tensor([uniform(seed, index) for seed, index in zip(seeds, indices, strict=True)])[:, None].double()
    found = OPS.sample(logits, temperature, signed(seeds), torch.tensor(indices))
    wanted = filters.draw(logits / temperature[:, None], numbers)
    reached = (logits.double() / temperature[:, None].double()).softmax(-1).cumsum(-1)
    same = found == wanted
    assert same.sum() >= rows - 2
    # Where they differ the number lies within rounding of the border between the two tokens.
    for row in (~same).nonzero()[:, 0].tolist():
        border = reached[row, min(int(found[row]), int(wanted[row])) : max(int(found[row]), int(wanted[row]))]
        assert (border - numbers[row]).abs().max() < 1e-6


def test_sample_at_temperature_zero_is_greedy_beside_rows_that_are_drawn() -> None:
    logits = torch.randn(4, CHUNK + 5)
    seeds = torch.arange(4)
    found = OPS.sample(logits, torch.tensor([0.0, 1.0, -1.0, 1e-6]), seeds, seeds)
    greedy = logits.argmax(-1)
    assert [found[row].item() for row in (0, 2, 3)] == [greedy[row].item() for row in (0, 2, 3)]


def test_sample_never_takes_a_token_that_is_ruled_out() -> None:
    logits = torch.full((64, 3 * CHUNK), float("-inf"))
    allowed = [5, CHUNK - 1, CHUNK, 3 * CHUNK - 1]
    logits[:, allowed] = 0.0
    found = OPS.sample(logits, torch.ones(64), torch.arange(64), torch.zeros(64, dtype=torch.int64))
    assert set(found.tolist()) == set(allowed), "64 draws of four likely tokens meet each"


def test_sample_draws_tokens_as_often_as_they_are_likely() -> None:
    rows = 120
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = probabilities.log().expand(rows, 4).contiguous()
    seeds = torch.randint(-(2**62), 2**62, (rows,))
    counts = OPS.sample(logits, torch.ones(rows), seeds, torch.arange(rows)).bincount(minlength=4)
    error = (probabilities * (1 - probabilities) * rows).sqrt()
    assert ((counts - probabilities * rows).abs() < 6 * error).all()


def signed(numbers: Sequence[int]) -> torch.Tensor:
    """The bits of unsigned 64-bit numbers."""
    return torch.tensor([number - (1 << 64) if number >= 1 << 63 else number for number in numbers])


# The contract of a device.


class TritonDevice(ReferenceDevice):
    """What a device of these kernels looks like: exact plans for free shapes, buffers that stay for its buckets."""

    def __init__(self) -> None:
        super().__init__(KVLayout(16), name="triton")
        self.torch_device = PLACE
        self.ops = OPS
        self._limits: StepLimits | None = None
        self._fixed: dict[tuple[Bucket, AttentionShape], FixedPlan] = {}

    def plan_attention(  # type: ignore[override]
        self, plan: StepPlan, shape: AttentionShape, layout: KVLayout, bucket: Bucket | None = None
    ) -> AttentionPlan:
        tuning, limits = OPS.tuning, self._limits
        if limits is None or bucket is None:
            return triton_plan(plan, shape, layout, device=PLACE, cores=4, tuning=tuning)
        fixed = self._fixed.get((bucket, shape))
        if fixed is None:
            fixed = FixedPlan(bucket, limits.max_kv_len, shape, layout, device=PLACE, cores=4, tuning=tuning)
            self._fixed[bucket, shape] = fixed
        return fixed.update(plan)

    def buckets(self, limits: StepLimits) -> Sequence[Bucket]:
        self._limits = limits
        rows = [1 << power for power in range((limits.max_rows - 1).bit_length() + 1)]
        return [*(Bucket(count, count) for count in rows), Bucket(limits.max_rows + 1, limits.max_tokens)]

    def capture(self, forward: Forward, example: StepInput, bucket: Bucket) -> Forward:
        """As a graph would: it only ever reads the tensors of the example."""
        del bucket

        def replay(step: StepInput) -> torch.Tensor:
            assert step.numbers is example.numbers
            return forward(replace(example, attention=step.attention))

        return replay


class TestTritonDevice(DeviceContract):
    longest = 100
    dtypes = ("float32",)
    head_dims = (16, 64)
    # What ranks exchange has no kernel here, and gloo does not take an accelerator's memory.
    world_sizes = DeviceContract.world_sizes if interpreted() else ()

    def make_device(self) -> Device:
        return TritonDevice()
