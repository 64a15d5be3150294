"""A real `tgi-gateway` in processes of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_S = 60.0


@dataclass(frozen=True)
class Server:
    """A running `tgi-gateway`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def run_server(folder: Path, *arguments: str) -> Iterator[Server]:
    """Start `tgi-gateway` with `arguments`, wait until it is ready, and stop it by SIGTERM at the end."""
    port = free_port()
    log = folder / "server.log"
    command = [sys.executable, "-m", "tgi_gateway", "--hostname", "127.0.0.1", "--port", str(port), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, f"the server ended with {process.returncode}:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"the server was not ready after {START_S:g} s:\n{log.read_text()}"
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield Server(url, process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
