"""The native kernels on a real GPU: are they right, how fast is each, and which tuning is best for a whole step.

python backends/cuda/tests/native_gpu.py --check --time --json OUT    (torch and cuda-bindings are all that it needs)
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tgi_backend_cuda.native.attention import FEW_ROWS, MANY_ROWS, AttentionTuning, DecodeRows
from tgi_backend_cuda.native.launch import CudaLauncher
from tgi_backend_cuda.native.linear import MAX_TOKENS, Epilogue, Linear, LinearTuning, LinearTunings
from tgi_backend_cuda.native.ops import NativeOps
from tgi_model_server.device import HeadNorms

GPU = torch.device("cuda")
EPS = 1e-5
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 4096, 32, 8, 128, 14336, 128256
LAYERS = 32
TUNING_LAYERS = 6
"""Enough to leave no weight in L2 from one replay to the next."""
KINDS = ("norm_linear", "linear_add", "norm_gated", "head")
DIVISIONS = [
    # warps, stages, tiles, blocks
    (16, 4, 1, 1),
    (8, 6, 1, 2),
    (16, 3, 1, 2),
    (8, 4, 1, 2),
    (8, 3, 1, 3),
    (8, 3, 2, 2),
    (8, 4, 2, 1),
    (16, 2, 2, 1),
    (4, 8, 1, 2),
    (4, 6, 2, 2),
]
PREFETCHES = (0, 2048, 8192)
ATTENTIONS = [
    # warps, stages, least, blocks
    (4, 3, 4, 2),
    (4, 2, 4, 2),
    (4, 2, 8, 2),
    (4, 3, 8, 2),
    (8, 2, 8, 1),
    (8, 2, 8, 2),
    (8, 2, 16, 1),
    (2, 4, 4, 4),
    (4, 2, 2, 4),
]
PAGE = 16
LENGTHS = (400, 8000)
"""Keys of each sequence in the timed steps."""
CAPACITY = 32768
"""Keys that the timed page tables have room for."""


# --- Right? ---


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """NaN counts as infinitely wrong."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    return error if error == error else float("inf")


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.float() @ weight.float().T
    return out if bias is None else out + bias.float()


def random(*size: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*size, device=GPU) * scale).to(dtype)


