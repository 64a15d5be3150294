"""Each Triton kernel against its limit: the bytes it must move or the products it must compute. Needs an accelerator.

    python bench/kernels.py [--json out.json] [--only decode] [--check]

The limits are measured first, on this chip: a large copy, and a large product of matrices of random numbers. Then each
kernel: its result against the float32 reference, over memory that was filled with NaN, and only then its time. Inputs
rotate through several times the chip's cache, and are new at every run. Where the chip replays graphs, all calls of a
rotation are one graph, so that a time is the kernel's and not its launch's; else the table says `eager`. A time is the
median over rotations, divided by the calls in one.

`--check` leaves the times out. With it, `--shape tiny` and TRITON_INTERPRET=1 the checks run on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from limits import Ceilings, measure_ceilings

from tgi_model_server.device import AttentionShape, KVLayout
from tgi_model_server.kernels.launch import Tuning, interpreted
from tgi_model_server.kernels.ops import TritonOps
from tgi_model_server.kernels.plan import triton_plan
from tgi_model_server.plan import StepPlan
from tgi_model_server.reference import ReferenceOps, ReferencePlan, reference_plan

PAGE_SIZE = 16
ROTATIONS = 30
MOST_COPIES = 64
CHECKED_TOKENS = 128
"""At each end of a row's new tokens: the reference's scores for all of them would not fit."""
TOLERANCE = 2e-2
"""For bfloat16, relative to the largest value of the result."""
NEEDS = "bench/kernels.py needs an accelerator that runs Triton; torch finds none here"


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the steps to measure it with."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tokens: tuple[int, ...]
    decodes: tuple[tuple[int, int], ...]
    """(rows, KV length)"""
    prefills: tuple[tuple[int, int, int], ...]
    """(rows, new tokens, KV length)"""
    shared: tuple[tuple[int, int, int], ...]
    """The same, of rows that share all older pages but the last."""
    worth: int = Tuning().shared_keys
    """`Tuning.shared_keys`"""


SHAPES = {
    "llama-8b": Shape(
        hidden=4096,
        inner=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocabulary=128256,
        tokens=(1, 32, 256, 8192),
        decodes=((1, 512), (1, 8192), (32, 768), (256, 768), (8, 32768)),
        prefills=((1, 512, 512), (16, 512, 512), (1, 8000, 8000), (1, 2048, 32768), (20, 50, 32050)),
        shared=((20, 1, 32050), (5, 50, 32050), (20, 50, 32050)),
    ),
    "tiny": Shape(
        hidden=96,
        inner=80,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocabulary=5000,
        tokens=(1, 5),
        decodes=((3, 40),),
        prefills=((2, 20, 50),),
        shared=((3, 9, 50),),
        worth=1,
    ),
}


@dataclass
class Work:
    """One call with inputs of its own."""

    run: Callable[[], object]
    check: Callable[[object], float]
    """Error of what `run` returned, relative to the largest value; call it right after the first run."""


@dataclass(frozen=True)
class Case:
    kernel: str
    size: str
    make: Callable[[], Work]
    bytes: int
    """That must be read and written at least."""
    flops: int = 0


class Bench:
    """The cases of one shape on one device."""

    def __init__(self, device: torch.device, shape: Shape, tuning: Tuning) -> None:
        self.device, self.shape, self.tuning = device, shape, replace(tuning, shared_keys=shape.worth)
        self.ops, self.reference = TritonOps(self.tuning), ReferenceOps()
        self.attention = AttentionShape(shape.heads, shape.kv_heads, shape.head_dim, torch.bfloat16, torch.bfloat16)
        self.cores = _cores(device)
        self._draw = random.Random()

    def cases(self) -> Iterator[Case]:
        shape = self.shape
        for tokens in shape.tokens:
            moved = 2 * tokens * shape.hidden
            yield Case("rms_norm", f"{tokens} tokens", lambda tokens=tokens: self._norm(tokens), 2 * moved)  # type: ignore[misc]
            gate = 2 * tokens * shape.inner
            yield Case("silu_mul", f"{tokens} tokens", lambda tokens=tokens: self._gate(tokens), 3 * gate)  # type: ignore[misc]
            turned = 2 * 2 * tokens * (shape.heads + 2 * shape.kv_heads) * shape.head_dim + 4 * tokens * shape.head_dim
            yield Case("rope_write_kv", f"{tokens} tokens", lambda tokens=tokens: self._rope(tokens), turned)  # type: ignore[misc]
        for rows, kv_len in shape.decodes:
            yield self._attention("decode", rows, 1, kv_len)
        for rows, new, kv_len in shape.prefills:
            yield self._attention("prefill", rows, new, kv_len)
        for rows, new, kv_len in shape.shared:
            yield self._attention("shared", rows, new, kv_len, together=True)
        for rows in (each for each in shape.tokens if each <= 256):
            read = 4 * rows * shape.vocabulary
            yield Case("greedy", f"{rows} rows", lambda rows=rows: self._greedy(rows), read)  # type: ignore[misc]
            yield Case("sample", f"{rows} rows", lambda rows=rows: self._sample(rows), read)  # type: ignore[misc]

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, device=self.device).to(torch.bfloat16)

    def _norm(self, tokens: int) -> Work:
        x, weight = self._random(tokens, self.shape.hidden), self._random(self.shape.hidden)
        wanted = self.reference.rms_norm(x.float(), weight.float(), 1e-5)
        return Work(lambda: self.ops.rms_norm(x, weight, 1e-5), lambda found: error(found, wanted))

    def _gate(self, tokens: int) -> Work:
        gate_up = self._random(tokens, 2 * self.shape.inner)
        wanted = self.reference.silu_mul(gate_up.float())
        return Work(lambda: self.ops.silu_mul(gate_up), lambda found: error(found, wanted))

    def _rope(self, tokens: int) -> Work:
        plan = self._plan(1, tokens, tokens)
        q, k, v = self._stacked(tokens)
        angles = torch.rand(tokens, self.shape.head_dim // 2, device=self.device) * 100
        cos, sin = angles.cos(), angles.sin()
        pools = self._pools(plan)
        planned = self._planned(plan)
        theirs = [pool.float() for pool in pools]
        wanted, wide_k = self.reference.rope(q.float(), k.float(), cos, sin)
        self.reference.write_kv(wide_k, v.float(), theirs[0], theirs[1], self._reference_plan(plan))

        def check(found: object) -> float:
            return max(error(found, wanted), *(error(one, other) for one, other in zip(pools, theirs, strict=True)))

        return Work(lambda: self.ops.rope_write_kv(q, k, v, cos, sin, pools[0], pools[1], planned), check)

    def _attention(self, kernel: str, rows: int, new: int, kv_len: int, together: bool = False) -> Case:
        shape = self.shape
        head = shape.head_dim
        seen = rows * (new * kv_len - new * (new - 1) // 2)
        read = kv_len + (rows - 1) * (new if together else kv_len)
        moved = 2 * (2 * read * shape.kv_heads + 2 * rows * new * shape.heads) * head
        flops = 4 * seen * shape.heads * head
        size = f"{rows} x {new} new of {kv_len}"
        return Case(kernel, size, lambda: self._attend(rows, new, kv_len, together), moved, flops)

    def _attend(self, rows: int, new: int, kv_len: int, together: bool) -> Work:
        plan = self._plan(rows, new, kv_len, (kv_len - new) // PAGE_SIZE if together else 0)
        q, _, _ = self._stacked(plan.num_tokens)
        pools = self._pools(plan)
        planned, scale = self._planned(plan), self.shape.head_dim**-0.5

        def check(found: object) -> float:
            assert isinstance(found, torch.Tensor)
            few = min(new, CHECKED_TOKENS)
            worst = 0.0
            theirs = self._reference_plan(plan)
            for row in sorted({0, rows // 2, rows - 1}):
                for skipped in {0, new - few}:
                    part = slice(row * new + skipped, row * new + skipped + few)
                    piece = ReferencePlan(
                        layout=theirs.layout,
                        query_lens=(few,),
                        kv_lens=(kv_len - new + skipped + few,),
                        pages=(theirs.pages[row],),
                        cache_slots=theirs.cache_slots[part],
                    )
                    wanted = self.reference.attention(
                        q[part].float(), pools[0], pools[1], piece, scale=scale, sliding_window=None
                    )
                    worst = max(worst, error(found[part], wanted))
            return worst if bool(found.isfinite().all()) else float("inf")

        return Work(lambda: self.ops.attention(q, pools[0], pools[1], planned, scale=scale, sliding_window=None), check)

    def _greedy(self, rows: int) -> Work:
        logits = torch.randn(rows, self.shape.vocabulary, device=self.device)
        wanted = logits.argmax(-1)
        return Work(lambda: self.ops.greedy(logits)[0], lambda found: 0.0 if _same(found, wanted) else float("inf"))

    def _sample(self, rows: int) -> Work:
        logits = torch.randn(rows, self.shape.vocabulary, device=self.device) * 4
        heat = torch.full((rows,), 0.7, device=self.device)
        seeds = torch.randint(1 << 62, (rows,), device=self.device)
        steps = torch.zeros_like(seeds)

        def check(found: object) -> float:
            """Distance of the drawn token's interval of the distribution function from the random number."""
            from tgi_model_server.sampling.uniform import uniform

            assert isinstance(found, torch.Tensor)
            reached = (logits.double() / heat[:, None].double()).softmax(-1).cumsum(-1)
            numbers = torch.tensor([uniform(seed, 0) for seed in seeds.tolist()], dtype=torch.float64)
            above = reached.gather(1, found[:, None])[:, 0].cpu()
            below = torch.where(found > 0, reached.gather(1, (found - 1).clamp(min=0)[:, None])[:, 0], 0.0).cpu()
            # Rounding may err by some millionths: far below the tolerance, which this is scaled to.
            return max(0.0, float(torch.maximum(below - numbers, numbers - above).max())) * 1e3

        return Work(lambda: self.ops.sample(logits, heat, seeds, steps), check)

    def _plan(self, rows: int, new: int, kv_len: int, shared_pages: int = 0) -> StepPlan:
        """Rows on scattered pages, the first of which they may share."""
        needed = -(-kv_len // PAGE_SIZE)
        pages = list(range(1, rows * needed + 1))
        self._draw.shuffle(pages)
        return StepPlan(
            slots=list(range(rows)),
            query_lens=[new] * rows,
            kv_lens=[kv_len] * rows,
            pages=[
                pages[:shared_pages] + pages[row * needed + shared_pages : (row + 1) * needed] for row in range(rows)
            ],
            token_ids=[0] * (rows * new),
        )

    def _planned(self, plan: StepPlan) -> Any:
        return triton_plan(
            plan, self.attention, KVLayout(PAGE_SIZE), device=self.device, cores=self.cores, tuning=self.tuning
        )

    def _reference_plan(self, plan: StepPlan) -> ReferencePlan:
        return reference_plan(plan, KVLayout(PAGE_SIZE), self.device)

    def _stacked(self, tokens: int) -> Sequence[torch.Tensor]:
        shape = self.shape
        sizes = (shape.heads, shape.kv_heads, shape.kv_heads)
        return self._random(tokens, sum(sizes), shape.head_dim).split_with_sizes(sizes, 1)

    def _pools(self, plan: StepPlan) -> list[torch.Tensor]:
        pages = max(max(row) for row in plan.pages) + 1
        return [self._random(pages, PAGE_SIZE, self.shape.kv_heads, self.shape.head_dim) for _ in range(2)]


def error(found: object, wanted: torch.Tensor) -> float:
    """Largest error relative to the largest value; infinite for what is not finite or of another shape."""
    assert isinstance(found, torch.Tensor)
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found.float() - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


def _same(found: object, wanted: torch.Tensor) -> bool:
    return isinstance(found, torch.Tensor) and torch.equal(found, wanted)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Timer:
    """Times of calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self._chip: Any = getattr(torch, device.type)
        self.graphs = device.type == "cuda"

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median time of one call, when all of them run one after the other."""
        rotate = self._rotation(calls)
        for _ in range(3):
            rotate()
        times = []
        for _ in range(ROTATIONS):
            begin, end = (self._chip.Event(enable_timing=True) for _ in range(2))
            begin.record()
            rotate()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
        return float(statistics.median(times))

    def _rotation(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        # Results stay until the end of a rotation: memory used again at once would never leave the chip's cache.
        def eager() -> list[object]:
            return [call() for call in calls]

        if not self.graphs:
            return eager
        stream: Any = self._chip.Stream()
        with torch.cuda.stream(stream):
            eager()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = eager()
        del kept
        return graph.replay


def _cores(device: torch.device) -> int:
    """Processors of the chip, as its maker counts them."""
    if device.type == "cpu":
        return 4
    properties: Any = getattr(torch, device.type).get_device_properties(device)
    for name in ("multi_processor_count", "gpu_subslice_count"):
        if hasattr(properties, name):
            return int(getattr(properties, name))
    raise SystemExit(f"{properties} does not tell the number of its processors")


def _cache_bytes(device: torch.device) -> int:
    properties: Any = getattr(torch, device.type).get_device_properties(device)
    return int(getattr(properties, "L2_cache_size", 64 << 20))


def about(device: torch.device) -> dict[str, str]:
    name = platform.processor() or "cpu"
    if device.type != "cpu":
        name = str(getattr(torch, device.type).get_device_name(device))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "hardware": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def measure(bench: Bench, case: Case, timer: Timer, ceilings: Ceilings) -> dict[str, float]:
    copies = max(2, min(MOST_COPIES, -(-4 * _cache_bytes(bench.device) // case.bytes)))
    seconds = timer.seconds([case.make().run for _ in range(copies)])
    limit = max(case.bytes / ceilings.bytes_per_s, case.flops / ceilings.flops_per_s)
    return {
        "us": seconds * 1e6,
        "limit_us": limit * 1e6,
        "gb_per_s": case.bytes / seconds / 1e9,
        "tflop_per_s": case.flops / seconds / 1e12,
        "of_limit": limit / seconds,
    }


def find_device(check_only: bool) -> torch.device:
    """Exits with 2 where there is nothing to measure on."""
    if interpreted():
        if check_only:
            return torch.device("cpu")
        print(
            "bench/kernels.py cannot time interpreted kernels: unset TRITON_INTERPRET, or use --check", file=sys.stderr
        )
        raise SystemExit(2)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        print(f"{NEEDS}. To check the results on a CPU: TRITON_INTERPRET=1 ... --check --shape tiny", file=sys.stderr)
        raise SystemExit(2)
    return torch.device(found.type, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name has this in it")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--check", action="store_true", help="check results, take no times")
    parser.add_argument("--stages", type=int, help="depth of the attention kernels' pipelines; 2 suits AMD")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    device = find_device(args.check)
    tuning = Tuning(decode_stages=args.stages, prefill_stages=args.stages) if args.stages else Tuning()
    known = about(device)
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    bench = Bench(device, SHAPES[args.shape], tuning)
    rows: list[dict[str, Any]] = []
    wrong = 0
    with torch.inference_mode():
        ceilings = timer = None
        if not args.check:
            timer = Timer(device)
            ceilings = measure_ceilings(device)
            copy, product = ceilings.bytes_per_s / 1e12, ceilings.flops_per_s / 1e12
            way = "graphs" if timer.graphs else "eager"
            print(f"copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s; {way}")
        heads = f"{'us':>9} {'limit us':>9} {'GB/s':>7} {'TFLOP/s':>8} {'of limit':>8}"
        print(f"{'kernel':<15} {'size':<24} {'error':>8} {heads if timer else ''}")
        for case in bench.cases():
            if args.only not in case.kernel:
                continue
            work = case.make()
            with poisoned_memory():
                found = work.run()
            off = work.check(found)
            del work, found
            row: dict[str, Any] = {"kernel": case.kernel, "size": case.size, "error": off}
            line = f"{case.kernel:<15} {case.size:<24} {off:>8.1e}"
            if off > TOLERANCE:
                wrong += 1
                line += "  WRONG, not timed"
            elif timer is not None and ceilings is not None:
                row |= measure(bench, case, timer, ceilings)
                line += f" {row['us']:>9.2f} {row['limit_us']:>9.2f} {row['gb_per_s']:>7.0f} {row['tflop_per_s']:>8.1f}"
                line += f" {row['of_limit']:>8.1%}"
            rows.append(row)
            print(line, flush=True)
    if args.json:
        limits = (
            None if ceilings is None else {"bytes_per_s": ceilings.bytes_per_s, "flops_per_s": ceilings.flops_per_s}
        )
        args.json.write_text(json.dumps({"about": known, "ceilings": limits, "rows": rows}, indent=1) + "\n")
    if wrong:
        raise SystemExit(f"{wrong} kernels are wrong")


if __name__ == "__main__":
    main()
