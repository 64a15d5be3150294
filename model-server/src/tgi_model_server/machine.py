"""What this process may use of the machine: cores and bytes, as affinity and control groups allow."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from tgi_gateway.cores import CGROUP, cpu_quota

_CGROUP = CGROUP
_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores(processes: int = 1) -> int:
    """Threads worth starting in each of `processes`: physical cores of our affinity mask, within the CPU quota, but one
    for the HTTP workers.

    A step's threads wait for each other at every operation, so one that has to share its core slows all of them.
    OMP_NUM_THREADS overrules.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        logical = sorted(os.sched_getaffinity(0))
    else:
        logical = list(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in logical}
    return max(1, (min(len(cores), cpu_quota(_CGROUP) or len(cores)) - 1) // processes)


def _siblings(cpu: int) -> str:
    """Hardware threads of one core share this text."""
    return _text(_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu)


@cache
def rounds_alike() -> bool:
    """Whether the matrix libraries round a row the same way whatever stands beside it.

    oneDNN and MKL do, as the CPU backend sets them up, on Intel's processors with AVX-512. On others MKL chooses its
    code by the number of rows; on other architectures torch comes with libraries that nobody has measured.
    """
    cpu = _text(Path("/proc/cpuinfo")) or ""
    flags = next((line.split() for line in cpu.splitlines() if line.startswith("flags")), [])
    return "GenuineIntel" in cpu and {"avx512bw", "avx512vl", "avx512dq"} <= set(flags)


def total_bytes() -> int:
    """Memory of the machine, or of our control group where that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, _cgroup_limit() or whole)


def available_bytes() -> int:
    """Memory that can be taken without swapping, within the control group's limit."""
    available = total_bytes()
    for line in (_text(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit = _cgroup_limit()
    if limit is None:
        return available
    used = _text(_CGROUP / "memory.current") or _text(_CGROUP / "memory" / "memory.usage_in_bytes") or "0"
    return max(0, min(available, limit - int(used)))


def _cgroup_limit() -> int | None:
    limit = _text(_CGROUP / "memory.max") or _text(_CGROUP / "memory" / "memory.limit_in_bytes") or "max"
    # Version 1 says "no limit" with a number beyond any memory.
    return int(limit) if limit.isdigit() and int(limit) < 1 << 60 else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
