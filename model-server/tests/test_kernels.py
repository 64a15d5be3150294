"""The Triton kernels: right in the interpreter and on an accelerator, and compiled ahead of time.

Each in a process of its own, because Triton decides at import whether kernels are interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it exists for Linux only)"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
HERE = Path(__file__).parent
OPTIONS = ("-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:asyncio", "-W", "error")
# NumPy, under the interpreter, speaks of every infinity.
INTERPRETED = ("-W", "ignore::RuntimeWarning")


def run_tests(file: str, environment: dict[str, str], *options: str) -> None:
    """The tests of `file` in another process; fails with what that one wrote."""
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(HERE), *OPTIONS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*command, str(HERE / file)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


def test_kernels_compute_what_the_reference_computes() -> None:
    run_tests("kernel_checks.py", {"TRITON_INTERPRET": "1"}, *INTERPRETED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_kernels_compute_what_the_reference_computes_on_the_accelerator() -> None:
    run_tests("kernel_checks.py", {"TRITON_INTERPRET": "0"})


def test_kernels_compile_for_chips_that_are_not_here(tmp_path: Path) -> None:
    run_tests("compiled_kernels.py", {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)})
