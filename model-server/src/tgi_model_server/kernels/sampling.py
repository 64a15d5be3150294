"""Choosing tokens on the device: greedy with what log-probabilities need, and drawn from the whole distribution; two
launches each, no softmax in memory.

A first kernel goes over the logits once, in chunks of the vocabulary, for each chunk's maximum and the sum of its
exponentials. A second one picks per row: the best token, or the chunk, and then the token in it, at which the
distribution function passes the row's random number. That number is `sampling.uniform`'s, to 24 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tgi_model_server.kernels.launch import LOG2E, launch, power_of_two

_CHUNK = 4096
_BLOCK = 1024


@triton.jit
def chunk_kernel(
    logits,
    temperature,
    best,
    best_at,
    sums,
    row_stride,
    vocabulary,
    log2e,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [rows, CHUNKS]. logits [rows, vocabulary], any float, of stride (row_stride, 1).

    For each chunk, all [rows, CHUNKS]: best float32, its largest logit; best_at int32, the first token that has it (NaN
    counts as largest, as in torch); sums float32, of exp((logit - best) / temperature). temperature float32 [rows],
    where 0 or less means greedy and makes the sum meaningless; None is 1.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    source = logits + row * row_stride
    lanes = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    top_at = chunk * CHUNK + lanes
    total = tl.zeros((BLOCK,), tl.float32)
    slope = log2e
    if temperature is not None:
        slope = log2e / tl.load(temperature + row)
    for start in range(0, CHUNK, BLOCK):
        token = chunk * CHUNK + start + lanes
        value = tl.load(source + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
        value = tl.where(value != value, float("inf"), value)
        better = value > top
        higher = tl.where(better, value, top)
        # Where both are infinite their difference is not a number.
        fade = tl.where(better, tl.exp2((top - higher) * slope), 1.0)
        total = total * fade + tl.where(value == higher, 1.0, tl.exp2((value - higher) * slope))
        total = tl.where(higher == float("-inf"), 0.0, total)
        top_at = tl.where(better, token, top_at)
        top = higher
    peak = tl.max(top, axis=0)
    at = row * CHUNKS + chunk
    tl.store(best + at, peak)
    # No lane past the end can win: its token is larger than that of a lane within with the same value.
    tl.store(best_at + at, tl.min(tl.where(top == peak, top_at, 2147483647), axis=0))
    part = tl.where(top == peak, total, total * tl.exp2((top - peak) * slope))
    tl.store(sums + at, tl.where(peak == float("-inf"), 0.0, tl.sum(part, axis=0)))


@triton.jit
def greedy_kernel(best, best_at, sums, out, logsumexp, log2e, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Grid [rows]: `chunk_kernel`'s chunks, of temperature 1, to out int64 [rows], the first token with the largest
    logit, and logsumexp float32 [rows].
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_C)
    real = chunk < CHUNKS
    value = tl.load(best + row * CHUNKS + chunk, mask=real, other=float("-inf"))
    token = tl.load(best_at + row * CHUNKS + chunk, mask=real, other=2147483647)
    peak = tl.max(value, axis=0)
    tl.store(out + row, tl.min(tl.where(value == peak, token, 2147483647), axis=0).to(tl.int64))
    part = tl.load(sums + row * CHUNKS + chunk, mask=real, other=0.0)
    total = tl.sum(tl.where(value == peak, part, part * tl.exp2((value - peak) * log2e)), axis=0)
    tl.store(logsumexp + row, peak + tl.log2(total) / log2e)


@triton.jit
def _mixed(value):
    """The finalizer of SplitMix64, as in `sampling.uniform`; `value` and the result uint64."""
    value = (value ^ (value >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    value = (value ^ (value >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return value ^ (value >> 31)


@triton.jit
def _uniform(seed, index):
    """`sampling.uniform.uniform` in [0, 1), cut to the 24 bits that float32 holds; `seed` and `index` uint64."""
    step = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    bits = _mixed(_mixed(seed + step) + (index + 1) * step)
    return (bits >> 40).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def draw_kernel(
    logits,
    temperature,
    seeds,
    indices,
    best,
    best_at,
    sums,
    out,
    row_stride,
    vocabulary,
    log2e,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid [rows]: out int64 [rows], drawn with number `indices` of `seeds` (int64 [rows], bits of a uint64) where
    temperature float32 [rows] is above 0, the best token elsewhere.

    Inverse of the distribution function, tokens in order of their ids. The rest as `chunk_kernel` has it.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_C)
    real = chunk < CHUNKS
    value = tl.load(best + row * CHUNKS + chunk, mask=real, other=float("-inf"))
    peak = tl.max(value, axis=0)
    token = tl.load(best_at + row * CHUNKS + chunk, mask=real, other=2147483647)
    greedy = tl.min(tl.where(value == peak, token, 2147483647), axis=0)
    heat = tl.load(temperature + row)
    # A row without a finite maximum has no distribution: its first such token stands in.
    if (heat > 0.0) & (peak < float("inf")) & (peak > float("-inf")):
        slope = log2e / heat
        mass = tl.load(sums + row * CHUNKS + chunk, mask=real, other=0.0) * tl.exp2((value - peak) * slope)
        reached = tl.cumsum(mass, axis=0)
        uniform = _uniform(
            tl.load(seeds + row).to(tl.uint64, bitcast=True), tl.load(indices + row).to(tl.uint64, bitcast=True)
        )
        target = uniform * tl.max(reached, axis=0)
        # Where rounding carries the target past the end, the last token with any mass is taken.
        last = tl.max(tl.where(mass > 0.0, chunk, 0), axis=0)
        chosen = tl.minimum(tl.min(tl.where((reached > target) & (mass > 0.0), chunk, BLOCK_C), axis=0), last)
        before = tl.sum(tl.where(chunk < chosen, mass, 0.0), axis=0)
        lane = tl.arange(0, CHUNK)
        at = chosen * CHUNK + lane
        logit = tl.load(logits + row * row_stride + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        weight = tl.exp2((logit - peak) * slope)
        within = tl.cumsum(weight, axis=0)
        last_lane = tl.max(tl.where(weight > 0.0, lane, 0), axis=0)
        over = (within > target - before) & (weight > 0.0)
        picked = tl.minimum(tl.min(tl.where(over, lane, CHUNK), axis=0), last_lane)
        tl.store(out + row, (chosen * CHUNK + picked).to(tl.int64))
    else:
        tl.store(out + row, greedy.to(tl.int64))


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [rows, vocabulary], any float -> int64 [rows], the first of the largest; float32 [rows], the logarithm of
    the sum of exponentials.
    """
    rows = logits.shape[0]
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logsumexp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        best, best_at, sums = _chunks(logits, None)
        chunks = best.shape[1]
        launch(
            greedy_kernel,
            (rows,),
            best,
            best_at,
            sums,
            out,
            logsumexp,
            LOG2E,
            CHUNKS=chunks,
            BLOCK_C=power_of_two(chunks),
            num_warps=1,
        )
    return out, logsumexp


