"""How fast a decode step of an 8B model is on the native kernels, and each of its products beside the library's.

python backends/cuda/tests/native_speed.py --tokens 1 4 32 --json OUT    above 8 tokens a step is without attention
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tgi_backend_cuda.native.attention import DecodeRows
from tgi_backend_cuda.native.launch import CudaLauncher
from tgi_backend_cuda.native.linear import MAX_TOKENS
from tgi_backend_cuda.native.ops import NativeOps
from tgi_model_server.device import Norm
from tgi_model_server.kernels.ops import TritonOps

GPU = torch.device("cuda")
EPS = 1e-5
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 4096, 32, 8, 128, 14336, 128256
LAYERS = 32
FEW_LAYERS = 6
"""Enough to leave no weight in L2 from one replay to the next."""
PAGE = 16
LENGTH = 400
"""Keys of each sequence."""
CAPACITY = 32768
"""Keys that the page tables have room for."""


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
        self.attends = tokens <= MAX_TOKENS
        self.bytes = sum(t.nbytes for layer in layers for t in vars(layer).values()) + head.nbytes
        if self.attends:
            self.bytes += len(layers) * 2 * tokens * length * KV_HEADS * HEAD_DIM * 2

    def attend(self, ops: NativeOps, layer: int) -> None:
        keys, values = self.pools[layer]
        scale, out = HEAD_DIM**-0.5, self.attended
        ops.rope_attention(self.qkv, self.cos, self.sin, keys, values, self.rows, scale=scale, out=out)

    def run(self, ops: NativeOps) -> torch.Tensor:
        self.residual.copy_(self.input)
        for number, layer in enumerate(self.layers):
            ops.norm_linear(self.residual, layer.norm, EPS, layer.qkv, out=self.qkv)
            if self.attends:
                self.attend(ops, number)
            ops.linear_add(self.attended, layer.out, self.residual)
            ops.norm_gated(self.residual, layer.middle_norm, EPS, layer.gate_up, out=self.inner)
            ops.linear_add(self.inner, layer.down, self.residual)
        return ops.norm_head(self.residual, self.layers[0].norm, EPS, self.head, out=self.logits)

    def run_library(self, ops: TritonOps) -> None:
        """The same without attention, by the library's products and the kernels between them."""
        self.residual.copy_(self.input)
        for layer in self.layers:
            ops.norm_linear(self.residual, Norm(layer.norm, EPS), layer.qkv, None)
            ops.linear_add(self.attended, layer.out, None, self.residual)
            inner = ops.norm_gated(self.residual, Norm(layer.middle_norm, EPS), layer.gate_up, None)
            ops.linear_add(inner, layer.down, None, self.residual)
        normed = ops.rms_norm(self.residual, self.layers[0].norm, EPS)
        torch.mm(normed, self.head.t(), out_dtype=torch.float32)

    def time(self, launcher: CudaLauncher) -> float:
        ops = NativeOps(launcher)
        return microseconds(capture(lambda: self.run(ops)))


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


def measure(tokens: int) -> dict[str, object]:
    overlapping, serial = CudaLauncher(GPU), CudaLauncher(GPU, overlap=False)
    overlapping.prepare(NativeOps(overlapping).kernels(torch.bfloat16, [tokens], HIDDEN))
    layers = [make_layer() for _ in range(LAYERS)]
    head = torch.empty(VOCABULARY, HIDDEN, device=GPU, dtype=torch.bfloat16).normal_(0, HIDDEN**-0.5)
    step = Step(layers, head, tokens, LENGTH)
    attention = f"{LENGTH} keys each" if step.attends else "no attention"
    print(f"\n{tokens} tokens, {attention}, {LAYERS} layers and head, {step.bytes / 1e9:.2f} GB:")
    times = {"overlapping": step.time(overlapping), "one after another": step.time(serial)}
    times["library, no attention"] = microseconds(capture(lambda: step.run_library(TritonOps())))
    for name, us in times.items():
        print(f"  {name:22} {us / 1000:.3f} ms  {step.bytes / us / 1e6:.2f} TB/s", flush=True)
    few = Step(layers[:FEW_LAYERS], head, tokens, LENGTH)
    return {"step_us": times, "product_us": against_library(overlapping, few)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4], help="rows to time (default: 1 4)")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    result: dict[str, object] = {"device": torch.cuda.get_device_name()}
    print(f"{result['device']}, device copy: {copy_speed():.2f} TB/s", flush=True)
    result |= {f"tokens_{tokens}": measure(tokens) for tokens in arguments.tokens}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
