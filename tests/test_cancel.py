"""A request is cancelled by its id whichever HTTP worker is asked to."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
from servers import run_server

from tgi_gateway.testing.worker import write_byte_model

ENDLESS: dict[str, Any] = {"model": "tgi", "messages": [{"role": "user", "content": "a"}], "temperature": 0}


def test_every_worker_cancels_what_came_through_any(tmp_path: Path) -> None:
    write_byte_model(tmp_path)
    arguments = ["--backend", "echo", "--model-id", str(tmp_path), "--http-workers", "2", "--echo-step-ms", "20"]
    with run_server(tmp_path, *arguments, "--api-keys", "k,other", "--max-total-tokens", "100000") as server:
        key = {"authorization": "Bearer k"}
        answers: dict[int, int] = {}

        def ask(number: int) -> None:
            named = key | {"x-request-id": f"r-{number}"}
            url = f"{server.url}/v1/chat/completions"
            answers[number] = httpx.post(url, json=ENDLESS, headers=named, timeout=60).status_code

        asking = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in asking:
            thread.start()
        left = set(range(8))
        for _ in range(200):  # new connections, which come to one worker or the other
            for number in sorted(left):
                url = f"{server.url}/v1/requests/r-{number}"
                assert httpx.delete(url, headers={"authorization": "Bearer other"}).status_code == 404
                if httpx.delete(url, headers=key).status_code == 200:
                    left.remove(number)
            if not left:
                break
        for thread in asking:
            thread.join(timeout=30)
        assert answers == dict.fromkeys(range(8), 499)
