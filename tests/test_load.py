"""Many clients at once: none is lost, and whoever leaves gives everything back."""

from __future__ import annotations

import asyncio
import json
import random
import re

import httpx
from servers import Server

STREAMS = 64
STORM = 150


async def stream_tokens(client: httpx.AsyncClient, prompt: str, max_new_tokens: int, leave_after: int | None) -> int:
    """Tokens received; leaves the stream open-ended after `leave_after` of them."""
    body = {"inputs": prompt, "parameters": {"max_new_tokens": max_new_tokens}}
    seen = 0
    async with client.stream("POST", "/generate_stream", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data:"):
                continue
            event = json.loads(line[5:])
            assert "error" not in event, event
            seen += 1
            assert event["index"] == seen
            if seen == leave_after:
                return seen
            if event["generated_text"] is not None:
                return seen
    raise AssertionError(f"the stream of {prompt!r} ended without its last event, after {seen} tokens")


async def gauge(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    values = re.findall(rf"^{name}(?:\{{[^}}]*\}})? ([0-9.e+-]+)$", text, re.MULTILINE)
    assert values, f"no metric {name} in:\n{text}"
    return sum(map(float, values))


async def wait_for_gauge(client: httpx.AsyncClient, name: str, wanted: float) -> None:
    for _ in range(200):
        if await gauge(client, name) == wanted:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{name} is {await gauge(client, name)} 20 s after the last client left; expected {wanted}")


async def test_64_concurrent_streams_lose_nothing(demo_server: Server) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=demo_server.url, timeout=100, limits=limits) as client:
        alone = await stream_tokens(client, "Count from 1 to 20.", 40, None)
        seen = await asyncio.gather(*(stream_tokens(client, "Count from 1 to 20.", 40, None) for _ in range(STREAMS)))
        assert seen == [alone] * STREAMS
        await wait_for_gauge(client, "tgi_batch_current_size", 0)


async def test_a_storm_of_cancels_returns_every_page(demo_server: Server) -> None:
    dice = random.Random(5)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=demo_server.url, timeout=100, limits=limits) as client:
        await asyncio.gather(
            *(
                stream_tokens(client, f"Tell me a story about hero {number}.", 400, dice.randint(1, 8))
                for number in range(STORM)
            )
        )
        await wait_for_gauge(client, "tgi_batch_current_size", 0)
        await wait_for_gauge(client, "tgi_queue_size", 0)
        await wait_for_gauge(client, "tgi_batch_current_max_tokens", 0)
        assert await stream_tokens(client, "Count from 1 to 5.", 20, None) > 0
