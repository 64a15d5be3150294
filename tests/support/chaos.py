"""Clients that count how each of their requests ended, and what must be true of a server whatever happened to it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from launched import WAIT_S, Gateway

SCALE = float(os.environ.get("CHAOS", "1"))
"""How much longer than in its short form everything takes; `make chaos` sets it."""
MEMORY_GROWTH = 1.05
FIXED_SPREAD_MIB = 6.0
"""What an allocator keeps or gives back from one look to the next, however little was done in between."""


@dataclass
class Outcomes:
    """How requests ended: finished, failed (told by an error), refused (before they began), left, lost (not told)."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __getitem__(self, kind: str) -> int:
        return self.counts[kind]


async def one_stream(
    gateway: Gateway, outcomes: Outcomes, *, tokens: int, prompt: str = "abc", leave_after_s: float | None = None
) -> None:
    """One native stream over a connection of its own; leaves without a word after `leave_after_s`."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    except OSError:
        outcomes.counts["refused"] += 1
        return
    try:
        body = json.dumps({"inputs": prompt, "parameters": {"max_new_tokens": tokens}}).encode()
        head = f"POST /generate_stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        answer = reader.read()
        try:
            raw = await asyncio.wait_for(_all_of(reader, answer), leave_after_s or WAIT_S)
        except TimeoutError:
            if leave_after_s is None:
                outcomes.problems.append("a stream neither went on nor ended")
            outcomes.counts["left"] += 1
            return
        outcomes.counts[_ending(raw, outcomes)] += 1
    except OSError:
        outcomes.counts["lost"] += 1
    finally:
        if leave_after_s is not None:
            writer.transport.abort()
        writer.close()


async def _all_of(_reader: asyncio.StreamReader, answer: Awaitable[bytes]) -> bytes:
    return await answer


def _ending(raw: bytes, outcomes: Outcomes) -> str:
    status = raw[9:12]
    if not raw:
        return "lost"
    if status in (b"429", b"503"):
        return "refused"
    events = [json.loads(line[5:]) for line in raw.split(b"\n") if line.startswith(b"data:{") or line[:7] == b"data: {"]
    endings = [event for event in events if "error" in event or event.get("generated_text") is not None]
    if len(endings) > 1:
        outcomes.problems.append(f"a stream ended {len(endings)} times")
    if status != b"200":
        return "failed"
    if not endings:
        return "lost"
    if events[-1] is not endings[0]:
        outcomes.problems.append("a stream went on after its end")
    indices = [event["index"] for event in events if "index" in event]
    if indices != list(range(1, len(indices) + 1)):
        outcomes.problems.append("a stream lost or repeated a token")
    return "failed" if "error" in endings[0] else "finished"


async def crowd(
    gateway: Gateway,
    count: int,
    *,
    tokens: int,
    over_s: float = 0.0,
    leaving: bool = False,
    seed: int = 7,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> Outcomes:
    """So many streams that begin at random moments within `over_s`, and `meanwhile` beside them."""
    outcomes, dice = Outcomes(), random.Random(seed)

    async def client() -> None:
        await asyncio.sleep(dice.random() * over_s)
        leave_after_s = 0.01 + dice.random() if leaving else None
        await one_stream(gateway, outcomes, tokens=tokens, leave_after_s=leave_after_s)

    others = [meanwhile()] if meanwhile is not None else []
    await asyncio.gather(*(client() for _ in range(count)), *others)
    return outcomes


async def throng(gateway: Gateway, clients: int, *, tokens: int, for_s: float, seed: int = 7) -> Outcomes:
    """So many clients that ask again and again for so long, each a moment after it had its answer or was refused."""
    outcomes, dice, began = Outcomes(), random.Random(seed), time.monotonic()

    async def client() -> None:
        while time.monotonic() < began + for_s:
            await one_stream(gateway, outcomes, tokens=tokens)
            await asyncio.sleep(dice.random() / 2)

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes


def metrics(gateway: Gateway) -> dict[str, float]:
    """Every sample by name and labels."""
    lines = httpx.get(f"{gateway.url}/metrics", timeout=WAIT_S).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def memory_mib(gateway: Gateway) -> float:
    """Resident memory of the launcher and its children that is not shared with others."""
    total = 0.0
    for pid in (gateway.process.pid, *gateway.pids()):
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        total += (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return total


def settle(gateway: Gateway) -> dict[str, float]:
    """Wait until nothing is left of any request; returns the metrics then."""
    deadline = time.monotonic() + WAIT_S
    nothing = ("tgi_queue_size", "tgi_batch_current_size", "tgi_batch_total_tokens", "tgi_kv_cache_used_tokens")
    while True:
        ready = httpx.get(f"{gateway.url}/health/ready", timeout=WAIT_S).status_code == 200
        if ready and httpx.get(f"{gateway.url}/health/generate", timeout=WAIT_S).status_code == 200:
            told = metrics(gateway)
            if not any(told.get(name, 1.0) for name in nothing):
                time.sleep(0.6)  # what other workers count reaches the shared folder twice a second
                return metrics(gateway)
        assert time.monotonic() < deadline, f"{metrics(gateway)}\n{gateway.log}"
        time.sleep(0.2)


async def check(gateway: Gateway, outcomes: Outcomes, *, workers: int, permits: int, lost: bool = False) -> None:
    """The invariants; `lost`: connections may have broken off, because an HTTP worker was killed."""
    assert outcomes.problems == []
    if not lost:
        assert outcomes["lost"] == 0, f"{outcomes.counts}\n{gateway.log}"
    told = await asyncio.to_thread(settle, gateway)
    assert sorted(gateway.kinds()) == ["engine_process", *["http_process"] * workers], "a process too many or too few"
    full = await crowd(gateway, permits, tokens=2)
    assert full["finished"] == permits, f"not every place is free again: {full.counts}"
    if not lost:
        failures = sum(value for name, value in told.items() if name.startswith("tgi_request_failure{"))
        assert told["tgi_request_count"] == told["tgi_request_success"] + failures, "the metrics do not add up"


def check_memory(gateway: Gateway, before_mib: float) -> None:
    """It is as much as before, once what was freed is given back."""
    deadline = time.monotonic() + 20
    allowed = before_mib * MEMORY_GROWTH + FIXED_SPREAD_MIB
    while (now := memory_mib(gateway)) > allowed:
        assert time.monotonic() < deadline, f"memory grew from {before_mib:.0f} to {now:.0f} MiB"
        time.sleep(0.5)
