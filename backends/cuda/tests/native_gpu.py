"""The native kernels on a real GPU: are they right, how fast is each, and which tuning is best for a whole step.

python backends/cuda/tests/native_gpu.py --check --time --json OUT    (torch and cuda-bindings are all that it needs)
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from tgi_backend_cuda.native.launch import CudaLauncher
from tgi_backend_cuda.native.linear import (
    SHARED_BYTES,
    Epilogue,
    Linear,
    LinearTuning,
    LinearTunings,
    supports_linear,
)
from tgi_backend_cuda.native.ops import NativeOps

GPU = torch.device("cuda")
EPS = 1e-5
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 4096, 32, 8, 128, 14336, 128256
LAYERS = 32
TUNING_LAYERS = 6
"""Enough to leave no weight in L2 from one replay to the next."""
KINDS = ("norm_linear", "linear_add", "norm_gated", "head")
DIVISIONS = [
    # warps, stages, tiles, blocks
    (8, 4, 1, 2),
    (8, 4, 1, 3),
    (8, 6, 1, 2),
    (8, 3, 1, 3),
    (8, 3, 1, 4),
    (8, 3, 2, 2),
    (8, 2, 2, 3),
    (8, 4, 2, 1),
    (4, 8, 1, 2),
    (4, 8, 1, 3),
    (4, 6, 1, 4),
    (4, 4, 2, 3),
    (4, 6, 2, 2),
    (16, 3, 1, 2),
    (16, 4, 1, 1),
    (2, 12, 1, 4),
]
PREFETCHES = (0, 2048, 8192)
LAUNCHES = (1 << 30, 16, 4)


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
    allowed = 3e-3 if dtype == torch.bfloat16 else 1e-3
    worst = relative(
        ops.linear(x, half, half_bias, out=poisoned(tokens, rows, dtype=dtype)), product(x, half, half_bias)
    )
    want = product(x, half, half_bias) + residual.float()
    worst = max(worst, relative(ops.linear_add(x, half, residual, half_bias), want))
    if supports_linear(tokens, columns, dtype, normed=True):
        normed = rms_norm(x, norm)
        got = ops.norm_linear(x, norm, EPS, half, half_bias, out=poisoned(tokens, rows, dtype=dtype))
        worst = max(worst, relative(got, product(normed, half, half_bias)))
        gate, up = product(normed, weight, bias).chunk(2, -1)
        got = ops.norm_gated(x, norm, EPS, weight, bias, out=poisoned(tokens, rows, dtype=dtype))
        worst = max(worst, relative(got, torch.nn.functional.silu(gate) * up))
        got = ops.norm_head(x, norm, EPS, half, out=poisoned(tokens, rows, dtype=torch.float32))
        worst = max(worst, relative(got, product(normed, half, None)))
    return worst / allowed


def check(launcher: CudaLauncher) -> list[str]:
    failures = []
    shapes = [
        (4096, 6144),
        (4096, 4096),
        (14336, 4096),
        (8, 1),
        (72, 7),
        (200, 33),
        (1032, 130),
        (4104, 16),
        (2048, 4099),
    ]
    kernels: list[tuple[int, torch.dtype]] = list(itertools.product(range(1, 9), (torch.bfloat16, torch.float16)))
    every = [linear(kind, tokens, LinearTunings(), dtype).kernel for tokens, dtype in kernels for kind in KINDS]
    begin = time.perf_counter()
    launcher.load(every)
    print(f"compiled and loaded {len(every)} kernels in {time.perf_counter() - begin:.1f} s")
    ops = NativeOps(launcher)
    for (tokens, dtype), (columns, rows) in itertools.product(kernels, shapes):
        torch.manual_seed(time.time_ns() % 2**31)
        for again in range(2):
            error = check_linear(ops, tokens, columns, rows, dtype, biased=again == 0)
            if not error < 1:
                failures.append(
                    f"linear {tokens} x {columns} -> {rows} {dtype}, bias {again == 0}: {error:.2f} of allowed"
                )
    print(f"checked {len(kernels) * len(shapes) * 2} sets of products, {len(failures)} wrong")
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
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / replays)
    return statistics.median(times)


def copy_speed() -> float:
    """TB/s of a large copy, bytes read and written."""
    source, target = (torch.empty(1 << 31, dtype=torch.uint8, device=GPU).random_() for _ in range(2))
    return 2 * source.nbytes / microseconds(capture(lambda: target.copy_(source))) / 1e6


class Step:
    """One token for each of `tokens` sequences through some layers and the head, with fixed buffers."""

    def __init__(self, layers: Sequence[Layer], head: torch.Tensor, tokens: int) -> None:
        def buffer(columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.zeros(tokens, columns, device=GPU, dtype=dtype)

        self.layers, self.head, self.tokens = layers, head, tokens
        self.input = random(tokens, HIDDEN, dtype=torch.bfloat16)
        self.residual = random(tokens, HIDDEN, dtype=torch.bfloat16)
        self.qkv = buffer((HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.inner = random(tokens, INNER, dtype=torch.bfloat16)
        self.attended = random(tokens, HEADS * HEAD_DIM, dtype=torch.bfloat16)
        self.logits = buffer(VOCABULARY, torch.float32)
        self.bytes = sum(t.nbytes for layer in layers for t in vars(layer).values()) + head.nbytes

    def run(self, ops: NativeOps) -> torch.Tensor:
        self.residual.copy_(self.input)
        for layer in self.layers:
            ops.norm_linear(self.residual, layer.norm, EPS, layer.qkv, out=self.qkv)
            ops.linear_add(self.attended, layer.out, self.residual)
            ops.norm_gated(self.residual, layer.middle_norm, EPS, layer.gate_up, out=self.inner)
            ops.linear_add(self.inner, layer.down, self.residual)
        return ops.norm_head(self.residual, self.layers[0].norm, EPS, self.head, out=self.logits)

    def time(self, launcher: CudaLauncher, tunings: LinearTunings) -> float:
        ops = NativeOps(launcher, tunings)
        return microseconds(capture(lambda: self.run(ops)))


def fits(kind: str, tokens: int, tuning: LinearTuning) -> bool:
    shape = linear(kind, tokens, replace(LinearTunings(), **{kind: tuning}))
    return shape.shared_bytes <= SHARED_BYTES


def candidates(kind: str, tokens: int) -> list[LinearTuning]:
    made = [LinearTuning(warps, stages, tiles, blocks) for warps, stages, tiles, blocks in DIVISIONS]
    return [tuning for tuning in made if fits(kind, tokens, tuning)]


def each_product(
    launcher: CudaLauncher, layers: Sequence[Layer], head: torch.Tensor, tokens: int
) -> dict[str, list[tuple[float, LinearTuning]]]:
    """Microseconds of each kind alone, over the layers in turn, for every division of the work; best first."""
    found: dict[str, list[tuple[float, LinearTuning]]] = {}
    step = Step(layers, head, tokens)
    for kind in KINDS:
        tried = candidates(kind, tokens)
        launcher.load([linear(kind, tokens, replace(LinearTunings(), **{kind: t})).kernel for t in tried])
        rows = []
        for tuning in tried:
            ops = NativeOps(launcher, replace(LinearTunings(), **{kind: tuning}))

            def call(ops: NativeOps = ops, kind: str = kind) -> None:
                for layer in layers:
                    if kind == "norm_linear":
                        ops.norm_linear(step.residual, layer.norm, EPS, layer.qkv, out=step.qkv)
                    elif kind == "linear_add":
                        ops.linear_add(step.inner, layer.down, step.residual)
                    elif kind == "norm_gated":
                        ops.norm_gated(step.residual, layer.norm, EPS, layer.gate_up, out=step.inner)
                    else:
                        ops.norm_head(step.residual, layer.norm, EPS, head, out=step.logits)

            rows.append((microseconds(capture(call)) / len(layers), tuning))
        rows.sort(key=lambda row: row[0])
        found[kind] = rows
        product_shape = linear(kind, tokens, LinearTunings())
        size = product_shape.columns * product_shape.rows * 2 * (2 if kind == "norm_gated" else 1)
        print(f"\n{kind}, {tokens} tokens, {size / 1e6:.0f} MB (warps, stages, tiles, blocks: us, TB/s)")
        for us, t in rows[:6] + rows[-1:]:
            print(f"  {t.warps:2} {t.stages:2} {t.tiles} {t.blocks}   {us:7.2f}  {size / us / 1e6:.2f}")
    return found


def whole_step(
    launcher: CudaLauncher, step: Step, divisions: dict[str, list[tuple[float, LinearTuning]]]
) -> LinearTunings:
    """The best tuning of the whole step, found by changing one kind at a time."""
    best = replace(LinearTunings(), **{kind: rows[0][1] for kind, rows in divisions.items()})
    best_time = step.time(launcher, best)
    print(f"\n{len(step.layers)} layers and head, {step.tokens} tokens, best of each alone: {best_time:.1f} us")
    for _ in range(2):
        for kind in KINDS:
            base: LinearTuning = getattr(best, kind)
            shapes: Iterable[LinearTuning] = [base, *(row[1] for row in divisions[kind][:3])]
            tried = [
                replace(best, **{kind: replace(shape, prefetch=prefetch, launch_left=left)})
                for shape in dict.fromkeys(replace(s, prefetch=0, launch_left=0) for s in shapes)
                for prefetch in PREFETCHES
                for left in LAUNCHES
            ]
            launcher.load([linear(kind, step.tokens, tunings).kernel for tunings in tried])
            for tunings in tried:
                took = step.time(launcher, tunings)
                if took < best_time * 0.999:
                    best, best_time = tunings, took
            print(f"  {kind}: {getattr(best, kind)} -> {best_time:.1f} us", flush=True)
    for evict in (False, True):
        other = LinearTunings(
            **{kind: replace(getattr(best, kind), evict_first=evict) for kind in LinearTunings.__slots__}
        )
        print(f"  evict_first={evict}: {step.time(launcher, other):.1f} us")
    return best


def measure(tokens_tried: Sequence[int]) -> dict[str, object]:
    overlapping, serial = CudaLauncher(GPU), CudaLauncher(GPU, overlap=False)
    copy = copy_speed()
    print(f"device copy: {copy:.2f} TB/s")
    layers = [make_layer() for _ in range(LAYERS)]
    head = torch.empty(VOCABULARY, HIDDEN, device=GPU, dtype=torch.bfloat16).normal_(0, HIDDEN**-0.5)
    result: dict[str, object] = {"device": torch.cuda.get_device_name(), "copy_tb_s": copy}
    for tokens in tokens_tried:
        divisions = each_product(overlapping, layers[:TUNING_LAYERS], head, tokens)
        best = whole_step(overlapping, Step(layers[:TUNING_LAYERS], head, tokens), divisions)
        step = Step(layers, head, tokens)
        times = {"overlap": step.time(overlapping, best), "serial": step.time(serial, best)}
        times |= {"default_overlap": step.time(overlapping, LinearTunings())}
        print(f"\n{tokens} tokens, {LAYERS} layers and head, {step.bytes / 1e9:.2f} GB:")
        for name, us in times.items():
            print(f"  {name:16} {us / 1000:.3f} ms  {step.bytes / us / 1e6:.2f} TB/s")
        print("  " + repr(best))
        result[f"tokens_{tokens}"] = {
            "step_us": times,
            "best": asdict(best),
            "alone": {kind: [(us, asdict(tuning)) for us, tuning in rows] for kind, rows in divisions.items()},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare every kernel with float32")
    parser.add_argument("--time", action="store_true", help="time every kernel and a whole step; chooses a tuning")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4], help="rows to time (default: 1 4)")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    failures = check(CudaLauncher(GPU)) if arguments.check else []
    for failure in failures[:40]:
        print("WRONG", failure)
    figures = measure(arguments.tokens) if arguments.time else {}
    if arguments.json:
        arguments.json.write_text(json.dumps({"failures": failures, **figures}, indent=1))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
