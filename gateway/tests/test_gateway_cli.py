"""The small commands, and how errors look: one line, an exit code, no traceback."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tgi_gateway import cli


@pytest.fixture(autouse=True)
def process_restored() -> Iterator[None]:
    """A command sets up its process, which here is the tests' own."""
    root, handler = logging.getLogger(), signal.getsignal(signal.SIGINT)
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    signal.signal(signal.SIGINT, handler)


def test_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tgi-gateway {version('tgi-gateway')}\n"


def test_backends_lists_name_version_distribution_and_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backends"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "VERSION", "DISTRIBUTION", "STATUS", "SUMMARY"]
    (echo,) = [row.split() for row in rows if row.startswith("echo ")]
    assert echo[:4] == ["echo", version("tgi-gateway"), "tgi-gateway", "ready"]


def test_backends_tells_capabilities_and_verbosely_flags_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backends"]) == 0
    short = capsys.readouterr().out
    assert "features: frequency_penalty, ignore_eos, " in short
    assert "--echo-step-ms" not in short
    assert cli.main(["backends", "--verbose"]) == 0
    assert "flag: --echo-step-ms" in capsys.readouterr().out


def test_the_command_backends_imports_no_torch() -> None:
    code = (
        "import sys; from tgi_gateway.cli import main; code = main(['backends', '--verbose']);"
        "heavy = [name for name in ('torch', 'transformers', 'grpc', 'tokenizers', 'uvicorn') if name in sys.modules];"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_doctor_says_whether_a_backend_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "echo"]) == 0
    assert "can run here" in capsys.readouterr().out
    assert cli.main(["doctor", "neuron"]) == 1
    assert 'pip install "tgi-gateway[neuron]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--no-such-flag"], 2, "there is no flag `--no-such-flag`"),
        (["serve", "--prt", "1"], 2, "did you mean `--port`?"),
        (["backends", "--loud"], 2, "knows only --verbose"),
        (["doctor", "a", "b"], 2, "takes one backend"),
        (["--backend", "abacus"], 1, "there is no backend `abacus`"),
        (["download", "/no/such/folder/at/all"], 1, "neither a folder that exists nor a hub id"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    argv: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert text in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["backends", "doctor", "download", "serve"])
def test_every_command_has_help(command: str) -> None:
    result = subprocess.run([sys.executable, "-m", "tgi_gateway", command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: tgi-gateway")
    assert result.stderr == ""


def test_download_of_a_local_folder_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert cli.main(["download", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m tgi_gateway --help | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert result.stderr == ""
