"""The guides for authors: their files are the examples, word for word, and who copies them has a backend that works."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
from outsider import ROOT, Outsider
from servers import run_server

from tgi_gateway.backend import ALL_FEATURES
from tgi_gateway.testing.worker import write_byte_model

GUIDES = {"toy-backend": "write-a-backend.md", "toy-device": "write-a-device.md"}
MARKED = re.compile(r"<!-- examples/([\w./-]+) -->\n```\w+\n(.*?)```", re.DOTALL)
MOST_LINES = 60
pytestmark = pytest.mark.timeout(600)  # whoever comes first builds and installs the wheels


def files_in(guide: str) -> Mapping[str, str]:
    """The files that a guide tells its reader to write, by their path below examples/."""
    return dict(MARKED.findall((ROOT / "docs" / guide).read_text("utf-8")))


@pytest.mark.parametrize(("example", "guide"), GUIDES.items())
def test_a_guide_holds_every_file_of_its_example(example: str, guide: str) -> None:
    folder = ROOT / "examples" / example
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".toml") and "dist" not in path.parts]
    assert files_in(guide) == {str(path.relative_to(ROOT / "examples")): path.read_text("utf-8") for path in files}


def test_the_toy_backend_is_a_whole_engine_in_sixty_lines() -> None:
    (engine,) = (text for name, text in files_in(GUIDES["toy-backend"]).items() if name.endswith("/tgi_backend_toy.py"))
    assert len(engine.splitlines()) <= MOST_LINES


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> Outsider:
    """Has read the guides, written down their files, and installed them beside our wheels."""
    folder = tmp_path_factory.mktemp("author")
    for guide in GUIDES.values():
        for name, text in files_in(guide).items():
            path = folder / "examples" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    ours = [ROOT / name for name in ("gateway", "model-server", "contract-tests")]
    return Outsider.install(folder, *ours, *(folder / "examples" / example for example in GUIDES))


def test_nothing_of_it_comes_from_the_checkout(author: Outsider) -> None:
    names = "tgi_gateway, tgi_contract_tests, tgi_model_server, tgi_backend_toy, tgi_backend_toychip"
    done = author.python("-c", f"import {names}; print(*(each.__file__ for each in ({names})), sep='\\n')")
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(author.folder) for line in done.stdout.splitlines()), done.stdout


def test_the_toy_backend_of_the_guide_keeps_the_contract(author: Outsider, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = author.run("tgi-contract", "toy", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    groups = {test["group"] for test in json.loads(report.read_text())["tests"] if test["outcome"] == "passed"}
    assert groups >= {"Lifecycle", "Health", "Processes", "Events", "Streams", "Limits", "Stops", "Cancels", "Http"}


def test_the_toy_backend_is_listed_and_examined(author: Outsider) -> None:
    listed = author.run("tgi-gateway", "backends", "--verbose")
    assert re.search(r"^toy +0\.1\.0 +tgi-backend-toy +ready", listed.stdout, re.MULTILINE), listed.stdout
    examined = author.run("tgi-gateway", "doctor", "toy")
    assert examined.returncode == 0, examined.stdout + examined.stderr
    assert re.search(r"ok +tgi-gateway +0\.1\.0 \(needed: <0\.2,>=0\.1\)", examined.stdout), examined.stdout


def test_the_five_lines_of_pytest_run_the_contract(author: Outsider, tmp_path: Path) -> None:
    test = tmp_path / "test_toy.py"
    test.write_text(files_in(GUIDES["toy-backend"])["toy-backend/test_toy.py"], "utf-8")
    assert len(test.read_text().split("\n\n\n")[1].splitlines()) + 1 <= 5
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    common = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    done = author.python(*common, "-k", "Limits or sane or limit", str(test))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def test_an_engine_that_the_guide_kills_and_hangs_keeps_no_test_run_from_ending(
    author: Outsider, tmp_path: Path
) -> None:
    test = tmp_path / "test_toy_faults.py"
    test.write_text(files_in(GUIDES["toy-backend"])["toy-backend/test_toy_faults.py"], "utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    common = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    chosen = "dead_engine or engine_that_hangs or end_of_sequence"
    done = author.python(*common, "-k", chosen, str(test), timeout_s=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"4 passed, 1 skipped", done.stdout), done.stdout  # `min_new_tokens` is not declared


def test_options_that_the_toy_backend_would_ignore_are_refused(author: Outsider) -> None:
    code = (
        "from pathlib import Path; from tgi_gateway import plugins; from tgi_gateway.backend import EngineOptions;"
        "plugins.load('toy').create(EngineOptions(Path(), 'toy', max_total_tokens=64, dtype='bfloat16')).load()"
    )
    done = author.python("-c", code)
    assert done.stderr.rstrip().endswith("SettingsError: this engine does not support --dtype bfloat16. Leave that out")


def test_every_feature_is_in_the_guide() -> None:
    page = (ROOT / "docs" / GUIDES["toy-backend"]).read_text("utf-8")
    assert {feature for feature in ALL_FEATURES if f"`{feature}`" not in page} == set()


def test_the_toy_device_of_the_guide_keeps_the_device_contract(author: Outsider, tmp_path: Path) -> None:
    test = tmp_path / "test_toychip.py"
    shutil.copy(ROOT / "examples" / "toy-device" / test.name, test)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = author.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", str(test))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_toy_backend_is_served(author: Outsider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launcher, HTTP worker and engine host, of the installed wheels."""
    monkeypatch.setenv("PYTHONPATH", str(author.folder))
    model = tmp_path / "model"
    model.mkdir()
    write_byte_model(model)
    with run_server(tmp_path, "--backend", "toy", "--model-id", str(model)) as server:
        body = {"inputs": "A", "parameters": {"max_new_tokens": 5}}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=30)
    assert answer.json() == {"generated_text": "BCDEF"}, answer.text
