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


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("import os; os.environ['OUTSIDER'] = str(os.getpid())", "environment"),
        ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "threads"),
        ("import signal; signal.signal(signal.SIGTERM, lambda *_: None)", "signal handlers"),
        ("import logging; logging.basicConfig()", "log handlers"),
        ("opened = open('/dev/null')", "open files"),
        ("print('hello')", "standard output"),
    ],
)
def test_a_plugin_that_changes_its_process_is_caught(outsider: Path, line: str, changed: str) -> None:
    (outsider / "outsider.py").write_text(f"{BACKEND}\n{line}\n")
    done = tgi_contract("outsider", "-k", "changes_nothing", "--model", str(outsider), path=outsider)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"loading the plug-in `outsider` changed: {changed}\n" in done.stdout


def test_a_plugin_that_says_something_else_in_each_process_is_caught(outsider: Path) -> None:
    changing = BACKEND.replace('"from another distribution"', "f'process {os.getpid()}'").replace(
        "import llama_cpp", "import os"
    )
    (outsider / "outsider.py").write_text(changing)
    done = tgi_contract("outsider", "-k", "told_the_same", "--model", str(outsider), path=outsider)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed  test_every_process_is_told_the_same" in done.stdout


def test_a_page_for_docs_holds_both_tables(tmp_path: Path) -> None:
    page = tmp_path / "echo.md"
    done = tgi_contract("echo", "--set", "echo_step_ms=1", "--markdown", str(page), "-k", "Stops")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = page.read_text().splitlines()
    assert lines[0].startswith("## backend echo: ")
    assert "| batching | yes |" in lines
    assert "| group | passed | failed | skipped | known failure |" in lines
    assert any(line.startswith("| Stops | ") for line in lines)


def test_a_device_is_held_to_its_contract_as_well(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    device = "tgi_model_server.testing.devices:ReferenceDevice"
    chosen = "silu_mul or facts"
    done = tgi_contract("echo", "--device", device, "--json", str(report), "-k", chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {test["group"] for test in json.loads(report.read_text())["tests"]} == {"DeviceContract"}


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
        (("echo", "--device", "tgi_gateway.nowhere:Device"), "Write it as MODULE:CLASS"),
        (("echo", "--adapter", "name=/no/such/folder"), "there is no such folder or file"),
    ],
)
def test_what_cannot_be_run_exits_with_2(arguments: tuple[str, ...], told: str) -> None:
    done = tgi_contract(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stdout
