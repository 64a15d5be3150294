"""What a device can do at most, measured on it: bytes copied and products of matrices of random numbers per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 7


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float
    """Read and written ones both counted."""
    flops_per_s: float


def measure_ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Ceilings:
    """A copy far larger than any cache, and a product large enough to fill the chip; takes about a second."""
    return Ceilings(_copied_bytes_per_s(device), _flops_per_s(device, dtype))


def _copied_bytes_per_s(device: torch.device) -> float:
    source = torch.randn((1 << 25) if device.type == "cpu" else (1 << 28), device=device)
    into = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _seconds(lambda: into.copy_(source), device)


def _flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    size = 1024 if device.type == "cpu" else 8192
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: one @ other, device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, in series long enough that a launch costs nothing."""
    calls = 1
    times: list[float] = []
    while len(times) < REPEATS:
        synchronize(device)
        began_s = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        took_s = time.perf_counter() - began_s
        if took_s < 0.01:
            calls *= 2
            continue
        times.append(took_s / calls)
    return statistics.median(times)
