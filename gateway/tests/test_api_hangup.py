from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from tgi_gateway.api import sse
from tgi_gateway.testing.echo import EchoBackend
from tgi_gateway.testing.scripted import Script, ScriptedBackend, ScriptedToken
from tgi_gateway.testing.worker import FIRST_BYTE, Worker, byte_toy, parse_events, until

HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LONG: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "abc"},
    "/": {"inputs": "abc"},
    "/generate_stream": {"inputs": "abc"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "temperature": 0, "n": 3},
    "/v1/completions": {"prompt": ["a", "b"], "temperature": 0},
}
STREAMS = [
    ("/generate_stream", {}),
    ("/v1/chat/completions", {"stream": True}),
    ("/v1/completions", {"stream": True}),
    ("/", {"stream": True}),
]


@asynccontextmanager
async def served(worker: Worker) -> AsyncGenerator[int, None]:
    """The worker behind a real server; gives its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(worker.app, log_config=None, ws="none", lifespan="on")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def request(port: int, path: str, body: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    await writer.drain()
    return reader, writer


def running(engine: EchoBackend) -> int:
    capacity = engine.capacity()
    return capacity.max_sequences - capacity.free_sequences


async def until_counted(worker: Worker) -> None:
    """Wait for the account of the one request that was dropped, which comes after its end."""
    for _ in range(500):
        if 'tgi_request_failure{err="dropped"} 1.0' in (await worker.client.get("/metrics")).text:
            return
        await asyncio.sleep(0.01)
    pytest.fail("the dropped request was not counted")


@pytest.mark.parametrize(("path", "body"), LONG.items())
async def test_a_client_that_hangs_up_while_it_waits_ends_its_generations(
    start_worker: Callable[..., Any], slow: EchoBackend, path: str, body: dict[str, Any]
) -> None:
    worker: Worker = await start_worker(slow)
    async with served(worker) as port:
        _, writer = await request(port, path, body)
        await until(lambda: running(slow) > 0)
        writer.close()
        await until(lambda: running(slow) == 0)
        await until(lambda: worker.services.permits.taken == 0)
        assert len(worker.services.generations) == 0
        await until_counted(worker)


@pytest.mark.parametrize(("path", "more"), STREAMS)
async def test_a_client_that_hangs_up_while_it_reads_ends_its_generations(
    start_worker: Callable[..., Any], slow: EchoBackend, path: str, more: dict[str, Any]
) -> None:
    worker: Worker = await start_worker(slow)
    async with served(worker) as port:
        reader, writer = await request(port, path, LONG[path] | more)
        await reader.readuntil(b"data: ")
        assert running(slow) > 0
        writer.close()
        await until(lambda: running(slow) == 0)
        await until(lambda: worker.services.permits.taken == 0)
        assert len(worker.services.generations) == 0
        await until_counted(worker)


async def test_a_client_that_does_not_read_holds_nobody_up(start_worker: Callable[..., Any]) -> None:
    engine = EchoBackend(byte_toy(max_total_tokens=100_000))
    worker: Worker = await start_worker(engine)
    async with served(worker) as port:
        _, writer = await request(port, "/generate_stream", {"inputs": "abc"})
        await until(lambda: running(engine) > 0)
        for _ in range(3):
            await worker.answer("/generate", {"inputs": "abc", "parameters": {"max_new_tokens": 50}})
        writer.transport.abort()
        await until(lambda: len(worker.services.generations) == 0)
        assert worker.services.permits.taken == 0


async def test_a_storm_of_hang_ups_leaves_everything_free(start_worker: Callable[..., Any], slow: EchoBackend) -> None:
    worker: Worker = await start_worker(slow)
    paths = [*LONG, "/generate_stream"]
    async with served(worker) as port:
        writers = []
        for place in range(40):
            path = paths[place % len(paths)]
            _, writer = await request(port, path, LONG[path])
            writers.append(writer)
            await asyncio.sleep(0.001 * (place % 5))
        await until(lambda: running(slow) > 0)
        for writer in writers:
            writer.transport.abort()
        await until(lambda: worker.services.permits.taken == 0 and running(slow) == 0)
        assert len(worker.services.generations) == 0
        capacity = slow.capacity()
        assert capacity.free_kv_tokens == capacity.total_kv_tokens


async def test_events_arrive_while_the_answer_is_being_made(start_worker: Callable[..., Any]) -> None:
    letters = [ScriptedToken(FIRST_BYTE + 40, delay_s=0.0), ScriptedToken(FIRST_BYTE + 41, delay_s=30.0)]
    engine = ScriptedBackend([Script(tuple(letters))], byte_toy())
    worker: Worker = await start_worker(engine)
    async with served(worker) as port:
        reader, writer = await request(port, "/generate_stream", {"inputs": "x"})
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"200 OK" in head
        assert b"text/event-stream" in head
        event = await reader.readuntil(b"\n\n")
        assert b'"text":"I"' in event
        writer.close()
        await until(lambda: running(engine) == 0)


async def test_silence_is_broken_by_comments_and_the_stream_goes_on(
    start_worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    letters = [ScriptedToken(FIRST_BYTE + 40, delay_s=0.3), ScriptedToken(FIRST_BYTE + 41, delay_s=0.3)]
    worker: Worker = await start_worker(ScriptedBackend([Script(tuple(letters))], byte_toy()))
    async with served(worker) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        response = await client.post("/generate_stream", json={"inputs": "x"})
    before, between, _ = response.text.split("data: ", 2)
    assert before.startswith(":\n\n")
    assert ":\n\n" in between
    events = parse_events(response.text.replace(":\n\n", ""))
    assert events[-1]["generated_text"] == "IJ"


async def test_a_body_that_never_ends_is_given_up_when_the_client_goes(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker()
    async with served(worker) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        )
        await writer.drain()
        writer.close()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.get("/health")).status_code == 200


async def test_a_large_body_is_refused_while_it_is_sent(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(payload_limit=1000)
    async with served(worker) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            writer.write(b"200\r\n" + b"a" * 0x200 + b"\r\n")
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 413 " in head.splitlines()[0]
        writer.close()
