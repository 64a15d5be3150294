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


def test_a_page_for_docs_says_what_was_not_tried_and_why(tmp_path: Path) -> None:
    page = tmp_path / "echo.md"
    done = tgi_contract("echo", "--set", "echo_step_ms=1", "--markdown", str(page), "-k", "dead_engine or Loras")
    assert done.returncode == 2, "nothing of it can be run here"
    text = page.read_text()
    how = "in a test class of your own: docs/write-a-backend.md, section 4"
    kill = "`test_a_dead_engine_is_unhealthy_and_fails_its_requests`"
    assert f"* skipped: {kill}: nothing says how to kill the engine: override `kill` {how}\n" in text
    assert text.count("* skipped: ") == 1, "the first table tells what is not declared"


def test_an_engine_that_does_not_start_is_told_once_and_without_its_source(outsider: Path) -> None:
    source = BACKEND.replace("lambda _: EchoBackend()", "create").replace(
        "@hookimpl",
        """def create(options):
    from tgi_gateway.errors import StartError

    raise StartError("no device here")


@hookimpl""",
    )
    (outsider / "outsider.py").write_text(source)
    done = tgi_contract("outsider", "-k", "Limits", "--model", str(outsider), path=outsider)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("seen: the engine does not start: no device here\n") == 1
    assert "raise StartError" not in done.stdout
    assert "in: test_" in done.stdout


def test_what_an_engine_died_of_is_told_below_what_was_seen(outsider: Path) -> None:
    source = BACKEND.replace("lambda _: EchoBackend()", "create").replace(
        "@hookimpl",
        """def create(options):
    class Dying(EchoBackend):
        def next_token(self, row):
            return {}["no such page"]

    return Dying()


@hookimpl""",
    )
    (outsider / "outsider.py").write_text(source)
    done = tgi_contract("outsider", "-k", "length_is_exact", "--model", str(outsider), path=outsider)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the engine has stopped" in done.stdout
    assert "KeyError: 'no such page'" in done.stdout


def test_a_model_that_the_server_would_not_take_is_told_as_the_server_does(outsider: Path) -> None:
    done = tgi_contract("outsider", "-k", "server_takes", "--model", str(outsider), path=outsider)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{outsider} has no tokenizer.json, no config.json, no *.safetensors weights." in done.stdout


def test_an_engine_gets_what_its_plugin_has_prepared(outsider: Path) -> None:
    """As behind the server: the contract would otherwise start it on files that it never gets."""
    source = BACKEND.replace("lambda _: EchoBackend()", "create, weights=(), prepare=prepare").replace(
        "@hookimpl",
        """def create(options):
    assert options.model_path.name == "made" and options.tokenizer_path.name == "made"
    return EchoBackend()


def prepare(options, folder):
    from tgi_gateway.backend import ModelFiles
    from tgi_gateway.testing.worker import write_byte_model

    (folder / "made").mkdir()
    write_byte_model(folder / "made")
    return ModelFiles(folder / "made", folder / "made")


@hookimpl""",
    )
    (outsider / "outsider.py").write_text(source)
    done = tgi_contract("outsider", "-k", "server_takes or sane", "--model", str(outsider), path=outsider)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_model_the_command_says_how_to_name_one(outsider: Path) -> None:
    (outsider / "tgi_demo_model.py").write_text("def model_path():\n    raise FileNotFoundError('not trained')\n")
    done = tgi_contract("outsider", path=outsider)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Add --model DIR" in done.stdout
    assert "--model-id" not in done.stdout


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
        (("echo", "--set", "echo_step_ms=abc"), "`--set echo_step_ms` is 'abc'; allowed: a number"),
        (("echo", "--set", "max_batch_size=many"), "--set max_batch_size=many: Expected `int | null`, got `str`"),
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
