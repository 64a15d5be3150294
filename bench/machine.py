"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, object]:
    """Processor, cores, accelerators, Python and commit."""
    cpu = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "accelerators": [name for name, _ in nvidia()],
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD").strip(),
    }


def nvidia() -> list[tuple[str, int]]:
    """(name, bytes in use by anybody) of every NVIDIA GPU that the driver shows."""
    text = _output("nvidia-smi", "--query-gpu=name,memory.used", "--format=csv,noheader,nounits")
    rows = [line.rpartition(",") for line in text.splitlines() if "," in line]
    return [(name.strip(), int(used) << 20) for name, _, used in rows if used.strip().isdigit()]


def _output(*command: str) -> str:
    """Standard output; empty if the command is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
