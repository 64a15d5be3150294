"""A disk that is full after a few MiB, without any right to mount one: a name space of a user's own has one."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

MOUNT = 'mount -t tmpfs -o size="$1"m small "$0" && echo mounted && exec cat'


@dataclass(frozen=True)
class Disk:
    """A file system of its own."""

    path: Path
    """For any process of this user."""

    def fill(self) -> None:
        """Leave not a byte."""
        with contextlib.suppress(OSError), (self.path / "filler").open("ab", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))

    def make_room(self) -> None:
        (self.path / "filler").unlink()


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Disk]:
    """Skips the test where the system grants none."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1) here")
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, str(folder), str(mib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            if not holder.stdout.readline():
                pytest.skip("a user's own name space is not granted here")
            yield Disk(Path(f"/proc/{holder.pid}/root{folder}"))
        finally:
            holder.kill()
