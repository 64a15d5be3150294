"""The real command in real processes: start, serve, stop, and leave nothing behind."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
from launched import PROMPT, WAIT_S, Gateway, launched, serving, stream
from servers import free_port, run_server

from tgi_demo_model import model_path
from tgi_gateway.prompt.tokenizer import Tokenizer


def test_both_apis_answer_streamed_and_not(byte_model: Path) -> None:
    with serving(byte_model, "--http-workers", "2") as gateway:
        native = httpx.post(f"{gateway.url}/generate", json={"inputs": "abc", "parameters": {"max_new_tokens": 6}})
        assert native.json() == {"generated_text": "abcabc"}
        assert stream(gateway, 21)[-1]["generated_text"] == PROMPT
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": "m", "messages": messages, "max_tokens": 4, "temperature": 0}
        chat = httpx.post(f"{gateway.url}/v1/chat/completions", json=body).json()
        assert chat["choices"][0]["message"]["content"] == "<use"
        assert chat["usage"]["completion_tokens"] == 4
        with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body | {"stream": True}) as response:
            lines = [line[6:] for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        assert "".join(json.loads(line)["choices"][0]["delta"]["content"] for line in lines[:-1]) == "<use"
        time.sleep(0.6)  # counters of the other worker reach the shared folder twice a second
        metrics = httpx.get(f"{gateway.url}/metrics").text
        assert "tgi_request_success 4.0" in metrics
        assert "tgi_generated_tokens 35.0" in metrics
        gateway.process.send_signal(signal.SIGINT)
        assert gateway.end() == 0
        assert gateway.left_behind() == []


def test_workers_divide_a_long_text_among_them() -> None:
    text = " ".join(f"word {n} of a long story" for n in range(4000))
    wanted = Tokenizer.from_folder(model_path()).encode(text).ids
    with serving(model_path(), "--http-workers", "3") as gateway:
        deadline_s = time.monotonic() + WAIT_S
        while len(list(gateway.folder.glob("tmp/*/text?"))) < 3:
            assert time.monotonic() < deadline_s, "each worker has its socket"
            time.sleep(0.05)
        with ThreadPoolExecutor(6) as pool:
            post = partial(httpx.post, f"{gateway.url}/tokenize", json={"inputs": text}, timeout=WAIT_S)
            for answer in pool.map(lambda _: post(), range(12)):
                assert [token["id"] for token in answer.json()] == list(wanted)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.end() == 0
        assert gateway.left_behind() == []
        assert "ERROR" not in gateway.log


def test_nothing_outlives_a_killed_launcher(byte_model: Path) -> None:
    with serving(byte_model, "--http-workers", "2") as gateway:
        assert len(gateway.seen) == 2 or len(gateway.seen) == 3
        gateway.process.kill()
        gateway.process.wait()
        assert gateway.left_behind() == []


def test_a_port_in_use_is_told_before_anything_is_loaded(byte_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with launched("--backend", "echo", "--model-id", str(byte_model), port=port) as gateway:
            assert gateway.end() == 1
            assert f"port {port} of 127.0.0.1 is in use" in gateway.log
            assert "Traceback" not in gateway.log
            assert "Engine ready" not in gateway.log
            assert gateway.left_behind() == []


def test_the_port_is_taken_but_closed_while_the_server_starts(hanging_hub: str) -> None:
    with launched("--model-id", "org/model", "--backend", "echo", HF_ENDPOINT=hanging_hub) as gateway:
        gateway.wait_for("Settings")
        wait_for_child(gateway, "model_process")
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", gateway.port)) != 0
        with launched("--backend", "echo", "--model-id", "org/model", port=gateway.port) as second:
            assert second.end() == 1
            assert "is in use" in second.log


def test_a_port_can_be_used_again_at_once(byte_model: Path) -> None:
    port = free_port()
    for _ in range(2):
        with serving(byte_model, port=port) as gateway, httpx.Client() as client:
            assert client.get(f"{gateway.url}/health").status_code == 200
            gateway.process.send_signal(signal.SIGTERM)  # the server hangs up first: its side is TIME_WAIT
            assert gateway.end() == 0


def test_a_socket_folder_that_cannot_be_made_is_an_error(byte_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file" / "sockets")
    with launched("--backend", "echo", "--model-id", str(byte_model), "--shard-uds-path", where) as gateway:
        assert gateway.end() == 1
        assert f"cannot make the folder for sockets in {where}" in gateway.log
        assert "Traceback" not in gateway.log


def test_a_socket_folder_with_too_long_a_name_is_an_error(byte_model: Path, tmp_path: Path) -> None:
    where = tmp_path / ("x" * 100)
    with launched("--backend", "echo", "--model-id", str(byte_model), "--shard-uds-path", str(where)) as gateway:
        assert gateway.end() == 1
        assert "Choose a shorter folder" in gateway.log
        assert list(where.iterdir()) == []


def test_a_folder_without_a_tokenizer_is_an_error_with_the_next_step(tmp_path: Path) -> None:
    with launched("--backend", "echo", "--model-id", str(tmp_path)) as gateway:
        assert gateway.end() == 1
        assert f"{tmp_path} has no tokenizer.json" in gateway.log
        assert "Traceback" not in gateway.log


def test_a_broken_tokenizer_ends_the_start_with_its_message(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with launched("--backend", "echo", "--model-id", str(tmp_path), "--http-workers", "2") as gateway:
        assert gateway.end() == 1
        assert gateway.log.count("ERROR") == 1
        assert f"{tmp_path}/tokenizer.json is not a readable tokenizer" in gateway.log
        assert gateway.left_behind() == []


def test_an_engine_that_cannot_start_says_why_once(byte_model: Path) -> None:
    with launched("--backend", "scripted", "--model-id", str(byte_model)) as gateway:
        assert gateway.end() == 1
        assert gateway.log.count("add --script FILE") == 1
        assert "Traceback" not in gateway.log
        assert gateway.left_behind() == []


def test_a_wrong_flag_exits_with_2() -> None:
    with launched("--max-best-off", "3") as gateway:
        assert gateway.end() == 2
        assert "did you mean `--max-best-of`?" in gateway.log
        assert gateway.log.count("\n") == 1


@pytest.fixture
def hanging_hub() -> Iterator[str]:
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def wait_for_child(gateway: Gateway, name: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while name not in gateway.children():
        assert gateway.process.poll() is None, gateway.log
        assert time.monotonic() < deadline, gateway.log
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_start_ends_it_quietly(hanging_hub: str, number: signal.Signals) -> None:
    with launched("--model-id", "org/model", "--backend", "echo", HF_ENDPOINT=hanging_hub) as gateway:
        wait_for_child(gateway, "model_process")
        gateway.process.send_signal(number)
        assert gateway.end() == 128 + number
        assert "Traceback" not in gateway.log
        assert "ERROR" not in gateway.log
        assert gateway.left_behind() == []


@pytest.mark.parametrize("after_s", [0.05, 0.2, 0.4, 0.8])
def test_ctrl_c_at_any_moment_leaves_no_traceback_of_ours(byte_model: Path, after_s: float) -> None:
    with launched("--backend", "echo", "--model-id", str(byte_model)) as gateway:
        time.sleep(after_s)
        gateway.children()
        gateway.process.send_signal(signal.SIGINT)
        code = gateway.end()
        if "Traceback" in gateway.log:  # the interpreter itself was still starting
            assert "tgi_gateway/cli.py" not in gateway.log
        else:
            assert code in (130, -signal.SIGINT) or (code == 0 and "Ready at" in gateway.log)
        assert gateway.left_behind() == []


def test_every_log_line_is_json_when_asked_and_no_secret_is_in_it(byte_model: Path) -> None:
    with serving(byte_model, "--json-output", API_KEY="s3cret", HF_TOKEN="hf_s3cret") as gateway:
        body = {"inputs": "abc", "parameters": {"max_new_tokens": 3}}
        assert httpx.post(f"{gateway.url}/generate", json=body).status_code == 401
        allowed = {"authorization": "Bearer s3cret"}
        assert httpx.post(f"{gateway.url}/generate", json=body, headers=allowed).status_code == 200
        for pid in gateway.children().values():
            assert b"s3cret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert b"s3cret" not in Path(f"/proc/{pid}/environ").read_bytes()
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.end() == 0
        lines = [json.loads(line) for line in gateway.log.splitlines()]
        assert all({"timestamp", "level", "message", "target"} <= line.keys() for line in lines)
        assert [line["process"] for line in lines if line["message"] == "Success"] == ["http-0"]
        assert "s3cret" not in gateway.log


def test_two_servers_on_one_host_never_meet(byte_model: Path) -> None:
    with serving(byte_model) as one, serving(byte_model, TMPDIR=str(one.folder / "tmp")) as two:
        for gateway in (one, two):
            assert stream(gateway, 5)[-1]["generated_text"] == PROMPT[:5]
        assert len(list((one.folder / "tmp").iterdir())) == 2
        two.process.send_signal(signal.SIGTERM)
        assert two.end() == 0
        assert stream(one, 5)[-1]["generated_text"] == PROMPT[:5]
        assert len(list((one.folder / "tmp").iterdir())) == 1


def test_the_socket_folder_is_private(byte_model: Path) -> None:
    with serving(byte_model) as gateway:
        (folder,) = (gateway.folder / "tmp").iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "engine").stat().st_mode & 0o777 == 0o600


def test_without_a_model_id_the_demo_model_answers_on_the_cpu() -> None:
    with launched("--max-batch-total-tokens", "16384") as gateway:
        gateway.wait_for("Ready at")
        gateway.children()
        assert httpx.get(f"{gateway.url}/info").json()["model_id"] == "tgi-demo-model"
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = {"model": "demo", "messages": messages, "max_tokens": 24, "temperature": 0}
        answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=WAIT_S).json()
        whole = answer["choices"][0]["message"]["content"]
        assert "Paris" in whole
        with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body | {"stream": True}) as response:
            lines = [line[6:] for line in response.iter_lines() if line]
        assert "".join(json.loads(line)["choices"][0]["delta"]["content"] for line in lines[:-1]) == whole
        native = {"inputs": "Once", "parameters": {"max_new_tokens": 8, "details": True}}
        details = httpx.post(f"{gateway.url}/generate", json=native, timeout=WAIT_S).json()["details"]
        assert details["generated_tokens"] == 8 or details["finish_reason"] == "eos_token"
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.end() == 0
        assert gateway.left_behind() == []


PREPARING = """
from tgi_gateway.backend import BackendPlugin, ModelFiles
from tgi_gateway.hooks import hookimpl
from tgi_gateway.testing.echo import ECHO_CAPABILITIES


