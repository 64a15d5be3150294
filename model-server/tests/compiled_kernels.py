"""Every kernel compiled for chips that are not there. `test_kernels` runs this file in a process of its own."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from tgi_model_server.device import AttentionShape, HeadNorms, KVLayout, StepLimits
from tgi_model_server.kernels.ahead import TARGETS, Built, build, launches
from tgi_model_server.kernels.launch import Tuning, interpreted
from tgi_model_server.kernels.ops import TritonOps
from tgi_model_server.kernels.plan import triton_plan
from tgi_model_server.kernels.warm import compile_attention, start_states
from tgi_model_server.plan import StepPlan
from tgi_model_server.worst_case import largest_plans

assert not interpreted(), "interpreted kernels cannot be compiled"

META = torch.device("meta")
LLAMA_8B = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, kv_dtype=torch.bfloat16)
HIDDEN, INNER, VOCABULARY = 4096, 14336, 128256
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx90a": 64 * 1024, "gfx942": 64 * 1024}
"""What one program can have."""
TUNINGS = {"sm": Tuning(), "gf": Tuning(decode_stages=2, prefill_stages=2)}


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device=META)


def step(rows: list[tuple[int, int]], together: bool = False) -> StepPlan:
    """Rows of (new tokens, KV length), on pages of their own or all on the same."""
    return StepPlan(
        slots=list(range(len(rows))),
        query_lens=[query_len for query_len, _ in rows],
        kv_lens=[kv_len for _, kv_len in rows],
        pages=[[1 if together else row + 1] * -(-kv_len // 16) for row, (_, kv_len) in enumerate(rows)],
        token_ids=[0] * sum(query_len for query_len, _ in rows),
    )


def attend(
    tuning: Tuning,
    rows: list[tuple[int, int]],
    window: int | None = None,
    shape: AttentionShape = LLAMA_8B,
    together: bool = False,
    last_only: bool = False,
) -> torch.Tensor:
    plan = step(rows, together)
    planned = triton_plan(plan, shape, KVLayout(16), device=torch.device("cpu"), cores=132, tuning=tuning)
    planned = planned.of_last_tokens() if last_only else planned
    q, _, _ = stacked(plan.num_tokens, shape)
    pool = empty(100, 16, shape.num_kv_heads, shape.head_dim, dtype=shape.kv_dtype)
    return TritonOps(tuning).attention(q, pool, pool, planned, scale=0.1, sliding_window=window)


def stacked(tokens: int, shape: AttentionShape) -> tuple[torch.Tensor, ...]:
    sizes = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    return empty(tokens, sum(sizes), shape.head_dim, dtype=shape.dtype).split_with_sizes(sizes, 1)


def turn_and_store(tuning: Tuning, norms: HeadNorms | None, kv_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    planned = triton_plan(
        step([(64, 64)]), LLAMA_8B, KVLayout(16), device=torch.device("cpu"), cores=132, tuning=tuning
    )
    angles = empty(64, 64, dtype=torch.float32)
    pool = empty(100, 16, 8, 128, dtype=kv_dtype)
    q, k, v = stacked(64, LLAMA_8B)
    TritonOps(tuning).write_kv(k, v, pool, pool, planned)
    return TritonOps(tuning).rope_write_kv(q, k, v, angles, angles, pool, pool, planned, norms)


def tokens_of(rows: int) -> torch.Tensor:
    logits, numbers = empty(rows, VOCABULARY, dtype=torch.float32), empty(rows, dtype=torch.int64)
    OPS.greedy(logits)
    return OPS.sample(logits, empty(rows, dtype=torch.float32), numbers, numbers)


OPS = TritonOps()
SIMPLE: dict[str, Callable[[], object]] = {
    "rms_norm": lambda: OPS.rms_norm(empty(64, HIDDEN), empty(HIDDEN), 1e-5),
    "rms_norm of heads": lambda: OPS.rms_norm(stacked(64, LLAMA_8B)[0], empty(128), 1e-5),
    "silu_mul": lambda: OPS.silu_mul(empty(64, 2 * INNER)),
    "rope": lambda: OPS.rope(*stacked(64, LLAMA_8B)[:2], *[empty(64, 64, dtype=torch.float32)] * 2),
    "rope and write": lambda: turn_and_store(TUNINGS["sm"], None),
    "norms, rope and write": lambda: turn_and_store(TUNINGS["sm"], HeadNorms(empty(128), empty(128), 1e-6)),
    "greedy and sample": lambda: tokens_of(8),
}


def build_all(call: Callable[[], object], target: str) -> list[Built]:
    noted = launches(call)
    assert noted
    built = [build(launch, target) for launch in noted]
    for launch, each in zip(noted, built, strict=True):
        assert each.shared_bytes <= SHARED_BYTES[target], f"{launch.name}: {each.shared_bytes} bytes of shared memory"
    return built


def test_float8_e4m3_pools_are_written_and_read_by_the_instructions_of_newer_chips() -> None:
    kv_dtype = torch.float8_e4m3fn
    stored = build_all(lambda: turn_and_store(TUNINGS["sm"], None, kv_dtype), "sm_90")
    shape = replace(LLAMA_8B, kv_dtype=kv_dtype)
    read = build_all(lambda: attend(TUNINGS["sm"], [(1, 8000), (64, 100)], None, shape), "sm_90")
    assert all("satfinite.e4m3x2" in each.assembly for each in stored)
    assert sum("cvt.rn.f16x2.e4m3x2" in each.assembly for each in read) == 2
    assert all(each.spilled_bytes == 0 for each in (*stored, *read))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", SIMPLE)
def test_simple_kernels_compile_without_spilling(name: str, target: str) -> None:
    for each in build_all(SIMPLE[name], target):
        assert each.spilled_bytes == 0


@pytest.mark.parametrize(("target", "window"), [*((target, None) for target in TARGETS), ("sm_90", 4096)])
def test_attention_uses_the_matrix_units(target: str, window: int | None) -> None:
    tuning = TUNINGS[target[:2]]
    unit = {"sm_80": "mma.sync", "sm_90": "mma.sync", "gfx90a": "v_mfma", "gfx942": "v_mfma"}
    decode, reduce = build_all(lambda: attend(tuning, [(1, 8000)] * 4, window), target)
    assert unit[target] in decode.assembly
    assert decode.spilled_bytes == reduce.spilled_bytes == 0
    (prefill,) = build_all(lambda: attend(tuning, [(64, 100)], window), target)
    assert {**unit, "sm_90": "wgmma.mma_async"}[target] in prefill.assembly
    # On sm_80 a few registers too many are spilled outside the loop.
    assert prefill.spilled_bytes <= (256 if target == "sm_80" else 0)


@pytest.mark.parametrize("target", TARGETS)
def test_keys_that_rows_share_are_read_with_the_matrix_units(target: str) -> None:
    tuning = TUNINGS[target[:2]]
    shared, *others = build_all(lambda: attend(tuning, [(1, 8000)] * 20, together=True), target)
    unit = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "gfx90a": "v_mfma", "gfx942": "v_mfma"}
    assert unit[target] in shared.assembly
    assert len(others) == 3, "two reductions, and the rows' own keys"
    assert [each.spilled_bytes for each in (shared, *others)] == [0, 0, 0, 0]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_prompts_that_share_keys_use_the_matrix_units_too(target: str) -> None:
    tuning = TUNINGS[target[:2]]
    shared, _, own = build_all(lambda: attend(tuning, [(50, 8050)] * 5, together=True), target)
    unit = {"sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}[target]
    assert all(unit in each.assembly and each.spilled_bytes == 0 for each in (shared, own))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_continues_from_shared_keys_compiles_without_spilling(target: str) -> None:
    built = build_all(lambda: start_states(LLAMA_8B, KVLayout(32), TUNINGS[target[:2]]), target)
    assert [each.spilled_bytes for each in built] == [0] * 5


def compilations(call: Callable[[], object]) -> set[tuple[str, ...]]:
    """What of Triton's is compiled for it."""
    return {
        (each.name, *map(repr, (each.signature, each.constants, each.aligned, each.options))) for each in launches(call)
    }


