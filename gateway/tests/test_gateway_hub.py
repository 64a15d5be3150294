"""Model folders and downloads, against a small hub of our own that can break transfers and refuse tokens."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tgi_gateway import hub
from tgi_gateway.backend import WeightFormat
from tgi_gateway.cli import main
from tgi_gateway.errors import ModelError
from tgi_gateway.settings import Settings

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
            if self.hub.break_at:
                self.answer(status, content[start:], head, send=self.hub.break_at.pop(0))
                return
        self.answer(status, content[start:], head)

    def stall(self, status: int, body: bytes, head: dict[str, str], send: int) -> None:
        """Send the beginning, then hold the connection until the other side hangs up."""
        self.send_response(status)
        for key, value in head.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:send])
        self.wfile.flush()
        self.connection.recv(1)
        self.close_connection = True

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"", {"X-Error-Code": code})

    def answer(self, status: int, body: bytes, head: dict[str, str] | None = None, send: int | None = None) -> None:
        self.send_response(status)
        for key, value in (head or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if send is None else body[:send])
            self.wfile.flush()
        if send is not None:
            self.close_connection = True


@pytest.fixture
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


def download(fake: Hub | str, cache: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    with start_download(fake, cache, *arguments, **variables) as process:
        out, told = process.communicate(timeout=100)
        return subprocess.CompletedProcess(process.args, process.returncode, out, told)


def folder_of(result: subprocess.CompletedProcess[str]) -> Path:
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def test_a_download_has_what_a_model_needs_and_no_pickles(fake_hub: Hub, tmp_path: Path) -> None:
    folder = folder_of(download(fake_hub, tmp_path, HF_HUB_ENABLE_HF_TRANSFER="1"))  # as TGI's images set it
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == WANTED
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folder.is_relative_to(tmp_path)


def test_a_second_download_fetches_nothing_and_works_without_the_hub(fake_hub: Hub, tmp_path: Path) -> None:
    folder = folder_of(download(fake_hub, tmp_path))
    fake_hub.fetched.clear()
    assert folder_of(download(fake_hub, tmp_path)) == folder
    assert fake_hub.fetched == []
    assert folder_of(download("http://127.0.0.1:1", tmp_path)) == folder
    assert folder_of(download("http://127.0.0.1:1", tmp_path, HF_HUB_OFFLINE="1")) == folder


def test_a_broken_transfer_goes_on_where_it_stopped(fake_hub: Hub, tmp_path: Path) -> None:
    big = WEIGHTS * 24  # the hub's library writes in pieces of 10 MB
    fake_hub.files["model.safetensors"] = big
    fake_hub.break_at = [15_000_000, 1_000]
    folder = folder_of(download(fake_hub, tmp_path))
    assert (folder / "model.safetensors").read_bytes() == big
    assert fake_hub.ranges == ["", "bytes=10485760-", "bytes=10485760-"]


def test_a_download_that_was_killed_goes_on_in_the_next_run(fake_hub: Hub, tmp_path: Path) -> None:
    big = WEIGHTS * 24
    fake_hub.files["model.safetensors"] = big
    fake_hub.stall_at = 15_000_000
    with start_download(fake_hub, tmp_path) as process:
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in tmp_path.rglob("*.incomplete")) < 10_485_760:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in told
    fake_hub.stall_at = None
    folder = folder_of(download(fake_hub, tmp_path))
    assert (folder / "model.safetensors").read_bytes() == big
    if not version("huggingface-hub").startswith("1."):  # which fetches the one file again from its beginning
        assert fake_hub.ranges[-1].startswith("bytes=10485760")


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(fake_hub: Hub, tmp_path: Path) -> None:
    fake_hub.busy = 1
    folder_of(download(fake_hub, tmp_path))


def test_a_gated_model_needs_the_token_of_who_accepted(fake_hub: Hub, tmp_path: Path) -> None:
    fake_hub.token = "hf_good"
    for token in ({}, {"HF_TOKEN": "hf_bad"}):
        result = download(fake_hub, tmp_path, **token)
        assert result.returncode == 1
        assert f"Accept its terms at {fake_hub.url}/org/model and set HF_TOKEN" in result.stderr
        assert "hf_bad" not in result.stderr
        assert "Traceback" not in result.stderr
    folder_of(download(fake_hub, tmp_path, HF_TOKEN="hf_good"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["org/nothing"], "there is no model `org/nothing`"),
        (["org/private"], "set HF_TOKEN if it is private"),
        (["org/model", "--revision", "v9"], "the model `org/model` has no revision `v9`"),
        (["/no/such/folder"], "neither a folder that exists nor a hub id"),
    ],
)
def test_what_cannot_be_found_is_told_with_the_next_step(
    fake_hub: Hub, tmp_path: Path, arguments: list[str], text: str
) -> None:
    result = download(fake_hub, tmp_path, *arguments)
    assert result.returncode == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_an_incomplete_model_is_refused_before_anything_is_fetched(fake_hub: Hub, tmp_path: Path) -> None:
    for name in ("model.safetensors", "consolidated.safetensors", "config.json"):
        del fake_hub.files[name]
    result = download(fake_hub, tmp_path)
    assert result.returncode == 1
    assert "has no config.json, no *.safetensors weights" in result.stderr
    assert fake_hub.fetched == []


def test_offline_without_a_cache_is_told(fake_hub: Hub, tmp_path: Path) -> None:
    result = download(fake_hub, tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    assert "HF_HUB_OFFLINE forbids asking the hub" in result.stderr


def test_a_cache_that_cannot_be_written_is_told(fake_hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    result = download(fake_hub, tmp_path, "org/model", "--huggingface-hub-cache", cache)
    assert result.returncode == 1
    assert f"cannot write the download to {cache}: Not a directory" in result.stderr


# Local folders.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def resolve(*argv: str, weights: tuple[WeightFormat, ...] = hub.SAFETENSORS) -> Path:
    return hub.resolve(Settings.parse(argv, {}, flags_of=lambda _: ()), weights=weights)


def test_a_complete_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve("--model-id", str(folder)) == folder
    assert resolve("--model-id", "org/model", "--weights-cache-override", str(folder)) == folder


def test_a_file_is_a_model_for_engines_that_read_such_files(folder: Path) -> None:
    file = folder / "model.gguf"
    file.write_bytes(b"")
    assert resolve("--model-id", str(file), weights=("safetensors", "gguf")) == file.resolve()
    for path, weights in ((file, hub.SAFETENSORS), (folder / "model.safetensors", ("safetensors", "gguf"))):
        with pytest.raises(ModelError, match=r"is a file\. This backend serves model folders"):
            resolve("--model-id", str(path), weights=weights)


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("model.safetensors", "has no *.safetensors weights"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(folder: Path, missing: str, text: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=re.escape(f"{folder} {text}")):
        resolve("--model-id", str(folder))


def test_a_folder_that_lacks_a_shard_names_it(folder: Path) -> None:
    weight_map = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"first model-2\.safetensors"):
        resolve("--model-id", str(folder))


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Convert them once"):
        resolve("--model-id", str(folder))


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, "latin-1")
    with pytest.raises(ModelError, match=r"config\.json .*Download the model again"):
        resolve("--model-id", str(folder))


def test_only_a_tokenizer_is_needed_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert resolve("--model-id", str(folder), weights=()) == folder
    (folder / "config.json").unlink()
    assert resolve("--model-id", str(folder), weights=()) == folder


def test_random_weights_need_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert resolve("--model-id", str(folder), "--load-format", "dummy") == folder
    (folder / "tokenizer.json").unlink()
    assert resolve("--model-id", str(folder), "--load-format", "dummy") == folder
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer.json"):
        resolve("--model-id", str(folder), "--load-format", "dummy")


GGUF = {
    "model-Q4_K_M.gguf": b"four bits",
    "model-Q8_0.gguf": b"eight bits",
    "f16/model-f16-00001-of-00002.gguf": b"first",
    "f16/model-f16-00002-of-00002.gguf": b"second",
    "mmproj-model.gguf": b"eyes",
}


@pytest.mark.parametrize(
    ("choice", "fetched"),
    [
        ("Q8_0", ["model-Q8_0.gguf"]),
        ("q4_k_m", ["model-Q4_K_M.gguf"]),
        ("model-Q8_0.gguf", ["model-Q8_0.gguf"]),
        ("f16", ["f16/model-f16-00001-of-00002.gguf", "f16/model-f16-00002-of-00002.gguf"]),
    ],
)
def test_a_gguf_file_is_chosen_by_type_or_name(fake_hub: Hub, tmp_path: Path, choice: str, fetched: list[str]) -> None:
    fake_hub.files |= GGUF
    path = folder_of(download(fake_hub, tmp_path, f"org/model:{choice}"))
    assert path.read_bytes() == GGUF[fetched[0]]
    assert sorted(fake_hub.fetched) == fetched
    offline = download("http://127.0.0.1:1", tmp_path, f"org/model:{choice}", HF_HUB_OFFLINE="1")
    assert folder_of(offline) == path


def test_a_choice_that_fits_nothing_lists_what_there_is(fake_hub: Hub, tmp_path: Path) -> None:
    fake_hub.files |= GGUF
    result = download(fake_hub, tmp_path, "org/model:Q2_K")
    assert result.returncode == 1
    assert "has no GGUF file for `Q2_K`" in result.stderr
    assert "model-Q8_0" in result.stderr
    assert fake_hub.fetched == []


def test_gguf_files_are_taken_from_folders_too(tmp_path: Path) -> None:
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        (tmp_path / name).touch()
    both: tuple[WeightFormat, ...] = ("gguf", "safetensors")
    assert resolve("--model-id", f"{tmp_path}:q8_0", weights=both) == tmp_path / "a-Q8_0.gguf"
    assert resolve("--model-id", str(tmp_path / "a-Q8_0.gguf"), weights=both) == tmp_path / "a-Q8_0.gguf"
    assert resolve("--model-id", str(tmp_path), weights=both) == tmp_path
    with pytest.raises(ModelError, match="served by --backend llamacpp"):
        resolve("--model-id", str(tmp_path / "a-Q8_0.gguf"))


def test_convert_says_who_could_write_a_format(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["convert", "--to", "papyrus", "model", str(tmp_path / "out")]) == 1
    assert "no installed backend writes `papyrus`" in capsys.readouterr().err
