"""Memory over an hour of everything at once at a low rate: short answers, streams, leavers, bad requests, new schemas.

    python bench/churn.py --minutes 60 --rate 1.5 --out churn.tsv

Unlike bench/soak.py it fills nothing: it looks for what grows by the request. Every process is looked at once a minute;
each must be as large in the last quarter of the time as in the second, and afterwards nothing may be open and the
counters must add up to what the clients saw.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from machine import machine
from served import Part, Served, cpu_by_role, serve
from workload import poisson

GROWTH_SHARE = 0.05
GROWTH_BYTES = 3 << 20
"""What an allocator keeps or gives back from one look to the next, in a process however small."""
SETTLED_S = 600.0
"""A shorter run shows growth but does not blame it: caches are filling still."""
FEWEST_LOOKS = 8
"""However short the run; of a longer one there is one a minute."""
KEYS = ("first", "second", "third")
WORDS = ["fox", "hen", "river", "moon", "stone", "lamp", "song", "winter", "bread", "garden", "engine", "letter"]
WAIT_S = 60.0


@dataclass
class Churn:
    """Clients of one server, and how their requests ended, by kind and status."""

    client: httpx.AsyncClient
    dice: random.Random
    endings: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def one(self) -> None:
        """A request of a kind by chance."""
        kinds: list[tuple[Callable[[], Awaitable[str]], float]] = [
            (self._generate, 4),
            (self._stream, 4),
            (self._chat, 3),
            (self._leave, 3),
            (self._schema, 1),
            (self._bad, 3),
            (self._look, 2),
        ]
        (kind,) = self.dice.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
        try:
            self.endings[await kind()] += 1
        except (httpx.HTTPError, OSError) as error:
            self.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    async def _generate(self) -> str:
        answer = await self._post("/generate", self._native())
        return f"generate {answer.status_code}"

    async def _stream(self) -> str:
        return f"stream {await self._events('/generate_stream', self._native())}"

    async def _chat(self) -> str:
        messages = [{"role": "user", "content": self._text()}]
        body = {"model": "tgi", "messages": messages, "max_tokens": self.dice.randint(1, 12), "stream": True}
        return f"chat {await self._events('/v1/chat/completions', body)}"

    async def _leave(self) -> str:
        try:
            async with asyncio.timeout(self.dice.random() * 0.3):
                await self._events("/generate_stream", self._native(tokens=200))
        except TimeoutError:
            return "left"
        return "left too late"

    async def _schema(self) -> str:
        """No schema is ever sent twice."""
        name = f"{self.dice.choice(WORDS)}_{self.dice.getrandbits(32)}"
        schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
        body = self._native(tokens=24)
        body["parameters"] = {"max_new_tokens": 24, "grammar": {"type": "json", "value": schema}}
        answer = await self._post("/generate", body)
        return f"schema {answer.status_code}"

    async def _bad(self) -> str:
        number = self.dice.getrandbits(32)
        cases: list[tuple[str, bytes, str]] = [
            ("/generate", b"{no json %d" % number, KEYS[0]),
            ("/generate", json.dumps({"inputs": "x", "parameters": {"temperature": -number}}).encode(), KEYS[0]),
            ("/generate", json.dumps({"inputs": self._text() * 3000}).encode(), KEYS[0]),
            ("/v1/chat/completions", json.dumps({"messages": [{"role": f"{number}"}]}).encode(), KEYS[0]),
            ("/generate", json.dumps(self._native()).encode(), f"wrong-{number}"),
            (f"/no/such/route/{number}", b"{}", KEYS[0]),
        ]
        route, body, key = self.dice.choice(cases)
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        answer = await self.client.post(route, content=body, headers=headers)
        if answer.status_code < 400:
            self.wrong.append(f"a bad request to {route} was answered with {answer.status_code}")
        return f"bad {answer.status_code}"

    async def _look(self) -> str:
        route = self.dice.choice(("/health", "/health/ready", "/health/generate", "/info", "/metrics", "/v1/models"))
        answer = await self.client.get(route, headers=self._headers())
        return f"look {answer.status_code}"

    def _text(self) -> str:
        return f"{self.dice.getrandbits(40)} " + " ".join(self.dice.choices(WORDS, k=self.dice.randint(3, 60)))

    def _native(self, tokens: int | None = None) -> dict[str, object]:
        return {"inputs": self._text(), "parameters": {"max_new_tokens": tokens or self.dice.randint(1, 16)}}

    def _headers(self) -> dict[str, str]:
        trace = f"00-{self.dice.getrandbits(127) + 1:032x}-{self.dice.getrandbits(63) + 1:016x}-01"
        identity = f"churn-{self.dice.getrandbits(48)}"
        return {"authorization": f"Bearer {self.dice.choice(KEYS)}", "traceparent": trace, "x-request-id": identity}

    async def _post(self, route: str, body: dict[str, object]) -> httpx.Response:
        return await self.client.post(route, json=body, headers=self._headers())

    async def _events(self, route: str, body: dict[str, object]) -> str:
        """The status, with a mark if the stream broke off."""
        last = ""
        async with self.client.stream("POST", route, json=body, headers=self._headers()) as answer:
            async for line in answer.aiter_lines():
                last = line or last
        whole = last == "data: [DONE]" or '"generated_text":"' in last or answer.status_code != 200
        return str(answer.status_code) if whole else f"{answer.status_code}, broken off: {last[:80]}"


@dataclass(frozen=True, slots=True)
class Look:
    """The server's processes at a moment."""

    at_s: float
    parts: dict[int, Part]
    private: dict[int, int]
    """Bytes by process that no other process shares."""


