"""The native kernels' index arithmetic, barriers and copies, on a CPU: see `emulated.h`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from emulation import EmulatedLauncher

from tgi_backend_cuda.native.attention import AttentionTuning, DecodeRows
from tgi_backend_cuda.native.linear import LinearTuning, LinearTunings
from tgi_backend_cuda.native.ops import NativeOps
from tgi_backend_cuda.native.wide import WideTuning, WideTunings
from tgi_model_server.device import HeadNorms, KVLayout
from tgi_model_server.reference import ReferenceOps, ReferencePlan

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="emulated kernels are compiled by g++"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
EPS = 1e-5
REFERENCE = ReferenceOps()
SMALL = LinearTuning(warps=4, stages=3, blocks=1, prefetch=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels are kept from one test to the next."""
    return tmp_path_factory.mktemp("emulated")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.float() @ weight.float().T + bias.float()


def poisoned(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(size, float("nan"), dtype=dtype)


@pytest.mark.parametrize(
    ("tokens", "dtype", "tuning"),
    [
        (1, torch.bfloat16, SMALL),
        (3, torch.float16, replace(SMALL, stages=2, tiles=2, blocks=2)),
        (8, torch.bfloat16, replace(SMALL, warps=3, stages=4, prefetch=0)),
    ],
)
def test_products_of_odd_sizes_are_those_of_the_reference(
    folder: Path, tokens: int, dtype: torch.dtype, tuning: LinearTuning
) -> None:
    ops = NativeOps(EmulatedLauncher(folder, multiprocessors=5), LinearTunings(tuning, tuning, tuning, tuning, tuning))
    compare_products(ops, tokens, dtype, ((8, 5), (200, 37), (1032, 130)))


@pytest.mark.parametrize(
    ("tokens", "dtype", "tuning", "multiprocessors", "shapes"),
    [
        (9, torch.bfloat16, WideTuning(stages=2, rotate=3), 9, ((8, 8), (520, 136), (64, 600))),
        (33, torch.float16, WideTuning(groups=2, rotate=0), 9, ((200, 40), (328, 136))),
    ],
)
def test_products_of_many_rows_are_those_of_the_reference_however_blocks_share_them(
    folder: Path,
    tokens: int,
    dtype: torch.dtype,
    tuning: WideTuning,
    multiprocessors: int,
    shapes: tuple[tuple[int, int], ...],
) -> None:
    launcher = EmulatedLauncher(folder, multiprocessors)
    ops = NativeOps(launcher, wide=WideTunings(tuning, tuning, tuning, tuning))
    compare_products(ops, tokens, dtype, shapes)


def compare_products(ops: NativeOps, tokens: int, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]) -> None:
    allowed = 5e-3 if dtype == torch.bfloat16 else 1e-3
    for columns, rows in shapes:
        torch.manual_seed(columns)
        x, norm = torch.randn(tokens, columns).to(dtype), torch.randn(columns).to(dtype)
        weight, bias = (torch.randn(2 * rows, columns) / columns**0.5).to(dtype), torch.randn(2 * rows).to(dtype)
        half, half_bias, residual = weight[:rows], bias[:rows], torch.randn(tokens, rows).to(dtype)
        normed = REFERENCE.rms_norm(x, norm, EPS)
        gate, up = product(normed, weight, bias).chunk(2, -1)
        got = ops.norm_gated(x, norm, EPS, weight, bias, out=poisoned(tokens, rows, dtype=dtype))
        assert relative(got, F.silu(gate) * up) < allowed
        want = product(x, half, half_bias) + residual.float()
        assert relative(ops.linear_add(x, half, residual, half_bias), want) < allowed
        if tokens in (1, 9):
            logits = ops.norm_head(x, norm, EPS, half, out=poisoned(tokens, rows, dtype=torch.float32))
            assert relative(logits, product(normed, half, torch.zeros(rows))) < 1e-5


@pytest.mark.parametrize(
    ("lens", "kv_heads", "group", "head_dim", "page", "half", "window", "normed", "dtype", "tuning"),
    [
        ([1, 16, 17, 0, 129], 2, 4, 128, 16, 64, None, False, torch.bfloat16, AttentionTuning(4, 3, 1, 20)),
        ([7, 33, 0, 300], 1, 3, 64, 8, 16, 40, True, torch.float16, AttentionTuning(2, 2, 2, 4)),
    ],
    ids=["splits", "window, head norms, small pages, partial rotation"],
)
def test_attention_over_scattered_pages_is_that_of_the_reference(
    folder: Path,
    lens: list[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    page: int,
    half: int,
    window: int | None,
    normed: bool,
    dtype: torch.dtype,
    tuning: AttentionTuning,
) -> None:
    torch.manual_seed(len(lens))
    ops = NativeOps(EmulatedLauncher(folder, multiprocessors=4), attention=tuning)
    tokens, heads, scale = len(lens), kv_heads * group, head_dim**-0.5
    counts = [-(-length // page) for length in lens]
    pages = [tuple(own.tolist()) for own in (torch.randperm(sum(counts)) + 1).split_with_sizes(counts)]
    table = torch.full((tokens, max(counts) + 1), 1 << 30, dtype=torch.int32)
    k_pool, v_pool = (poisoned(sum(counts) + 1, page, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    for row, own in enumerate(pages):
        table[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        for position in range(max(0, lens[row] - 1)):
            for pool in (k_pool, v_pool):
                pool[own[position // page], position % page] = torch.randn(kv_heads, head_dim).to(dtype)
    last = [length - 1 for length in lens]
    slots = [own[at // page] * page + at % page if own else 0 for own, at in zip(pages, last, strict=True)]
    rows = DecodeRows(table, torch.tensor(lens, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32))
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = torch.rand(tokens, half) * 6
    cos, sin = angles.cos(), angles.sin()
    norms = HeadNorms(torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype), EPS) if normed else None

    q, k, v = qkv.view(tokens, -1, head_dim).split_with_sizes((heads, kv_heads, kv_heads), 1)
    if norms:
        q, k = REFERENCE.rms_norm(q, norms.q_weight, EPS), REFERENCE.rms_norm(k, norms.k_weight, EPS)
    q, k = REFERENCE.rope(q, k, cos, sin)
    live = [row for row in range(tokens) if lens[row]]
    keys, values = k_pool.clone(), v_pool.clone()
    for new, pool in ((k, keys), (v, values)):
        for row in live:
            pool[slots[row] // page, slots[row] % page] = new[row]
    plan = ReferencePlan(
        KVLayout(page),
        tuple(1 for _ in live),
        tuple(lens[row] for row in live),
        tuple(pages[row] for row in live),
        rows.cache_slots,
    )
    want = torch.zeros(tokens, heads, head_dim)
    want[live] = REFERENCE.attention(q[live].float(), keys, values, plan, scale=scale, sliding_window=window)

    for _ in range(2):  # the second finds the counters as the first left them
        out = poisoned(tokens, heads * head_dim, dtype=dtype)
        ops.rope_attention(qkv, cos, sin, k_pool, v_pool, rows, scale=scale, window=window, norms=norms, out=out)
        assert relative(out, want.flatten(1)) < (5e-3 if dtype == torch.bfloat16 else 1e-3)
        assert not any(out[row].any() for row in range(tokens) if not lens[row])
        for pool, expected in zip((k_pool, v_pool), (keys, values), strict=True):
            torch.testing.assert_close(pool, expected, equal_nan=True, rtol=1e-2, atol=1e-3)
