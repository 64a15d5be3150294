"""`tgi-gateway` as a user starts it: its processes, its log, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from servers import free_port

WAIT_S = 60.0
"""Far more than anything here takes; only a hanging process meets it."""
TOLD_WITHIN_S = 2.0
"""How soon every open request must know that its engine is gone."""
PROMPT = "The quick brown fox. "


@dataclass
class Gateway:
    """A `tgi-gateway` process with a folder for temporary files of its own."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    seen: set[int] = field(default_factory=set)
    """Every child that was seen alive."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def wait_for(self, text: str, times: int = 1) -> None:
        """Until the log has `text` so often."""
        deadline = time.monotonic() + WAIT_S
        while self.log.count(text) < times:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.log}"
            time.sleep(0.02)

    def children(self) -> dict[str, int]:
        """Pids by what runs: engine_process, http_process or model_process; of several, one."""
        return {kind: pid for pid, kind in self.pids().items()}

    def kinds(self) -> list[str]:
        return list(self.pids().values())

    def pids(self) -> dict[int, str]:
        """What runs, by pid."""
        found: dict[int, str] = {}
        for pid in _children(self.process.pid):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                # Between fork and exec a child still shows its parent's command line, which names no module of ours.
                for module in (part for part in command if part.startswith("tgi_gateway.")):
                    found[pid] = module.rsplit(".", 1)[1]
        self.seen |= found.keys()
        return found

    def end(self) -> int:
        """Its exit code."""
        return self.process.wait(WAIT_S)

    def left_behind(self) -> list[str]:
        """Children that outlived it for more than a moment, and files in its temporary folder."""
        deadline = time.monotonic() + 10
        while (alive := [pid for pid in self.seen if _alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return [f"process {pid}" for pid in alive] + [str(path) for path in (self.folder / "tmp").iterdir()]


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@contextlib.contextmanager
def launched(*arguments: str, port: int | None = None, out: Path | None = None, **variables: str) -> Iterator[Gateway]:
    """Start the command; whatever the test does, nothing of it runs afterwards. `out`: where its log goes instead."""
    folder = Path(tempfile.mkdtemp(prefix="e2e-"))
    (folder / "tmp").mkdir()
    port = port or free_port()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder / "tmp"),
        "HF_HOME": str(folder / "hf"),
        **variables,
    }
    command = [sys.executable, "-m", "tgi_gateway", "--hostname", "127.0.0.1", "--port", str(port), *arguments]
    with (out or folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    gateway = Gateway(process, port, folder)
    try:
        yield gateway
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for pid in gateway.seen:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def serving(model: Path, *arguments: str, port: int | None = None, **variables: str) -> Iterator[Gateway]:
    """An echo server that is ready."""
    all_arguments = ("--backend", "echo", "--model-id", str(model), *arguments)
    with launched(*all_arguments, port=port, out=None, **variables) as gateway:
        gateway.wait_for("Ready at")
        gateway.children()
        yield gateway


def stream(gateway: Gateway, tokens: int, first: threading.Barrier | None = None) -> list[dict[str, object]]:
    """The events of one native stream; `first` is passed when the first is here."""
    events = []
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": tokens}}
    with httpx.stream("POST", f"{gateway.url}/generate_stream", json=body, timeout=WAIT_S) as response:
        for line in response.iter_lines():
            if line.startswith("data:"):
                events.append(json.loads(line[5:]))
                if first is not None and len(events) == 1:
                    first.wait(WAIT_S)
    return events