def create(options):
    from tgi_gateway.testing import EchoBackend
    from tgi_gateway.testing.worker import byte_toy

    assert options.model_path.name == "corpus.txt" and options.tokenizer_path.name == "made"
    return EchoBackend(byte_toy())


def prepare(options, folder):
    from tgi_gateway.testing.worker import write_byte_model

    made = folder / "made"
    made.mkdir()
    write_byte_model(made)
    return ModelFiles(options.model_path / "corpus.txt", made)


@hookimpl
def tgi_backend():
    return BackendPlugin("preparing", "makes its tokenizer", ECHO_CAPABILITIES, create, weights=(), prepare=prepare)
"""


def test_a_model_that_has_only_what_its_plugin_prepares_from_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, model = tmp_path / "tgi_backend_preparing-1.0.dist-info", tmp_path / "model"
    for folder in (info, model):
        folder.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tgi-backend-preparing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tgi_gateway.backends]\npreparing = preparing\n")
    (tmp_path / "preparing.py").write_text(PREPARING)
    (model / "corpus.txt").write_text("abc")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with run_server(tmp_path, "--backend", "preparing", "--model-id", str(model)) as server:
        body = {"inputs": "abc", "parameters": {"max_new_tokens": 6}}
        assert httpx.post(f"{server.url}/generate", json=body, timeout=30).json() == {"generated_text": "abcabc"}