def test_no_step_finds_a_kernel_that_was_not_compiled_at_the_start() -> None:
    limits, tuning = StepLimits(max_rows=256, max_tokens=8448, max_kv_len=131_072), TUNINGS["sm"]
    layout = KVLayout(16)
    ready = compilations(lambda: compile_attention(LLAMA_8B, layout, limits, cores=132, tuning=tuning, states=False))
    for plan in largest_plans(limits, layout.page_size):
        rows = list(zip(plan.query_lens, plan.kv_lens, strict=True))
        assert compilations(partial(attend, tuning, rows, together=True)) <= ready
    draw = random.Random(0)
    for _ in range(120):
        longest = draw.choice((20, 300, 1500, 6000, 32_000, 100_000))
        rows = [(1, draw.randint(2, longest)) for _ in range(draw.choice((0, 1, 2, 3, 5, 8, 13, 31, 40, 200)))]
        for _ in range(draw.choice((1, 2, 5, 20))):
            new = draw.choice((2, 16, 50, 500))
            rows.append((new, new + draw.choice((0, draw.randint(0, longest)))))
        for together, last_only in itertools.product((False, True), repeat=2):
            found = compilations(partial(attend, tuning, rows, together=together, last_only=last_only))
            assert found <= ready, f"rows of (new, keys) {rows}, together: {together}, last only: {last_only}"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    "shape",
    [
        replace(LLAMA_8B, dtype=torch.float32, kv_dtype=torch.float32),
        replace(LLAMA_8B, head_dim=256),
        replace(LLAMA_8B, head_dim=80, num_kv_heads=32),
        replace(LLAMA_8B, kv_dtype=torch.float8_e5m2),
    ],
    ids=["float32", "heads of 256", "heads of 80", "8-bit pages"],
)
def test_attention_of_other_shapes_fits_the_chip(target: str, shape: AttentionShape) -> None:
    tuning = TUNINGS[target[:2]]
    for each in build_all(lambda: attend(tuning, [(1, 8000), (64, 100)], None, shape), target):
        assert each.spilled_bytes == 0
