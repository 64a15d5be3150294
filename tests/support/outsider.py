"""An environment as an author outside of this repository has it: distributions from built wheels, nothing editable."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Outsider:
    """A folder that wheels were installed into, in front of what this environment has."""

    folder: Path

    @staticmethod
    def install(folder: Path, *distributions: Path) -> Outsider:
        """Build a wheel of each distribution and install them into `folder`, without their requirements."""
        wheels = folder / "wheels"
        for distribution in distributions:
            _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)], cwd=distribution)
        site = folder / "site"
        found = sorted(map(str, wheels.glob("*.whl")))
        options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(site)]
        _run([sys.executable, "-m", "pip", "install", *options, *found], cwd=folder)
        return Outsider(site)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.folder), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}

    def run(self, script: str, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """A command that one of the distributions brings."""
        command = [sys.executable, str(self.folder / "bin" / script), *arguments]
        return self._done(command, timeout_s)

    def python(self, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        return self._done([sys.executable, *arguments], timeout_s)

    def _done(self, command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.environment,
            cwd=self.folder,
            check=False,
        )


def _run(command: Sequence[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
