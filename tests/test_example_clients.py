"""The scripts of examples/clients, run as users run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from outsider import ROOT
from servers import Server, run_server

FOLDER = ROOT / "examples" / "clients"
QUESTION = "What is the capital of France?"
KEY = "the key of the examples"


def run(url: str, script: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
    """Skips where the program that runs it is not installed."""
    program = {".py": sys.executable, ".sh": "sh", ".mjs": "node"}[Path(script).suffix]
    needed = "curl" if script == "curl.sh" else program
    if shutil.which(needed) is None:
        pytest.skip(f"{needed} is not installed")
    environ = {name: value for name, value in os.environ.items() if name != "API_KEY"}
    if key is not None:
        environ["API_KEY"] = key
    command = [program, str(FOLDER / script), url, QUESTION]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("script", ["openai_chat.py", "huggingface_client.py", "curl.sh", "fetch.mjs"])
def test_an_example_asks_and_prints_the_answer(demo_server: Server, script: str) -> None:
    done = run(demo_server.url, script)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_curl_shows_every_form_of_an_answer(demo_server: Server) -> None:
    whole, *stream, constrained = run(demo_server.url, "curl.sh").stdout.strip().split("\n")
    assert "Paris" in json.loads(whole)["choices"][0]["message"]["content"]
    events = [json.loads(line.removeprefix("data:")) for line in stream if line.startswith("data:")]
    assert len(events) == 20
    assert events[-1]["generated_text"]
    assert set(json.loads(json.loads(constrained)["generated_text"])) == {"legs"}


@pytest.fixture(scope="module")
def closed_server(tmp_path_factory: pytest.TempPathFactory, byte_model: Path) -> Iterator[Server]:
    """One that wants a key."""
    folder = tmp_path_factory.mktemp("closed")
    with run_server(folder, "--backend", "echo", "--model-id", str(byte_model), "--api-key", KEY) as it:
        yield it


@pytest.mark.parametrize("script", ["openai_chat.py", "huggingface_client.py", "curl.sh", "fetch.mjs"])
def test_a_wrong_key_is_an_error_that_says_so(closed_server: Server, script: str) -> None:
    done = run(closed_server.url, script, "another key")
    assert done.returncode != 0
    assert "401" in done.stdout + done.stderr


def test_the_list_of_clients_has_each_of_them() -> None:
    told = (FOLDER / "README.md").read_text("utf-8")
    assert all(path.name in told for path in FOLDER.iterdir() if path.name != "README.md")
