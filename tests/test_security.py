"""docs/security.md is true: every test that it names exists; and the rules that concern the sources as a whole."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("gateway/src", "model-server/src", "contract-tests/src", *map(str, ROOT.glob("backends/*/src")))
    for path in (ROOT / folder).rglob("*.py")
]
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "multiprocessing"}
"""Modules; the queues and pipes of the last one pickle."""
OBJECTS = re.compile(r"(broadcast|all_gather|gather|scatter|send|recv)_object(_list)?")
"""Collectives of torch.distributed that pickle."""


def rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "security.md").read_text().splitlines()
    return [line.strip("|").split(" | ") for line in lines if line.startswith("| ")][1:]


def test_every_rule_is_held_by_tests_that_exist() -> None:
    tests = {
        name
        for path in ROOT.glob("**/tests/**/*.py")
        if ".venv" not in path.parts
        for name in re.findall(r"def (test_\w+)\(", path.read_text("utf-8"))
    }
    assert len(rows()) >= 15
    for row in rows():
        named = re.findall(r"`(test_\w+)`", row[-1])
        assert named, row[0]
        assert set(named) <= tests, sorted(set(named) - tests)


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in SOURCES:
        yield path.relative_to(ROOT), ast.parse(path.read_text("utf-8"))


def test_no_source_can_unpickle() -> None:
    """Neither by a module made for it nor through torch or NumPy, whose loaders and collectives of objects do it."""
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & UNPICKLERS, path
            elif isinstance(node, ast.ImportFrom):
                package = (node.module or "").partition(".")[0]
                assert package not in UNPICKLERS, path
                assert not (package in ("torch", "numpy") and "load" in {alias.name for alias in node.names}), path
            elif isinstance(node, ast.Attribute) and OBJECTS.fullmatch(node.attr):
                raise AssertionError(f"{path}:{node.lineno} pickles by {node.attr}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                owner = node.func.value
                assert not (isinstance(owner, ast.Name) and owner.id in ("torch", "np", "numpy")), (
                    f"{path}:{node.lineno}"
                )


def test_no_source_runs_a_models_code() -> None:
    """`auto_map` names code in a model's folder. Nobody reads it, and no server runs what a path names."""
    for path, tree in trees():
        if path.parts[0] == "contract-tests":
            continue  # which runs an author's own test files
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant):
                assert node.value != "auto_map", path
            elif isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert called not in ("exec", "spec_from_file_location", "get_class_from_dynamic_module"), path
                assert not (isinstance(node.func, ast.Name) and called == "eval"), path


def test_keys_are_compared_in_constant_time() -> None:
    """A key is hashed first, and only hashes are compared, by the function made for that."""
    tree = ast.parse((ROOT / "gateway/src/tgi_gateway/keys.py").read_text("utf-8"))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "hmac.compare_digest" in called
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.Eq | ast.In) for op in node.ops):
            assert not re.search(r"\b(key|digest|known|given)\b", ast.unparse(node)), ast.unparse(node)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bad_requests_are_refused_without_assertions_too() -> None:
    """The tests of bad input, over sources whose assertions are compiled away. pytest keeps those of its own files."""
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [sys.executable, "-O", "-m", "pytest", *options, str(ROOT / "gateway/tests/test_api_bad_input.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-500:]
