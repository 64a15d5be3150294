"""examples/ray on real Ray: two replicas on the CPU engine and the demo model, seen from outside over HTTP.

Slow, and Ray is large, so it runs only by `make test-ray`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import free_port

pytestmark = [
    pytest.mark.skipif("RAY" not in os.environ, reason="takes minutes and installs Ray: make test-ray"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: make test-ray"),
    pytest.mark.timeout(1200),
]

START_S = 600.0
WAIT_S = 120.0
LONG = 1500
"""Tokens of an answer that is still being written when something happens to it."""
MARK = "tgi-ray-under-test"
"""In the command lines of the servers that are ours."""
FLAGS = f"--backend cpu --otlp-service-name {MARK} --shutdown-timeout 20 --payload-limit 100000"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the application answers."""
    port = free_port()
    folder = tmp_path_factory.mktemp("ray")
    script = folder / "run.py"
    script.write_text(
        f"""import signal, sys, ray
from ray import serve
from tgi_ray.app import Options, build
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200 << 20, _temp_dir="/tmp/r{port}")
serve.start(http_options={{"host": "127.0.0.1", "port": {port}}})
serve.run(build(Options(replicas=2, cpus=1, arguments={FLAGS!r})), route_prefix="/")
print("UP", flush=True)
try:
    signal.pause()
finally:
    serve.shutdown()
    ray.shutdown()
"""
    )
    log = folder / "log"
    environ = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1] / "examples" / "ray"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # it would write a token into the user's home
        # For machines that are slow or busy.
        "RAY_worker_niceness": "0",  # beyond that of this process
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
        "RAY_health_check_failure_threshold": "50",
    }
    with log.open("wb") as out:
        driver = subprocess.Popen([sys.executable, str(script)], stdout=out, stderr=subprocess.STDOUT, env=environ)
    try:
        until(lambda: "\nUP" in log.read_text() or driver.poll() is not None, START_S)
        assert driver.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
        driver.send_signal(signal.SIGTERM)
        driver.wait(WAIT_S)
        until(lambda: not servers())
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait()
        for pid in servers():
            os.kill(pid, signal.SIGKILL)
        print(log.read_text()[-8000:])


