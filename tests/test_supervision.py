"""What the launcher does when it is told to stop, and when one of its processes ends or hangs."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from launched import TOLD_WITHIN_S, WAIT_S, Gateway, launched, serving, stream

from tgi_gateway.testing.worker import FIRST_BYTE

BODY = {"inputs": "abc", "parameters": {"max_new_tokens": 3}}


def begun(gateway: Gateway, pool: ThreadPoolExecutor, count: int, tokens: int) -> list[Future[list[dict[str, object]]]]:
    """So many streams, each with its first token."""
    first = threading.Barrier(count + 1)
    streams = [pool.submit(stream, gateway, tokens, first) for _ in range(count)]
    first.wait(WAIT_S)
    return streams


def until_answers(gateway: Gateway, path: str, status: int, within_s: float = WAIT_S) -> None:
    """Until GET `path` is answered with `status`; 0: not at all."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            got = httpx.get(f"{gateway.url}{path}", timeout=5).status_code
        except httpx.TransportError:
            got = 0
        if got == status:
            return
        assert time.monotonic() < deadline, f"{path} answers {got}, not {status}:\n{gateway.log}"
        time.sleep(0.02)


def test_sigterm_lets_64_streams_finish_and_refuses_new_requests(byte_model: Path) -> None:
    count, tokens = 64, 50
    with (
        serving(byte_model, "--echo-step-ms", "30", "--http-workers", "2") as gateway,
        ThreadPoolExecutor(count) as pool,
    ):
        streams = begun(gateway, pool, count, tokens)
        endless = {"inputs": "abc", "parameters": {"max_new_tokens": 4000}}
        # While this one is open the drain goes on, however slow the machine is.
        with httpx.stream("POST", f"{gateway.url}/generate_stream", json=endless, timeout=WAIT_S) as held:
            lines = held.iter_lines()  # whose end would be the stream's
            next(lines)
            gateway.process.send_signal(signal.SIGTERM)
            gateway.wait_for("no new requests")
            until_answers(gateway, "/health/ready", 503)
            refused = httpx.post(f"{gateway.url}/generate", json=BODY, timeout=WAIT_S)
            assert (refused.status_code, refused.json()["error_type"]) == (503, "healthcheck")
            assert "The server is stopping" in refused.json()["error"]
            assert int(refused.headers["retry-after"]) > 0
            assert httpx.get(f"{gateway.url}/health", timeout=WAIT_S).status_code == 200
            for answer in streams:
                events = answer.result(WAIT_S)
                assert len(events) == tokens
                assert len(str(events[-1]["generated_text"])) == tokens
        assert gateway.end() == 0
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", gateway.port)) != 0
        assert gateway.left_behind() == []


