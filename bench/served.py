"""The server that a benchmark starts for itself: its start, its log, its processes' CPU time and memory, its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.02
STOP_S = 60.0
METRICS_S = 60.0
"""A machine that is busy with other work may take long to answer."""
OPEN = ("tgi_batch_current_size", "tgi_queue_size", "tgi_batch_current_max_tokens", "tgi_kv_cache_used_tokens")
"""Gauges that are all 0 when nothing is open."""
_ROLES = {"tgi_gateway.launcher.engine_process": "engine", "tgi_gateway.launcher.http_process": "http"}
_RANK = "tgi_model_server.rank"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})? ([-+0-9.eE]+|NaN)$", re.MULTILINE)


class NotServing(Exception):
    """The server did not come up, or went down."""


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the server at a moment."""

    role: str
    """launcher, engine, rank or http"""
    cpu_s: float
    resident_bytes: int


@dataclass(frozen=True)
class Served:
    """A running `tgi-gateway`, or somebody else's server at `url` if it has no process."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    ready_s: float = 0.0
    """From the start of the command to the first healthy answer."""
    key: str | None = None
    """An API key, where the server asks for one."""

    def parts(self) -> dict[int, Part]:
        """Every process by id; empty where /proc does not tell."""
        if self.process is None or not Path("/proc/self/stat").exists():
            return {}
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
                children.setdefault(int(stat[1]), []).append(int(entry.name))
        found: dict[int, Part] = {}
        left = [self.process.pid]
        while left:
            pid = left.pop()
            left += children.get(pid, [])
            stat = _stat(pid)
            if stat is not None:
                cpu_s = (int(stat[11]) + int(stat[12])) / _TICKS_PER_S
                found[pid] = Part(_role(pid), cpu_s, int(stat[21]) * _PAGE_BYTES)
        return found

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics, those of one name added up."""
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(f"{self.url}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=METRICS_S) as answer:
            text = answer.read().decode()
        values: dict[str, float] = {}
        for name, value in _SAMPLE.findall(text):
            values[name] = values.get(name, 0.0) + float(value)
        return values

    def drained(self, within_s: float) -> dict[str, float]:
        """Wait until nothing is in use any more; those of `OPEN` that still are after so long."""
        deadline_s = time.monotonic() + within_s
        while True:
            values = self.metrics()
            left = {name: values[name] for name in OPEN if values.get(name)}
            if not left or time.monotonic() > deadline_s:
                return left
            time.sleep(0.2)

    def check(self) -> None:
        """Raises `NotServing` if the server has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise NotServing(f"the server ended with code {self.process.returncode}{_last_words(self.log)}")


@contextmanager
def serve(
    arguments: Sequence[str],
    log: Path,
    *,
    environ: Mapping[str, str] | None = None,
    timeout_s: float,
    key: str | None = None,
) -> Iterator[Served]:
    """`tgi-gateway` with `arguments` on a free port of the loopback interface; told to stop at the end.

    Raises `NotServing` if it is not healthy within `timeout_s`.
    """
    port = _free_port()
    command = [sys.executable, "-m", "tgi_gateway", "--hostname", "127.0.0.1", "--port", str(port), *arguments]
    began = time.perf_counter()
    environment = {**os.environ, **(environ or {})}
    with log.open("ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _healthy(url):
            Served(url, process, log).check()
            if time.perf_counter() - began > timeout_s:
                raise NotServing(f"the server was not ready after {timeout_s:.0f} s{_last_words(log)}")
            time.sleep(POLL_S)
        yield Served(url, process, log, time.perf_counter() - began, key)
    finally:
        _end(process)


def cpu_by_role(before: Mapping[int, Part], after: Mapping[int, Part]) -> dict[str, list[float]]:
    """CPU seconds that each process took in between, the busiest of a role first."""
    used: dict[str, list[float]] = {}
    for pid, part in after.items():
        used.setdefault(part.role, []).append(part.cpu_s - (before[pid].cpu_s if pid in before else 0.0))
    return {role: sorted(values, reverse=True) for role, values in used.items()}


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _role(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "gone"
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return "rank" if module == _RANK else _ROLES.get(module, "launcher" if module == "tgi_gateway" else "other")


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_words(log: Path | None) -> str:
    if log is None:
        return ""
    lines = log.read_text("utf-8", "replace").splitlines()[-12:]
    return f"; its log {log} ends with:\n" + "\n".join(lines)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()  # its children notice and follow
        process.wait()
