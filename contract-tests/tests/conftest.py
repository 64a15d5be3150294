"""Runs contracts over deliberately broken classes, in processes of their own, and tells what failed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

Failures = dict[str, dict[str, str]]
"""Test class -> test -> message."""
RunInner = Callable[[Path, Sequence[str], int], Failures]


@pytest.fixture(scope="module")
def run_inner(tmp_path_factory: pytest.TempPathFactory) -> RunInner:
    """Call with the file, the names of its test classes, and a number of processes: they sleep more than they work."""

    def run(file: Path, classes: Sequence[str], shards: int) -> Failures:
        folder = tmp_path_factory.mktemp("inner")
        (folder / "pytest.ini").write_text(f"[pytest]\npython_files = {file.name}\n")
        common = [sys.executable, "-m", "pytest", "-q", "-c", str(folder / "pytest.ini"), "--import-mode=importlib"]
        common += ["-p", "no:cacheprovider", "-p", "no:asyncio", "-o", "junit_family=xunit1"]
        running = []
        for shard in range(shards):
            report, chosen = folder / f"{shard}.xml", [f"{file}::{name}" for name in classes[shard::shards]]
            command = [*common, f"--junit-xml={report}", *chosen]
            running.append((report, subprocess.Popen(command, stdout=subprocess.DEVNULL)))
        failures: Failures = {}
        for report, process in running:
            process.wait(500)
            for case in ElementTree.parse(report).iter("testcase"):
                failed = failures.setdefault(case.get("classname", "").rpartition(".")[2], {})
                for problem in (*case.iter("failure"), *case.iter("error")):
                    failed[case.get("name", "")] = f"{problem.get('message')} {problem.text}"
        return failures

    return run
