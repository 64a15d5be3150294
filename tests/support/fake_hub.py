"""A small hub of our own that can break transfers and refuse tokens, and `tgi-gateway download` from it."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 4096
FILES: dict[str, bytes] = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "consolidated.safetensors": b"a second copy",
    "training_args.bin": b"pickle",
    "pytorch_model.bin": b"pickle",
    "original/params.json": b"{}",
    "README.md": b"words",
}
WANTED = {
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
}


@dataclass
class Hub:
    """The few endpoints that a download uses."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    token: str | None = None
    """Set: files are gated and want this token."""
    break_at: list[int] = field(default_factory=list)
    """Each transfer of the weights takes one and stops after so many bytes."""
    stall_at: int | None = None
    """Transfers of the weights send nothing more after so many bytes."""
    meanwhile: Callable[[], None] | None = None
    """Called once, in the middle of the next transfer of the weights, with `pause_at` bytes sent."""
    pause_at: int = 0
    busy: int = 0
    """So many requests are answered with 503 first."""
    ranges: list[str] = field(default_factory=list)
    """Range headers of transfers of the weights."""
    fetched: list[str] = field(default_factory=list)


def blob_of(name: str, content: bytes) -> str:
    return hashlib.sha1(content + name.encode()).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.hub.busy:
            self.hub.busy -= 1
            self.answer(503, b"")
        elif re.match(rf"/api/models/org/model/tree/(main|{COMMIT})", self.path):
            self.tree()
        elif match := re.match(r"/api/models/(org/[\w-]+)(?:/revision/([\w.%-]+))?(?:\?|$)", self.path):
            self.model(*match.groups())
        elif match := re.match(rf"/org/model/resolve/{COMMIT}/([^?]+)", self.path):
            self.file(match.group(1))
        else:
            self.refuse(404, "EntryNotFound")

    def model(self, name: str, revision: str | None) -> None:
        if name == "org/private":
            self.refuse(401, "RepoNotFound")
        elif name != "org/model":
            self.refuse(404, "RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        else:
            siblings = [
                {"rfilename": file, "size": len(content), "blobId": blob_of(file, content)}
                for file, content in self.hub.files.items()
            ]
            self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

    def tree(self) -> None:
        """What version 1 of the hub's library asks for, beside `model`."""
        files = [
            {"type": "file", "path": file, "size": len(content), "oid": blob_of(file, content)}
            for file, content in self.hub.files.items()
        ]
        self.answer(200, json.dumps(files).encode())

    def file(self, name: str) -> None:
        if self.hub.token is not None and self.headers["authorization"] != f"Bearer {self.hub.token}":
            self.refuse(401 if self.headers["authorization"] is None else 403, "GatedRepo")
            return
        content = self.hub.files[name]
        head = {"X-Repo-Commit": COMMIT, "ETag": f'"{blob_of(name, content)}"'}
        if self.command == "HEAD":
            self.answer(200, content, head)
            return
        self.hub.fetched.append(name)
        start, status = 0, 200
        if wanted := self.headers["range"]:
            start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            head["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if name == "model.safetensors":
            self.hub.ranges.append(wanted or "")
            if self.hub.stall_at is not None:
                self.stall(status, content[start:], head, self.hub.stall_at)
                return
            if (work := self.hub.meanwhile) is not None:
                self.hub.meanwhile = None
                self.pause(status, content[start:], head, work)
                return
            if self.hub.break_at:
                self.answer(status, content[start:], head, send=self.hub.break_at.pop(0))
                return
        self.answer(status, content[start:], head)

    def stall(self, status: int, body: bytes, head: dict[str, str], send: int) -> None:
        """Send the beginning, then hold the connection until the other side hangs up."""
        self.start(status, body, head)
        self.wfile.write(body[:send])
        self.wfile.flush()
        self.connection.recv(1)
        self.close_connection = True

    def start(self, status: int, body: bytes, head: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in head.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"", {"X-Error-Code": code})

    def answer(self, status: int, body: bytes, head: dict[str, str] | None = None, send: int | None = None) -> None:
        self.start(status, body, head or {})
        if self.command != "HEAD":
            self.wfile.write(body if send is None else body[:send])
            self.wfile.flush()
        if send is not None:
            self.close_connection = True

    def pause(self, status: int, body: bytes, head: dict[str, str], work: Callable[[], None]) -> None:
        """Send the body in two parts and do `work` in between."""
        self.start(status, body, head)
        self.wfile.write(body[: self.hub.pause_at])
        self.wfile.flush()
        work()
        with contextlib.suppress(OSError):  # the other side has given up
            self.wfile.write(body[self.hub.pause_at :])


@contextlib.contextmanager
def fake_hub() -> Iterator[Hub]:
    state = Hub()
    handler = type("HubHandler", (Handler,), {"hub": state})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def start_download(fake: Hub | str, cache: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """``tgi-gateway download``: the hub's address is read when its library is imported, so it wants a new process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": fake if isinstance(fake, str) else fake.url, "HF_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-m", "tgi_gateway", "download", *(arguments or ("org/model",))],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def download(
    fake: Hub | str, cache: Path, *arguments: str, file_limit: int | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`file_limit`: bytes that a file may have at most."""
    with start_download(fake, cache, *arguments, **variables) as process:
        if file_limit is not None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_limit, file_limit))
        out, told = process.communicate(timeout=100)
        return subprocess.CompletedProcess(process.args, process.returncode, out, told)


def folder_of(result: subprocess.CompletedProcess[str]) -> Path:
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())