def look(served: Served, at_s: float) -> Look:
    parts = served.parts()
    return Look(at_s, parts, {pid: private_bytes(pid) for pid in parts})


def private_bytes(pid: int) -> int:
    """Of /proc/PID/smaps_rollup; 0 if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


async def churn(served: Served, minutes: float, rate: float, seed: int, out: Path) -> list[str]:
    """Run it; returns what is wrong."""
    looks = [look(served, 0.0)]
    began_s = time.monotonic()
    async with httpx.AsyncClient(base_url=served.url, timeout=WAIT_S) as client:
        made = Churn(client, random.Random(seed))
        every_s = min(60.0, minutes * 60 / FEWEST_LOOKS)
        sampler = asyncio.create_task(_sample(served, looks, began_s, every_s, out, made))
        async with asyncio.TaskGroup() as group:
            for due_s in poisson(rate, seed):
                if due_s > minutes * 60:
                    break
                await asyncio.sleep(max(0.0, began_s + due_s - time.monotonic()))
                group.create_task(made.one())
        sampler.cancel()
    wrong = list(made.wrong[:10])
    wrong += [f"{count} x {kind}" for kind, count in made.endings.items() if "broken" in kind or " 5" in kind]
    wrong += await asyncio.to_thread(_left, served, made)
    print(f"{sum(made.endings.values())} requests: " + ", ".join(f"{n} {k}" for k, n in sorted(made.endings.items())))
    return wrong + report(looks)


async def _sample(served: Served, looks: list[Look], began_s: float, every_s: float, out: Path, made: Churn) -> None:
    with out.open("w") as table:
        print("minute", "process", "resident_KiB", "private_KiB", "requests", sep="\t", file=table)
        while True:
            await asyncio.sleep(began_s + every_s * len(looks) - time.monotonic())
            served.check()
            looks.append(await asyncio.to_thread(look, served, time.monotonic() - began_s))
            for pid, part in looks[-1].parts.items():
                sizes = (part.resident_bytes >> 10, looks[-1].private[pid] >> 10)
                minute, requests = f"{looks[-1].at_s / 60:.1f}", sum(made.endings.values())
                print(minute, f"{part.role} {pid}", *sizes, requests, sep="\t", file=table)
            table.flush()


def _left(served: Served, made: Churn) -> list[str]:
    """What is still open, and what the counters miss."""
    still, told = served.drained(WAIT_S), served.metrics()
    wrong = [f"still open: {still}"] if still else []
    ended = told["tgi_request_success"] + told.get("tgi_request_failure", 0.0)
    if told["tgi_request_count"] != ended:
        wrong.append(f"{told['tgi_request_count']:.0f} requests were counted and {ended:.0f} ends")
    succeeded = sum(made.endings[f"{kind} 200"] for kind in ("generate", "stream", "chat", "schema"))
    # Some who left did so when their answer was complete, but not yet read.
    gone = made.endings["left too late"] + made.endings["left"]
    if not succeeded <= told["tgi_request_success"] <= succeeded + gone:
        wrong.append(f"clients saw {succeeded} answers, the server counted {told['tgi_request_success']:.0f}")
    return wrong


def report(looks: list[Look]) -> list[str]:
    """Print sizes at the start, in the second and in the last quarter; returns what grew."""
    wrong = []
    hours = looks[-1].at_s / 3600
    quarter = max(1, len(looks) // 4)
    print(f"{'process':<12}{'private MiB: start':>20}{'2nd quarter':>13}{'last quarter':>14}{'CPU, cores':>12}")
    for pid, part in looks[-1].parts.items():
        if pid not in looks[0].parts:
            wrong.append(f"process {pid} ({part.role}) was not there at the start")
            continue
        early, late = (
            statistics.median(each.private.get(pid, 0) for each in some)
            for some in (looks[quarter : 2 * quarter], looks[-quarter:])
        )
        cores = (part.cpu_s - looks[0].parts[pid].cpu_s) / (hours * 3600)
        start, early_mib, late_mib = (size / 2**20 for size in (looks[0].private[pid], early, late))
        print(f"{part.role:<12}{start:>20.1f}{early_mib:>13.1f}{late_mib:>14.1f}{cores:>12.3f}")
        if looks[-1].at_s > SETTLED_S and late > early * (1 + GROWTH_SHARE) + GROWTH_BYTES:
            wrong.append(f"{part.role} grew from {early_mib:.1f} to {late_mib:.1f} MiB")
    used = cpu_by_role(looks[0].parts, looks[-1].parts)
    print(f"{hours * 60:.1f} minutes, {sum(map(sum, used.values())) / (hours * 3600):.3f} of a core together")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=1.5, help="Requests per second, Poisson (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("churn.tsv"), help="Table of every look (default %(default)s)")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(json.dumps(machine()))
    flags = ["--http-workers", "2", "--max-batch-total-tokens", "8192", "--max-total-tokens", "2048"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        environ = {"API_KEYS": ",".join(KEYS), "OMP_NUM_THREADS": "1"}
        with serve(flags, log, environ=environ, timeout_s=WAIT_S * 2, key=KEYS[0]) as served:
            wrong = asyncio.run(churn(served, asked.minutes, asked.rate, asked.seed, asked.out))
        wrong += [line for line in log.read_text().splitlines() if "Traceback" in line or " ERROR " in line][:10]
    sys.exit("\n".join(f"WRONG: {each}" for each in wrong) if wrong else 0)


if __name__ == "__main__":
    main()
