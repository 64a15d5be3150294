"""A server with more to do than it can, and clients that do not behave: nobody else pays."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from chaos import metrics
from launched import WAIT_S, Gateway, serving, stream

SLOW_S = 1.0


def until(gateway: Gateway, name: str, value: float) -> None:
    deadline = time.monotonic() + WAIT_S
    while (got := metrics(gateway).get(name)) != value:
        assert time.monotonic() < deadline, f"{name} is {got}, not {value}:\n{gateway.log}"
        time.sleep(0.1)


def test_a_client_that_does_not_read_is_cut_off_and_costs_nobody_anything(byte_model: Path) -> None:
    arguments = ("--max-total-tokens", "400000", "--slow-client-timeout", str(SLOW_S))
    with serving(byte_model, *arguments) as gateway, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", gateway.port))
        body = json.dumps({"inputs": "abc", "parameters": {"max_new_tokens": 390_000}}).encode()
        head = f"POST /generate_stream HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        deaf.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        for _ in range(5):
            assert len(stream(gateway, 20)) == 20
        until(gateway, 'tgi_request_failure{err="dropped"}', 1)
        until(gateway, "tgi_batch_current_size", 0)
        assert metrics(gateway)["tgi_request_success"] == 5
        deaf.settimeout(WAIT_S)
        received = 0
        try:
            while got := deaf.recv(1 << 20):
                received += len(got)
        except ConnectionResetError:
            pass
        assert received < 40_000_000, "the answer was not sent to its end"


def test_a_full_server_says_so_in_each_apis_way_and_finishes_what_it_took(byte_model: Path) -> None:
    arguments = ("--echo-step-ms", "20", "--max-batch-size", "2", "--max-concurrent-requests", "8")
    with serving(byte_model, *arguments) as gateway, ThreadPoolExecutor(80) as pool:
        body = {"inputs": "abc", "parameters": {"max_new_tokens": 30}}
        chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 30}

        def native(_: int) -> httpx.Response:
            return httpx.post(f"{gateway.url}/generate", json=body, timeout=WAIT_S)

        def openai(_: int) -> httpx.Response:
            return httpx.post(f"{gateway.url}/v1/chat/completions", json=chat, timeout=WAIT_S)

        answers = [pool.submit(native if n % 2 else openai, n) for n in range(80)]
        statuses = []
        for n, waiting in enumerate(answers):
            answer = waiting.result(WAIT_S)
            statuses.append(answer.status_code)
            if answer.status_code == 200:
                continue
            assert answer.status_code == (429 if n % 2 else 503)
            assert answer.json()["error_type"] == "overloaded"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert httpx.get(f"{gateway.url}/health").status_code == 200
        assert 8 <= statuses.count(200) < 80
        assert httpx.get(f"{gateway.url}/health/ready").status_code == 200
        until(gateway, "tgi_batch_current_size", 0)
        told = metrics(gateway)
        assert told["tgi_request_success"] == statuses.count(200)
        assert told['tgi_request_failure{err="overloaded"}'] == 80 - statuses.count(200)