def until(condition: Callable[[], bool], within_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def servers() -> list[int]:
    """The launchers of our servers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if MARK.encode() in words and b"tgi_gateway" in words:
            found.append(int(path.parent.name))
    return found


def metric(url: str, name: str) -> dict[str, float]:
    """By replica."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=WAIT_S).text)
    samples = [sample for family in families for sample in family.samples]
    found: dict[str, float] = {}
    for sample in samples:
        if sample.name.removesuffix("_total") == name:
            replica = sample.labels["replica"]
            found[replica] = found.get(replica, 0.0) + sample.value
    return found


def generate(url: str, text: str, tokens: int = 4, **more: Any) -> httpx.Response:
    body = {"inputs": text, "parameters": {"max_new_tokens": tokens, **more}}
    return httpx.post(f"{url}/generate", json=body, timeout=WAIT_S)


def endless(tokens: int, text: str = "The quick brown fox") -> dict[str, Any]:
    return {"inputs": text, "parameters": {"max_new_tokens": tokens, "ignore_eos": True}}


def test_requests_that_begin_alike_go_to_one_replica(url: str) -> None:
    topics = [f"Topic {number}. " + f"The story number {number} tells of a fox. " * 8 for number in range(4)]
    before = metric(url, "tgi_prefix_cache_hit_tokens")
    asked = metric(url, "tgi_request_count")
    assert len(before) == 2
    for turn in range(5):
        for topic in topics:
            answer = generate(url, f"{topic} Question {turn}:")
            assert answer.status_code == 200, answer.text
    time.sleep(1)  # counters reach /metrics twice a second
    hits = {name: value - before[name] for name, value in metric(url, "tgi_prefix_cache_hit_tokens").items()}
    counts = {name: value - asked[name] for name, value in metric(url, "tgi_request_count").items()}
    prompt = len(httpx.post(f"{url}/tokenize", json={"inputs": topics[0]}, timeout=WAIT_S).json())
    print("hits by replica", hits, "requests", counts, "tokens of a topic", prompt)
    # Four of five requests find their topic where they are sent; spread at random it would be fewer.
    assert sum(hits.values()) >= 4 * 4 * (prompt - 32)
    assert all(count % 5 == 0 for count in counts.values()), "a topic went to two replicas"


def test_a_stream_comes_token_by_token_and_headers_pass_unchanged(url: str) -> None:
    times = []
    headers = {"x-request-id": "my-own-id"}
    with httpx.stream("POST", f"{url}/generate_stream", json=endless(200), headers=headers, timeout=WAIT_S) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers.get_list("x-request-id") == ["my-own-id"]
        assert "x-compute-type" in answer.headers
        events = []
        for line in answer.iter_lines():
            if line.startswith("data:"):
                times.append(time.monotonic())
                events.append(json.loads(line[5:]))
    assert len(events) == 200
    assert events[-1]["generated_text"]
    arrivals = len({round(at, 3) for at in times})
    print("200 tokens in", round(times[-1] - times[0], 2), "s, at", arrivals, "moments")
    assert arrivals > 50


def test_openais_client_works(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        messages: Any = [{"role": "user", "content": "Hello"}]
        whole = client.chat.completions.create(model="tgi", messages=messages, max_tokens=5, temperature=0)
        chunks = list(
            client.chat.completions.create(model="tgi", messages=messages, max_tokens=5, temperature=0, stream=True)
        )
    assert whole.usage is not None
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_refusals_are_the_servers_own(url: str) -> None:
    empty = generate(url, "")
    assert (empty.status_code, empty.json()["error_type"]) == (422, "validation")
    assert generate(url, "x" * 200_000).status_code == 413
    assert httpx.get(f"{url}/nowhere", timeout=WAIT_S).status_code == 404
    assert httpx.get(f"{url}/generate", timeout=WAIT_S).status_code == 405
    late = httpx.post(f"{url}/generate", json=endless(LONG), headers={"x-request-timeout": "0.05"}, timeout=WAIT_S)
    assert (late.status_code, late.json()["error_type"]) == (504, "timeout")
    for path in ("/health", "/health/ready", "/info", "/v1/models", "/v2/health/ready"):
        assert httpx.get(f"{url}{path}", timeout=WAIT_S).status_code == 200, path
    assert httpx.head(f"{url}/health", timeout=WAIT_S).status_code == 200


def test_a_client_that_leaves_cancels_its_request(url: str) -> None:
    before = sum(metric(url, "tgi_request_failure").values())
    body = json.dumps(endless(LONG)).encode()
    host, port = url.removeprefix("http://").split(":")
    for path in (b"/generate_stream", b"/generate"):
        with socket.create_connection((host, int(port))) as client:
            head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            client.sendall(head % (path, len(body)) + body)
            until(lambda: sum(metric(url, "tgi_batch_current_size").values()) == 1)
        left = time.monotonic()
        until(lambda: sum(metric(url, "tgi_batch_current_size").values()) == 0)
        print(path, "cancelled within", round(time.monotonic() - left, 2), "s")
    until(lambda: sum(metric(url, "tgi_request_failure").values()) == before + 2)


def test_a_request_is_cancelled_by_its_id_wherever_it_is(url: str) -> None:
    assert httpx.delete(f"{url}/v1/requests/unknown", timeout=WAIT_S).status_code == 404
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            httpx.post,
            f"{url}/generate",
            json=endless(LONG),
            headers={"x-request-id": "to-be-cancelled"},
            timeout=WAIT_S,
        )
        until(lambda: sum(metric(url, "tgi_batch_current_size").values()) == 1)
        assert httpx.delete(f"{url}/v1/requests/to-be-cancelled", timeout=WAIT_S).status_code == 200
        assert answer.result(WAIT_S).json()["error_type"] == "cancelled"


async def test_a_killed_server_loses_only_what_it_had_open_and_comes_back(url: str) -> None:
    """Streams on both replicas; one server is killed with all its processes, while new requests go on coming."""
    killed = servers()[0]
    assert len(servers()) == 2
    async with httpx.AsyncClient(timeout=WAIT_S, limits=httpx.Limits(max_connections=None)) as client:

        async def stream(number: int) -> list[Any]:
            body = endless(LONG, f"{number} " + "x" * number * 9)
            async with client.stream("POST", f"{url}/generate_stream", json=body) as answer:
                return [json.loads(line[5:]) async for line in answer.aiter_lines() if line.startswith("data:")]

        streams = [asyncio.create_task(stream(number)) for number in range(8)]
        shares: dict[str, float] = {}

        def all_run() -> bool:
            shares.update(metric(url, "tgi_batch_current_size"))
            return sum(shares.values()) == 8

        await asyncio.to_thread(until, all_run)
        os.kill(killed, signal.SIGKILL)
        at = time.monotonic()
        later = [
            await client.post(
                f"{url}/generate", json={"inputs": f"later {number}", "parameters": {"max_new_tokens": 2}}
            )
            for number in range(10)
        ]
        assert [answer.status_code for answer in later] == [200] * 10
        ends = await asyncio.gather(*streams)
    whole = [events for events in ends if "generated_text" in events[-1] and len(events) == LONG]
    broken = [events[-1] for events in ends if events[-1].get("error_type") == "incomplete_generation_stream"]
    print("open", shares, "whole", len(whole), "told that they broke", len(broken))
    assert len(whole) + len(broken) == 8
    assert len(broken) in {int(share) for share in shares.values()}
    assert broken
    until(lambda: len(servers()) == 2 and len(metric(url, "tgi_engine_up")) == 2)
    print("both replicas again after", round(time.monotonic() - at, 1), "s")
    assert killed not in servers()
    before = metric(url, "tgi_request_count")
    for number in range(12):
        assert generate(url, f"{number} again").status_code == 200
    await asyncio.sleep(1)
    assert all(count > before[name] for name, count in metric(url, "tgi_request_count").items()), "one gets nothing"