def sample(logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: logits [rows, vocabulary] drawn at temperature float32 [rows], 0 or less meaning greedy.

    `indices` int64 [rows]: which number of its seed (int64 [rows], bits of a uint64) a row uses.
    """
    rows = logits.shape[0]
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        best, best_at, sums = _chunks(logits, temperature)
        chunks = best.shape[1]
        launch(
            draw_kernel,
            (rows,),
            logits,
            temperature,
            seeds,
            indices,
            best,
            best_at,
            sums,
            out,
            logits.stride(0),
            logits.shape[1],
            LOG2E,
            CHUNKS=chunks,
            CHUNK=_CHUNK,
            BLOCK_C=power_of_two(chunks),
            num_warps=8,
        )
    return out


def _chunks(logits: torch.Tensor, temperature: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert logits.stride(-1) == 1
    rows, vocabulary = logits.shape
    chunks = triton.cdiv(vocabulary, _CHUNK)
    best = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    best_at = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    sums = torch.empty_like(best)
    launch(
        chunk_kernel,
        (rows, chunks),
        logits,
        temperature,
        best,
        best_at,
        sums,
        logits.stride(0),
        vocabulary,
        LOG2E,
        CHUNKS=chunks,
        CHUNK=_CHUNK,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return best, best_at, sums
