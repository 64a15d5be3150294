"""The guide to a new architecture: what it quotes is there, and its changes give a model like that of transformers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from outsider import ROOT

GUIDE = (ROOT / "docs" / "add-a-model.md").read_text("utf-8")
CHANGED = re.compile(r"<!-- change ([\w./-]+) -->\n```diff\n(.*?)```", re.DOTALL)
QUOTED = re.compile(r"<!-- of ([\w./-]+) -->\n```python\n(.*?)```", re.DOTALL)


def changed(text: str, difference: str) -> str:
    """`text` after a diff without line numbers, whose old lines stand in one place."""
    lines = difference.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] != "+")
    after = "".join(line[1:] for line in lines if line[0] != "-")
    assert text.count(before) == 1, f"the guide changes what is not there:\n{before}"
    return text.replace(before, after)


def test_what_the_guide_quotes_is_in_the_sources() -> None:
    quotes = QUOTED.findall(GUIDE)
    assert len(quotes) == 2
    for name, code in quotes:
        assert code in (ROOT / name).read_text("utf-8"), f"{name} has changed:\n{code}"


@pytest.mark.timeout(300)
def test_the_changes_of_the_guide_give_a_model_like_that_of_transformers(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "model-server" / "src", tmp_path / "model-server" / "src")
    (tmp_path / "model-server" / "tests").mkdir()
    tests = "model-server/tests/test_models.py"
    shutil.copy(ROOT / tests, tmp_path / tests)
    differences = CHANGED.findall(GUIDE)
    assert len(differences) == 5
    for name, difference in differences:
        path = tmp_path / name
        path.write_text(changed(path.read_text("utf-8"), difference), "utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    done = subprocess.run(
        [*command, "-c", "pytest.ini", tests, "-k", "seed-oss"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "model-server" / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
