"""Are the native kernels right on a real GPU: each compared with float32 on fresh random inputs.

python backends/cuda/tests/native_gpu.py    prints a line for each check as it is done; exits with 1 if one is wrong
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tgi_backend_cuda.native.attention import DecodeRows
from tgi_backend_cuda.native.launch import CudaLauncher
from tgi_backend_cuda.native.ops import NativeOps
from tgi_model_server.device import HeadNorms

GPU = torch.device("cuda")
EPS = 1e-5
HIDDEN = 4096
PAGE = 16


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
    """The largest error of all products of one shape, in units of what is allowed; a second run must be equal to the
    bit.
    """
    x, norm = random(tokens, columns, dtype=dtype), random(columns, dtype=dtype)
    weight = random(2 * rows, columns, dtype=dtype, scale=columns**-0.5)
    bias = random(2 * rows, dtype=dtype) if biased else None
    residual = random(tokens, rows, dtype=dtype)
    half, half_bias = weight[:rows], None if bias is None else bias[:rows]
    plain, normed = product(x, half, half_bias), rms_norm(x, norm)

    def poisoned_out(dtype: torch.dtype = dtype) -> torch.Tensor:
        return poisoned(tokens, rows, dtype=dtype)

    calls: list[tuple[Callable[[], torch.Tensor], torch.Tensor]] = [
        (lambda: ops.linear(x, half, half_bias, out=poisoned_out()), plain),
        (lambda: ops.linear_add(x, half, residual.clone(), half_bias), plain + residual.float()),
    ]
    if ops.supports(tokens, columns, dtype, normed=True):
        wanted = product(normed, half, half_bias)
        calls += [
            (lambda: ops.norm_linear(x, norm, EPS, half, half_bias, out=poisoned_out()), wanted),
            (lambda: ops.norm_head(x, norm, EPS, half, out=poisoned_out(torch.float32)), product(normed, half, None)),
        ]
    if ops.supports(tokens, columns, dtype, normed=True, gated=rows):
        gate, up = product(normed, weight, bias).chunk(2, -1)
        calls.append((lambda: ops.norm_gated(x, norm, EPS, weight, bias, out=poisoned_out()), F.silu(gate) * up))
    # Rounding the results alone is 1.7e-3 of them. A number of x may be rounded to its neighbour when it is normalized,
    # which shows where there are few results of few terms, or they cancel each other.
    neighbour, allowed = (2**-8, 3e-3) if dtype == torch.bfloat16 else (2**-11, 1e-3)
    terms = normed.float()[:, None] * half.float() if tokens * rows < 1000 else torch.zeros(1, 1, device=GPU)
    slack = neighbour * terms.abs().amax(-1).norm()
    worst = 0.0
    for call, want in calls:
        first, second = call(), call()
        error = relative(first, want) / (allowed + (slack / want.norm()).item())
        worst = max(worst, error, 0.0 if torch.equal(first, second) else 99.0)
    return worst


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
    ops, tokens = NativeOps(launcher), len(lens)
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
    numbers = [1, 2, 4, 8, 3, 5, 6, 7]
    many = [32, 64, 16, 24, 48, 9, 33, 63]
    for dtype in (torch.bfloat16, torch.float16):
        launcher.prepare(NativeOps(launcher).kernels(dtype, [*many, *numbers], HIDDEN))

    def products(tokens: int, columns: int, rows: int, dtype: torch.dtype, biased: bool) -> None:
        def call() -> float:
            return check_linear(NativeOps(launcher), tokens, columns, rows, dtype, biased)

        made.append((f"products {tokens} x {columns} -> {rows}, {dtype}, bias {biased}", call))

    for tokens, (columns, rows) in itertools.product(numbers, usual):
        products(tokens, columns, rows, torch.bfloat16, biased=False)
    for tokens, (columns, rows), biased in itertools.product(numbers, odd, (False, True)):
        products(tokens, columns, rows, torch.bfloat16, biased)
    for tokens, (columns, rows) in itertools.product(numbers[:4], usual[:1] + odd[:4]):
        products(tokens, columns, rows, torch.float16, biased=True)
    for tokens, (columns, rows) in itertools.product(many, usual + odd):
        products(tokens, columns, rows, torch.bfloat16, biased=rows % 2 == 0)
    for tokens, (columns, rows) in itertools.product(many[:2], usual[:1] + odd[2:4]):
        products(tokens, columns, rows, torch.float16, biased=True)

    def attention(lens: Sequence[int], name: str = "usual heads", **options: Any) -> None:
        made.append((f"attention {len(lens)}: {lens[:8]}, {name}", lambda: check_attention(launcher, lens, **options)))

    borders = [1, 7, 15, 16, 17, 0, 31, 33]
    longer = [4096, 4097, 129, 1, 640, 2000, 5000, 65]
    for lens in ([1], [16], [401], [100000], borders, longer, longer[:3], borders * 4, longer * 8):
        attention(lens)
    variants: dict[str, dict[str, Any]] = {
        "window": {"window": 100},
        "head norms": {"normed": True},
        "half rotated": {"half": 32},
        "float16": {"dtype": torch.float16},
        "heads of 64, 7 to a KV head": {"head_dim": 64, "group": 7, "half": 32},
        "one to a KV head": {"group": 1},
        "8 to a KV head": {"group": 8},
        "pages of 1": {"page": 1},
        "pages of 24": {"page": 24},
        "pages of 64": {"page": 64},
    }
    for name, options in variants.items():
        attention(borders, name, **options)
        attention(longer, name, **options)
    return made


def run_checks(begin: int) -> None:
    """From number `begin` on, a line for each: an illegal access ends the process, and the line says where."""
    torch.manual_seed(time.time_ns() % 2**31)
    for number, (name, call) in enumerate(checks(CudaLauncher(GPU))):
        if number >= begin:
            print(f"{number}\t{name}", end="\t", flush=True)
            error = call()
            torch.cuda.synchronize()
            print(f"{error:.3f}", flush=True)


def check() -> list[str]:
    """Each check's number, name and error, in units of what is allowed, as it is done; those that are wrong."""
    failures: list[str] = []
    begin, died = 0, True
    while died and len(failures) < 10:
        began_at = begin
        command = [sys.executable, __file__, "--from", str(begin)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                number, name, error = line.rstrip("\n").split("\t")
                print(f"{number:>4} {name}: {error or 'DIED'}", flush=True)
                begin = int(number) + 1
                if not error or not float(error) < 1:
                    failures.append(f"{name}: {error or 'died'}")
        died = child.returncode != 0
        if died and begin == began_at:
            raise SystemExit("The checks did not begin.")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="begin", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.begin is not None:
        run_checks(arguments.begin)
        return
    failures = check()
    for failure in failures:
        print("WRONG", failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
