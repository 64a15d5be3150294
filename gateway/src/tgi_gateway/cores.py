"""Cores that this process may use, as affinity and control groups allow, and how many of them HTTP workers get."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
CORES_PER_HTTP_WORKER = 4
MOST_HTTP_WORKERS = 4
"""One worker writes 50,000 tokens a second, more than any engine of one host makes; several keep a step's tokens and
the tokenizing of long prompts from waiting for each other. Each more costs the engine host one message per step."""


def default_http_workers(cores: int) -> int:
    """HTTP worker processes for a machine with so many cores."""
    return max(1, min(cores // CORES_PER_HTTP_WORKER, MOST_HTTP_WORKERS))


def logical_cores() -> int:
    """Threads that can run at the same time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, cpu_quota() or cores)


def cpu_quota(cgroup: Path = CGROUP) -> int | None:
    """Whole cores that the control group grants, at least 1; None: no limit."""
    quota, _, period = (_text(cgroup / "cpu.max") or "max").partition(" ")
    if not period:
        quota = _text(cgroup / "cpu" / "cpu.cfs_quota_us") or "max"
        period = _text(cgroup / "cpu" / "cpu.cfs_period_us") or ""
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return None
    return max(1, int(quota) // int(period))


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