def poisoned(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(size, float("nan"), device=GPU, dtype=dtype)


def check_linear(ops: NativeOps, tokens: int, columns: int, rows: int, dtype: torch.dtype, biased: bool) -> float:
    """The largest error of all products of one shape, in units of what is allowed."""
    x, norm = random(tokens, columns, dtype=dtype), random(columns, dtype=dtype)
    weight = random(2 * rows, columns, dtype=dtype, scale=columns**-0.5)
    bias = random(2 * rows, dtype=dtype) if biased else None
    residual = random(tokens, rows, dtype=dtype)
    half, half_bias = weight[:rows], None if bias is None else bias[:rows]
    # Rounding alone is 1.7e-3 of many numbers; of a single one it may be 4e-3.
    allowed = (3e-3 if tokens * rows > 1000 else 5e-3) if dtype == torch.bfloat16 else 1e-3
    worst = relative(
        ops.linear(x, half, half_bias, out=poisoned(tokens, rows, dtype=dtype)), product(x, half, half_bias)
    )
    want = product(x, half, half_bias) + residual.float()
    worst = max(worst, relative(ops.linear_add(x, half, residual, half_bias), want))
    if ops.supports(tokens, columns, dtype, normed=True):
        normed = rms_norm(x, norm)
        got = ops.norm_linear(x, norm, EPS, half, half_bias, out=poisoned(tokens, rows, dtype=dtype))
        worst = max(worst, relative(got, product(normed, half, half_bias)))
        gate, up = product(normed, weight, bias).chunk(2, -1)
        got = ops.norm_gated(x, norm, EPS, weight, bias, out=poisoned(tokens, rows, dtype=dtype))
        worst = max(worst, relative(got, F.silu(gate) * up))
        got = ops.norm_head(x, norm, EPS, half, out=poisoned(tokens, rows, dtype=torch.float32))
        worst = max(worst, relative(got, product(normed, half, None)))
    return worst / allowed


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat(((first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype), rest), dim=-1)


@dataclass
class Sequences:
    """Rows of some lengths over scattered pages; what is no key of theirs is NaN."""

    lens: list[int]
    pages: list[torch.Tensor]
    rows: DecodeRows
    k_pool: torch.Tensor
    v_pool: torch.Tensor


def sequences(lens: Sequence[int], kv_heads: int, head_dim: int, page: int, dtype: torch.dtype) -> Sequences:
    counts = [-(-length // page) for length in lens]
    scattered = torch.randperm(sum(counts), device=GPU) + 1
    pages = list(scattered.split_with_sizes(counts))
    table = torch.full((len(lens), max(counts) + 3), 1 << 30, device=GPU, dtype=torch.int32)
    pools = [poisoned(sum(counts) + 1, page, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    slots = []
    for row, (length, own) in enumerate(zip(lens, pages, strict=True)):
        table[row, : len(own)] = own.int()
        for pool in pools:
            keys = poisoned(len(own) * page, kv_heads, head_dim, dtype=dtype)
            keys[: max(0, length - 1)] = random(max(0, length - 1), kv_heads, head_dim, dtype=dtype)
            pool[own] = keys.view(len(own), page, kv_heads, head_dim)
        slots.append(int(own[-1]) * page + (length - 1) % page if length else 0)
    rows = DecodeRows(
        page_table=table,
        kv_lens=torch.tensor(lens, device=GPU, dtype=torch.int32),
        cache_slots=torch.tensor(slots, device=GPU, dtype=torch.int32),
    )
    return Sequences(list(lens), pages, rows, *pools)


def check_attention(
    launcher: CudaLauncher,
    lens: Sequence[int],
    tuning: AttentionTuning,
    *,
    kv_heads: int = 8,
    group: int = 4,
    head_dim: int = 128,
    page: int = PAGE,
    half: int = 64,
    window: int | None = None,
    normed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    ops, tokens = NativeOps(launcher, attention=tuning), len(lens)
    made = sequences(lens, kv_heads, head_dim, page, dtype)
    heads = kv_heads * group
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = torch.rand(tokens, half, device=GPU) * 6
    cos, sin = angles.cos(), angles.sin()
    q, k, v = qkv.view(tokens, -1, head_dim).split_with_sizes((heads, kv_heads, kv_heads), 1)
    norms = HeadNorms(random(head_dim, dtype=dtype), random(head_dim, dtype=dtype), EPS) if normed else None
    if norms:
        q, k = rms_norm(q, norms.q_weight), rms_norm(k, norms.k_weight)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    worst = 0.0
    for _ in range(2):  # the counters are as they were
        out = poisoned(tokens, heads * head_dim, dtype=dtype)
        ops.rope_attention(
            qkv,
            cos,
            sin,
            made.k_pool,
            made.v_pool,
            made.rows,
            scale=head_dim**-0.5,
            window=window,
            norms=norms,
            out=out,
        )
        for row, (length, own) in enumerate(zip(made.lens, made.pages, strict=True)):
            got = out[row].view(kv_heads, group, head_dim)
            if not length:
                worst = max(worst, 0.0 if bool((got == 0).all()) else 99.0)
                continue
            keys, values = (pool[own].flatten(0, 1)[:length].float() for pool in (made.k_pool, made.v_pool))
            worst = max(worst, relative(keys[-1], k[row]) / 3e-3, relative(values[-1], v[row]) / 1e-6)
            scores = torch.einsum("hgd,khd->hgk", q[row].view(kv_heads, group, head_dim).float(), keys) * head_dim**-0.5
            if window:
                scores[..., : max(0, length - window)] = float("-inf")
            want = torch.einsum("hgk,khd->hgd", scores.softmax(-1), values)
            worst = max(worst, relative(got, want) / (6e-3 if dtype == torch.bfloat16 else 2e-3))
    return worst


def checks(launcher: CudaLauncher) -> list[tuple[str, Callable[[], float]]]:
    """All of them, with their names; a result below 1 is right."""
    made: list[tuple[str, Callable[[], float]]] = []
    usual = [(4096, 6144), (4096, 4096), (14336, 4096)]
    odd = [(8, 1), (72, 7), (200, 33), (1032, 130), (4104, 16), (2048, 4099), (4096, 14352)]
    numbers = [1, 16, 32, 24, 2, 4, 8, 3, 5, 6, 7, 9, 23, 31]
    launcher.prepare(NativeOps(launcher).kernels(torch.bfloat16, numbers, HIDDEN))
    launcher.prepare(NativeOps(launcher).kernels(torch.float16, numbers[:4], HIDDEN))

    def products(tokens: int, columns: int, rows: int, dtype: torch.dtype, biased: bool) -> None:
        def call() -> float:
            return check_linear(NativeOps(launcher), tokens, columns, rows, dtype, biased)

        made.append((f"products {tokens} x {columns} -> {rows}, {dtype}, bias {biased}", call))

    for tokens, (columns, rows), biased in itertools.product(numbers, usual + odd, (False, True)):
        products(tokens, columns, rows, torch.bfloat16, biased)
    for tokens, (columns, rows) in itertools.product(numbers[:4], usual[:1] + odd[:4]):
        products(tokens, columns, rows, torch.float16, True)

    def attention(name: str, lens: Sequence[int], tuning: AttentionTuning, **options: Any) -> None:
        made.append((f"attention {lens}, {name}", lambda: check_attention(launcher, lens, tuning, **options)))

    borders = [1, 7, 15, 16, 17, 0, 31, 33]
    longer = [4096, 4097, 129, 1, 640, 2000, 5000, 65]
    for tuning in (FEW_ROWS, MANY_ROWS):
        for lens in ([1], [16], [401], [100000], borders, longer, longer[:3], (borders + longer) * 2):
            attention(str(tuning), lens, tuning)
    variants: dict[str, dict[str, Any]] = {
        "window": {"window": 100},
        "head norms": {"normed": True},
        "half rotated": {"half": 32},
        "float16": {"dtype": torch.float16},
        "heads of 64, 7 to a KV head": {"head_dim": 64, "group": 7, "half": 32},
        "heads of 256, one each": {"head_dim": 256, "group": 1, "half": 128},
        "8 to a KV head": {"group": 8},
        "pages of 1": {"page": 1},
        "pages of 24": {"page": 24},
        "pages of 64": {"page": 64},
    }
    for name, options in variants.items():
        attention(name, borders, FEW_ROWS, **options)
        attention(name, longer, MANY_ROWS, **options)
    return made


def tuned_checks(launcher: CudaLauncher) -> list[tuple[str, Callable[[], float]]]:
    """Of what `--tune` tries."""
    made: list[tuple[str, Callable[[], float]]] = []
    tunings = [LinearTuning(*division) for division in DIVISIONS]
    tunings += [replace(tuning, prefetch=prefetch) for tuning in tunings[:3] for prefetch in PREFETCHES[1:]]
    for tokens, tuning in itertools.product((1, 2, 4, 8), tunings):
        ops = NativeOps(launcher, LinearTunings(tuning, tuning, tuning, tuning, tuning))
        launcher.prepare(ops.kernels(torch.bfloat16, [tokens], HIDDEN))

        def products(t: int = tokens, ops: NativeOps = ops) -> float:
            return check_linear(ops, t, HIDDEN, 3 * 1040, torch.bfloat16, False)

        made.append((f"products of {tokens} tokens, {tuning}", products))
    for numbers in ATTENTIONS:
        other = AttentionTuning(*numbers)
        for lens in ([1], [100000], [1, 7, 15, 16, 17, 0, 31, 33], [4096, 4097, 129]):

            def attention(lens: Sequence[int] = lens, other: AttentionTuning = other) -> float:
                return check_attention(launcher, lens, other)

            made.append((f"attention {lens}, {other}", attention))
    return made


def run_checks(begin: int, report: Path, tuned: bool) -> None:
    """From number `begin` on, a line for each: an illegal access ends the process, and the line says where."""
    torch.manual_seed(time.time_ns() % 2**31)
    launcher = CudaLauncher(GPU)
    with report.open("a") as lines:
        for number, (name, call) in enumerate((tuned_checks if tuned else checks)(launcher)):
            if number >= begin:
                lines.write(f"{number}\t{name}\t")
                lines.flush()
                error = call()
                torch.cuda.synchronize()
                lines.write(f"{error:.3f}\n")
                lines.flush()


def check(tuned: bool) -> list[str]:
    failures, begin = [], 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        report.touch()
        for _ in range(12):
            command = [sys.executable, __file__, "--check-from", str(begin), "--report", str(report)]
            command += ["--tune"] if tuned else []
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode == 0:
                break
            written = report.read_text()
            if not written or written.endswith("\n"):
                raise SystemExit(done.stderr)
            number, name, _ = written.splitlines()[-1].split("\t")
            begin = int(number) + 1
            print(f"DIED in {name}\n{done.stderr[-600:]}", flush=True)
            with report.open("a") as file:
                file.write("inf\n")
        lines = [line.split("\t") for line in report.read_text().splitlines()]
        failures = [f"{name}: {error} of what is allowed" for _, name, error in lines if not float(error) < 1]
    print(f"{len(lines)} checks, {len(failures)} wrong")
    return failures


# --- Fast? ---


@dataclass
class Layer:
    norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    middle_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def make_layer() -> Layer:
    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, device=GPU, dtype=torch.bfloat16).normal_(0, columns**-0.5)

    one = torch.ones(HIDDEN, device=GPU, dtype=torch.bfloat16)
    return Layer(
        norm=one,
        qkv=weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        out=weight(HIDDEN, HEADS * HEAD_DIM),
        middle_norm=one.clone(),
        gate_up=weight(2 * INNER, HIDDEN),
        down=weight(HIDDEN, INNER),
    )


def linear(kind: str, tokens: int, tunings: LinearTunings, dtype: torch.dtype = torch.bfloat16) -> Linear:
    """The product that `kind` stands for, in an 8B model; `linear_add` is the down projection."""
    columns, rows, epilogue = {
        "norm_linear": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, Epilogue.STORE),
        "linear": (HIDDEN, HIDDEN, Epilogue.STORE),
        "linear_add": (INNER, HIDDEN, Epilogue.ADD),
        "norm_gated": (HIDDEN, INNER, Epilogue.GATED),
        "head": (HIDDEN, VOCABULARY, Epilogue.STORE_FLOAT),
    }[kind]
    normed = kind in ("norm_linear", "norm_gated", "head")
    return Linear(tokens, columns, rows, dtype, normed, epilogue, getattr(tunings, kind))


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, replays: int = 5, rounds: int = 5) -> float:
    """The median time of one replay."""
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1000 / replays)
    return statistics.median(times)


def copy_speed() -> float:
    """TB/s of a large copy, bytes read and written."""
    source, target = (torch.empty(1 << 31, dtype=torch.uint8, device=GPU).random_() for _ in range(2))
    return 2 * source.nbytes / microseconds(capture(lambda: target.copy_(source))) / 1e6


class Step:
    """One token for each of `tokens` sequences of `length` keys through some layers and the head, in fixed buffers."""

    def __init__(self, layers: Sequence[Layer], head: torch.Tensor, tokens: int, length: int) -> None:
        def buffer(columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randn(tokens, columns, device=GPU).to(dtype)

        self.layers, self.head, self.tokens, self.length = layers, head, tokens, length
        self.input, self.residual, self.attended = buffer(HIDDEN), buffer(HIDDEN), buffer(HEADS * HEAD_DIM)
        self.qkv, self.inner = buffer((HEADS + 2 * KV_HEADS) * HEAD_DIM), buffer(INNER)
        self.logits = buffer(VOCABULARY, torch.float32)
        angles = torch.rand(tokens, HEAD_DIM // 2, device=GPU) * 6
        self.cos, self.sin = angles.cos(), angles.sin()
        pages = -(-length // PAGE)
        table = torch.zeros(tokens, CAPACITY // PAGE, device=GPU, dtype=torch.int32)
        for row in range(tokens):
            table[row, :pages] = torch.arange(row * pages, (row + 1) * pages, device=GPU) + 1
        self.rows = DecodeRows(
            page_table=table,
            kv_lens=torch.full((tokens,), length, device=GPU, dtype=torch.int32),
            cache_slots=(table[:, pages - 1] * PAGE + (length - 1) % PAGE).int(),
        )
        size = (tokens * pages + 1, PAGE, KV_HEADS, HEAD_DIM)
        self.pools = [[torch.randn(size, device=GPU).bfloat16() for _ in range(2)] for _ in layers]
        weights = sum(t.nbytes for layer in layers for t in vars(layer).values()) + head.nbytes
        self.bytes = weights + len(layers) * 2 * tokens * length * KV_HEADS * HEAD_DIM * 2

    def attend(self, ops: NativeOps, layer: int) -> None:
        keys, values = self.pools[layer]
        scale, out = HEAD_DIM**-0.5, self.attended
        ops.rope_attention(self.qkv, self.cos, self.sin, keys, values, self.rows, scale=scale, out=out)

    def run(self, ops: NativeOps) -> torch.Tensor:
        self.residual.copy_(self.input)
        for number, layer in enumerate(self.layers):
            ops.norm_linear(self.residual, layer.norm, EPS, layer.qkv, out=self.qkv)
            self.attend(ops, number)
            ops.linear_add(self.attended, layer.out, self.residual)
            ops.norm_gated(self.residual, layer.middle_norm, EPS, layer.gate_up, out=self.inner)
            ops.linear_add(self.inner, layer.down, self.residual)
        return ops.norm_head(self.residual, self.layers[0].norm, EPS, self.head, out=self.logits)

    def time(self, launcher: CudaLauncher, tunings: LinearTunings, attention: AttentionTuning | None) -> float:
        ops = NativeOps(launcher, tunings, attention)
        return microseconds(capture(lambda: self.run(ops)))


def each_product(launcher: CudaLauncher, step: Step) -> dict[str, list[tuple[float, LinearTuning]]]:
    """Microseconds of each kind alone, over the layers in turn, for every division of the work; best first."""
    found: dict[str, list[tuple[float, LinearTuning]]] = {}
    layers, tokens = step.layers, step.tokens
    for kind in KINDS:
        made = [LinearTuning(*division) for division in DIVISIONS]
        shapes = [linear(kind, tokens, replace(LinearTunings(), **{kind: tuning})) for tuning in made]
        tried = [shape for shape in shapes if shape.shared_bytes <= launcher.shared_bytes]
        launcher.prepare(shape.kernel for shape in tried)
        rows = []
        for shape in tried:
            ops = NativeOps(launcher, replace(LinearTunings(), **{kind: shape.tuning}))

            def call(ops: NativeOps = ops, kind: str = kind) -> None:
                for layer in layers[:1] if kind == "head" else layers:
                    if kind == "norm_linear":
                        ops.norm_linear(step.residual, layer.norm, EPS, layer.qkv, out=step.qkv)
                    elif kind == "linear_add":
                        ops.linear_add(step.inner, layer.down, step.residual)
                    elif kind == "norm_gated":
                        ops.norm_gated(step.residual, layer.norm, EPS, layer.gate_up, out=step.inner)
                    else:
                        ops.norm_head(step.residual, layer.norm, EPS, step.head, out=step.logits)

            calls = 1 if kind == "head" else len(layers)
            rows.append((microseconds(capture(call)) / calls, shape.tuning))
        rows.sort(key=lambda row: row[0])
        found[kind] = rows
        size = shapes[0].columns * shapes[0].rows * 2 * (2 if kind == "norm_gated" else 1)
        print(f"\n{kind}, {tokens} tokens, {size / 1e6:.0f} MB (warps, stages, tiles, blocks: us, TB/s)")
        for us, t in rows:
            print(f"  {t.warps:2} {t.stages:2} {t.tiles} {t.blocks}   {us:7.2f}  {size / us / 1e6:.2f}")
    return found


def each_attention(launcher: CudaLauncher, step: Step) -> list[tuple[float, AttentionTuning]]:
    """Microseconds of one layer's attention, the best tuning first."""
    rows = []
    for numbers in ATTENTIONS:
        tuning = AttentionTuning(*numbers)
        ops = NativeOps(launcher, attention=tuning)

        def call(ops: NativeOps = ops) -> None:
            for layer in range(len(step.layers)):
                step.attend(ops, layer)

        rows.append((microseconds(capture(call)) / len(step.layers), tuning))
    rows.sort(key=lambda row: row[0])
    size = 2 * step.tokens * step.length * KV_HEADS * HEAD_DIM * 2
    print(f"\nattention, {step.tokens} tokens, {step.length} keys (warps, stages, least, blocks: us, TB/s)")
    for us, t in rows:
        print(f"  {t.warps:2} {t.stages:2} {t.least:2} {t.blocks}   {us:7.2f}  {size / us / 1e6:.2f}")
    return rows


def whole_step(
    launcher: CudaLauncher,
    step: Step,
    divisions: dict[str, list[tuple[float, LinearTuning]]],
    attentions: Sequence[AttentionTuning],
) -> tuple[LinearTunings, AttentionTuning]:
    """The best tuning of the whole step, found by changing one kind at a time."""
    best, attention = LinearTunings(), attentions[0]
    best_time = step.time(launcher, best, attention)
    print(f"\n{len(step.layers)} layers and head, {step.tokens} tokens, as delivered: {best_time:.1f} us")
    for other in attentions[1:]:
        took = step.time(launcher, best, other)
        if took < best_time * 0.999:
            attention, best_time = other, took
    print(f"  attention: {attention} -> {best_time:.1f} us")
    for kind in KINDS:
        base: LinearTuning = getattr(best, kind)
        shapes: Iterable[LinearTuning] = [base, *(row[1] for row in divisions[kind][:2])]
        tried = [
            replace(best, **{kind: replace(shape, prefetch=prefetch)})
            for shape in dict.fromkeys(replace(s, prefetch=0) for s in shapes)
            for prefetch in PREFETCHES
        ]
        launcher.prepare(linear(kind, step.tokens, tunings).kernel for tunings in tried)
        for tunings in tried:
            took = step.time(launcher, tunings, attention)
            if took < best_time * 0.999:
                best, best_time = tunings, took
        print(f"  {kind}: {getattr(best, kind)} -> {best_time:.1f} us", flush=True)
    return best, attention


def against_library(launcher: CudaLauncher, step: Step) -> dict[str, tuple[float, float]]:
    """Microseconds of each kind as delivered, norm and all, and of the library's product alone."""
    ops, layers = NativeOps(launcher), step.layers
    wide_inner = torch.randn(step.tokens, 2 * INNER, device=GPU).bfloat16()
    found = {}
    calls: dict[str, tuple[Callable[[Layer], object], Callable[[Layer], object]]] = {
        "norm, qkv": (
            lambda layer: ops.norm_linear(step.residual, layer.norm, EPS, layer.qkv, out=step.qkv),
            lambda layer: torch.mm(step.residual, layer.qkv.T, out=step.qkv),
        ),
        "out, add": (
            lambda layer: ops.linear_add(step.attended, layer.out, step.residual),
            lambda layer: torch.mm(step.attended, layer.out.T, out=step.residual),
        ),
        "norm, gate-up, gate": (
            lambda layer: ops.norm_gated(step.residual, layer.norm, EPS, layer.gate_up, out=step.inner),
            lambda layer: torch.mm(step.residual, layer.gate_up.T, out=wide_inner),
        ),
        "down, add": (
            lambda layer: ops.linear_add(step.inner, layer.down, step.residual),
            lambda layer: torch.mm(step.inner, layer.down.T, out=step.residual),
        ),
        "norm, head": (
            lambda layer: ops.norm_head(step.residual, layer.norm, EPS, step.head, out=step.logits),
            lambda _: torch.mm(step.residual, step.head.T, out_dtype=torch.float32),
        ),
    }
    print(f"\n{step.tokens} tokens: us as delivered, and of the library's product alone")
    for name, pair in calls.items():

        def all_layers(call: Callable[[Layer], object]) -> float:
            def run() -> None:
                for layer in layers:
                    call(layer)

            return microseconds(capture(run)) / len(layers)

        ours, library = (all_layers(call) for call in pair)
        found[name] = ours, library
        print(f"  {name:20} {ours:7.2f} {library:7.2f}", flush=True)
    return found


def measure(tokens: int, tune: bool) -> dict[str, object]:
    overlapping, serial = CudaLauncher(GPU), CudaLauncher(GPU, overlap=False)
    overlapping.prepare(NativeOps(overlapping).kernels(torch.bfloat16, [tokens], HIDDEN))
    layers = [make_layer() for _ in range(LAYERS)]
    head = torch.empty(VOCABULARY, HIDDEN, device=GPU, dtype=torch.bfloat16).normal_(0, HIDDEN**-0.5)
    step = Step(layers, head, tokens, LENGTHS[0])
    times = {
        name: step.time(launcher, LinearTunings(), None)
        for name, launcher in (("delivered", overlapping), ("delivered, serial", serial))
    }
    print(f"\n{tokens} tokens, {LENGTHS[0]} keys each, {LAYERS} layers and head, {step.bytes / 1e9:.2f} GB:")
    for name, us in times.items():
        print(f"  {name:18} {us / 1000:.3f} ms  {step.bytes / us / 1e6:.2f} TB/s", flush=True)
    few = layers[:TUNING_LAYERS]
    short_step = Step(few, head, tokens, LENGTHS[0])
    result: dict[str, object] = {"step_us": times, "library": against_library(overlapping, short_step)}
    if not tune:
        return result
    long = each_attention(overlapping, Step(few, head, tokens, LENGTHS[1]))
    short = each_attention(overlapping, short_step)
    result["attention"] = [[(us, asdict(tuning)) for us, tuning in rows] for rows in (short, long)]
    if tokens <= MAX_TOKENS:
        divisions = each_product(overlapping, short_step)
        best = whole_step(overlapping, short_step, divisions, [row[1] for row in short[:3] + long[:2]])
        times["best"] = step.time(overlapping, *best)
        print(f"\n{tokens} tokens, {LAYERS} layers and head, best: {times['best'] / 1000:.3f} ms")
        print(f"  {best[0]}\n  {best[1]}")
        result["best"] = [asdict(tuning) for tuning in best]
        result["alone"] = {kind: [(us, asdict(tuning)) for us, tuning in rows] for kind, rows in divisions.items()}
    return result


def measure_all(numbers: Sequence[int], tune: bool) -> dict[str, object]:
    """Each number of tokens in a process of its own, so that one that dies does not take the others along."""
    print(f"{torch.cuda.get_device_name()}, device copy: {copy_speed():.2f} TB/s", flush=True)
    torch.cuda.empty_cache()
    result: dict[str, object] = {"device": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as folder:
        for tokens in numbers:
            report = Path(folder) / f"{tokens}.json"
            command = [sys.executable, __file__, "--time-tokens", str(tokens), "--report", str(report)]
            command += ["--tune"] if tune else []
            begin = time.perf_counter()
            subprocess.run(command, check=False)
            print(f"({time.perf_counter() - begin:.0f} s)", flush=True)
            if report.exists():
                result[f"tokens_{tokens}"] = json.loads(report.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare every kernel with float32")
    parser.add_argument("--time", action="store_true", help="time a whole step, and every product beside the library's")
    parser.add_argument("--tune", action="store_true", help="check and time other tunings too")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32], help="rows to time (default: 1 32)")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--check-from", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--time-tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.check_from is not None:
        run_checks(arguments.check_from, arguments.report, arguments.tune)
        return
    if arguments.time_tokens is not None:
        arguments.report.write_text(json.dumps(measure(arguments.time_tokens, arguments.tune)))
        return
    begin = time.perf_counter()
    failures = [*check(False), *(check(True) if arguments.tune else [])] if arguments.check else []
    for failure in failures[:60]:
        print("WRONG", failure)
    print(f"({time.perf_counter() - begin:.0f} s)", flush=True)
    figures = measure_all(arguments.tokens, arguments.tune) if arguments.time else {}
    if arguments.json:
        arguments.json.write_text(json.dumps({"failures": failures, **figures}, indent=1))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
