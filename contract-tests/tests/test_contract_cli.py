"""`tgi-contract NAME`, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BACKEND = """
from dataclasses import replace

from tgi_gateway.backend import BackendPlugin
from tgi_gateway.hooks import hookimpl
from tgi_gateway.testing import EchoBackend, toy_model
from tgi_gateway.testing.echo import ECHO_CAPABILITIES
import llama_cpp


@hookimpl
def tgi_backend():
    return BackendPlugin("outsider", "from another distribution", ECHO_CAPABILITIES, lambda _: EchoBackend())
"""


def tgi_contract(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(path or ""), "COLUMNS": "200"}
    command = [sys.executable, "-m", "tgi_contract_tests.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environ, check=False)


@pytest.fixture
def outsider(tmp_path: Path) -> Path:
    """An installed distribution with a backend that imports a runtime when it is loaded."""
    info = tmp_path / "tgi_backend_outsider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tgi-backend-outsider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tgi_gateway.backends]\noutsider = outsider\n")
    (tmp_path / "outsider.py").write_text(BACKEND)
    (tmp_path / "llama_cpp.py").write_text("")
    return tmp_path


def test_a_sound_backend_passes_and_its_report_says_so(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = tgi_contract("echo", "--set", "echo_step_ms=1", "--json", str(report), "-k", "Stops or Limits or health")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not declared" in done.stdout
    told = json.loads(report.read_text())
    assert told["backend"] == "echo"
    assert "seed" in told["capabilities"]["features"]
    assert told["counts"]["failed"] == 0 < told["counts"]["passed"]
    assert {test["outcome"] for test in told["tests"]} <= {"passed", "skipped"}
    assert any(test["name"] == "test_an_empty_prompt_is_refused" for test in told["tests"])


def test_a_plugin_that_imports_a_runtime_is_caught(outsider: Path) -> None:
    done = tgi_contract("outsider", "-k", "imports or sane", "--model", str(outsider), path=outsider)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed  test_loading_the_plugin_imports_no_heavy_runtime" in done.stdout
    assert "loading the plug-in `outsider` imported llama_cpp" in done.stdout
    assert "passed  test_model_info_is_sane" in done.stdout


def test_a_known_failure_is_told_apart(outsider: Path) -> None:
    known = "test_loading_the_plugin_imports_no_heavy_runtime=it always did"
    done = tgi_contract("outsider", "-k", "imports", "--known-failure", known, "--model", str(outsider), path=outsider)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "known failure  test_loading_the_plugin_imports_no_heavy_runtime (it always did)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nobody",), "there is no backend `nobody`"),
        (("echo", "--set", "speed=9"), "--set speed=9: known are"),
        (("echo", "--set", "speed"), "`speed` has no `=`"),
        (("echo", "--model", "/no/such/folder"), "there is no such folder"),
        (("echo", "-k", "no_such_test"), "no test was run"),
    ],
)
def test_what_cannot_be_run_exits_with_2(arguments: tuple[str, ...], told: str) -> None:
    done = tgi_contract(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stdout
