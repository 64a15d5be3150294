"""`known_failures`: strict, and never older than the contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAD = """
from tgi_contract_tests import BackendContract
from tgi_gateway.testing import EchoBackend, toy_model

class TestEcho(BackendContract):
    def make(self):
        return EchoBackend(toy_model(max_sequences=4, max_total_tokens=64))
"""


def run(tmp_path: Path, names: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(f"{HEAD}\n    known_failures = {names}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rxX", "-p", "no:asyncio", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-k", "sane or twice", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_known_failure_that_passes_is_a_failure(tmp_path: Path) -> None:
    done = run(tmp_path, '{"test_model_info_is_sane": "was broken once"}')
    assert done.returncode == 1
    assert "[XPASS(strict)] was broken once" in done.stdout


def test_a_known_failure_that_no_test_has_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path, '{"test_of_last_year": "gone"}')
    assert done.returncode == 4
    assert "TestEcho.known_failures names tests that do not exist: ['test_of_last_year']" in done.stderr