def test_the_end_of_the_drain_is_told_to_those_that_it_cuts_short(byte_model: Path) -> None:
    with (
        serving(byte_model, "--echo-step-ms", "100", "--shutdown-timeout", "1") as gateway,
        ThreadPoolExecutor(2) as pool,
    ):
        (streamed,) = begun(gateway, pool, 1, 4000)
        body = {"inputs": "abc", "parameters": {"max_new_tokens": 4000}}
        whole = pool.submit(httpx.post, f"{gateway.url}/generate", json=body, timeout=WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while "tgi_request_count 2.0" not in httpx.get(f"{gateway.url}/metrics").text:
            assert time.monotonic() < deadline
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.end() == 0
        last = streamed.result(WAIT_S)[-1]
        assert "The server stopped before the answer was complete" in str(last["error"])
        answer = whole.result(WAIT_S)
        assert answer.status_code == 503
        assert "The server stopped" in answer.json()["error"]
        assert "had to be killed" not in gateway.log
        assert gateway.left_behind() == []


def test_a_second_signal_stops_at_once(byte_model: Path) -> None:
    with serving(byte_model, "--echo-step-ms", "100") as gateway, ThreadPoolExecutor(1) as pool:
        (answer,) = begun(gateway, pool, 1, 4000)
        gateway.process.send_signal(signal.SIGTERM)
        gateway.wait_for("no new requests")
        gateway.process.send_signal(signal.SIGINT)
        assert gateway.end() == 128 + signal.SIGINT
        assert isinstance(answer.exception(WAIT_S), httpx.TransportError)
        assert gateway.left_behind() == []


def test_a_killed_engine_is_told_at_once_and_started_again(byte_model: Path) -> None:
    with (
        serving(byte_model, "--echo-step-ms", "50", "--http-workers", "2") as gateway,
        ThreadPoolExecutor(6) as pool,
    ):
        streams = begun(gateway, pool, 6, 4000)
        killed = gateway.children()["engine_process"]
        os.kill(killed, signal.SIGKILL)
        at = time.monotonic()
        for answer in streams:
            last = answer.result(WAIT_S)[-1]
            assert last["error_type"] == "incomplete_generation_stream"
            assert "the engine went away" in str(last["error"])
        assert time.monotonic() - at < TOLD_WITHIN_S
        refused = httpx.post(f"{gateway.url}/generate", json=BODY)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{gateway.url}/health").status_code == 200
        assert httpx.get(f"{gateway.url}/health/ready").status_code == 503
        gateway.wait_for("engine is back")
        until_answers(gateway, "/health/generate", 200)
        assert gateway.children()["engine_process"] != killed
        assert httpx.post(f"{gateway.url}/generate", json=BODY).json() == {"generated_text": "abc"}
        assert gateway.process.poll() is None
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.end() == 0
        assert gateway.left_behind() == []


def test_without_restart_a_killed_engine_ends_the_server_with_an_error(byte_model: Path) -> None:
    with (
        serving(byte_model, "--echo-step-ms", "50", "-g", "5", "--restart-engine", "false") as gateway,
        ThreadPoolExecutor(1) as pool,
    ):
        (answer,) = begun(gateway, pool, 1, 4000)
        os.kill(gateway.children()["engine_process"], signal.SIGKILL)
        assert answer.result(WAIT_S)[-1]["error_type"] == "incomplete_generation_stream"
        assert gateway.end() == 1
        assert "engine was ended by SIGKILL" in gateway.log
        assert gateway.left_behind() == []


def test_an_engine_that_stands_still_counts_as_dead(byte_model: Path) -> None:
    with (
        serving(byte_model, "--echo-step-ms", "50", "--engine-timeout", "4") as gateway,
        ThreadPoolExecutor(1) as pool,
    ):
        (answer,) = begun(gateway, pool, 1, 4000)
        os.kill(gateway.children()["engine_process"], signal.SIGSTOP)
        last = answer.result(WAIT_S)[-1]
        assert last["error_type"] == "incomplete_generation_stream"
        gateway.wait_for("engine made no progress for 4 s and was killed")
        gateway.wait_for("engine is back")
        until_answers(gateway, "/health/generate", 200)


def test_an_engine_that_makes_no_step_counts_as_dead(byte_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    hang, fine = (FIRST_BYTE + ord(char) - ord("!") for char in "hf")
    script.write_text(
        f'{{"scripts": [{{"prompt": [{hang}], "tokens": [{hang}], "then": "hang"}}, {{"tokens": [{fine}]}}]}}'
    )
    arguments = ("--backend", "scripted", "--model-id", str(byte_model), "--script", str(script))
    with launched(*arguments, "--engine-timeout", "3") as gateway:
        gateway.wait_for("Ready at")
        answer = httpx.post(
            f"{gateway.url}/generate", json={"inputs": "h", "parameters": {"max_new_tokens": 9}}, timeout=WAIT_S
        )
        assert answer.status_code == 500, answer.text
        gateway.wait_for("engine made no progress for 3 s")
        gateway.wait_for("engine is back")
        until_answers(gateway, "/health/ready", 200)
        assert httpx.post(f"{gateway.url}/generate", json=BODY).json()["generated_text"] == "fff"


def test_a_killed_http_worker_is_replaced_and_the_others_go_on(byte_model: Path) -> None:
    with (
        serving(byte_model, "--echo-step-ms", "20", "--http-workers", "2") as gateway,
        ThreadPoolExecutor(16) as pool,
    ):
        streams = begun(gateway, pool, 16, 150)
        victim = gateway.children()["http_process"]
        os.kill(victim, signal.SIGKILL)
        ends = [answer.exception(WAIT_S) for answer in streams]
        assert all(error is None or isinstance(error, httpx.TransportError) for error in ends)
        assert [len(answer.result()) for answer in streams if answer.exception() is None] == [150] * ends.count(None)
        assert "engine was ended" not in gateway.log
        gateway.wait_for("is back after")
        for _ in range(20):
            assert httpx.post(f"{gateway.url}/generate", json=BODY).json() == {"generated_text": "abc"}
        until_answers(gateway, "/health/generate", 200)
        gateway.children()
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.end() == 0
        assert gateway.left_behind() == []


@pytest.mark.parametrize("ready", [True, False])
def test_a_folder_of_a_server_that_was_killed_whole_is_swept_by_the_next(byte_model: Path, ready: bool) -> None:
    with serving(byte_model) as killed:
        (stale,) = (killed.folder / "tmp").iterdir()
        for pid in (killed.process.pid, *killed.seen):
            os.kill(pid, signal.SIGSTOP)
        if ready:
            for pid in (killed.process.pid, *killed.seen):
                os.kill(pid, signal.SIGKILL)
            killed.process.wait()
        with serving(byte_model, TMPDIR=str(killed.folder / "tmp")):
            assert stale.exists() is not ready, "only a dead server's folder is swept"
