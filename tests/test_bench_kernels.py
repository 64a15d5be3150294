"""The benchmark of the kernels, where it cannot measure: it says so, and its checks run in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
BENCH = Path(__file__).parents[1] / "bench" / "kernels.py"


def run_bench(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(interpret))}
    command = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_it_says_that_it_needs_one() -> None:
    done = run_bench(interpret=False)
    assert done.returncode == 2
    assert "needs an accelerator" in done.stderr


def test_interpreted_kernels_are_not_timed() -> None:
    done = run_bench(interpret=True)
    assert done.returncode == 2
    assert "cannot time interpreted kernels" in done.stderr


def test_each_of_its_cases_passes_its_check(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run_bench("--check", "--shape", "tiny", "--json", str(report), interpret=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    kernels = {"rms_norm", "silu_mul", "rope_write_kv", "decode", "prefill", "shared", "greedy", "sample"}
    assert {row["kernel"] for row in rows} == kernels
