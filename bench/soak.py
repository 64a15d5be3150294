"""A long load at full KV use: random lengths, a third of the clients leave in the middle, then nothing may be missing.

Requests are as long as it takes for all streams together to want more KV than there is. Memory of every process and of
the accelerators is compared between the second and the last quarter of the time, when nothing should grow any more;
afterwards no request, queued request or KV token may be in use.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from machine import nvidia
from report import Measured
from serve import raise_file_limit, run_in_loop
from served import Served
from streams import BadAnswer, Pool, Target
from workload import ROUTES, Api, Ask, PromptMaker

STREAMS = 256
DEMAND = 1.3
"""KV tokens that all streams want together, as a part of what there is."""
INPUT_SHARE = 0.7
LEAVING_SHARE = 0.33
PROMPTS = 64
"""Different prompts per stream's turn are drawn as parts of so many long texts."""
SAMPLE_S = 2.0
GROWTH_BYTES = 64 << 20
GROWTH_SHARE = 0.03
FULL_SHARE = 0.95
EMPTY_S = 60.0
TIMEOUT_S = 600.0


@dataclass
class Found:
    """What happened; `wrong` is empty if all is well."""

    wrong: list[str] = field(default_factory=list)
    streams: int = 0
    kv_tokens: int = 0
    answers: int = 0
    left: int = 0
    """Requests whose client hung up."""
    errors: dict[str, int] = field(default_factory=dict)
    output_tokens_per_s: float = 0.0
    kv_used_peak: float = 0.0
    """Part of the KV tokens."""
    kv_used_median: float = 0.0
    preemptions: float = 0.0
    resident_mib: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Per process: in the second and in the last quarter."""
    accelerator_mib: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Sample:
    """The server at one moment; bytes and KV tokens."""

    at_s: float
    kv_used: float
    resident: dict[str, int]
    accelerators: list[int]


def soak(served: Served, api: Api, prompts: PromptMaker, seconds: float, *, seed: int) -> Found:
    """Load `served` for so long and look for what does not come back."""
    raise_file_limit()
    return run_in_loop(Soak(served, api, prompts, seed=seed).run(seconds))


def server_info(url: str) -> dict[str, Any]:
    """What /info says."""
    with urllib.request.urlopen(f"{url}/info", timeout=10) as answer:
        info: dict[str, Any] = json.load(answer)
    return info


class Soak:
    """One run."""

    def __init__(self, served: Served, api: Api, prompts: PromptMaker, *, seed: int) -> None:
        info = server_info(served.url)
        self._kv_tokens = int(info["max_batch_total_tokens"])
        self._streams = min(STREAMS, int(info["max_concurrent_requests"]) // 2)
        longest = int(info["max_total_tokens"]) - 2
        # Of both ends of a uniform distribution the mean counts.
        self._longest = max(min(round(2 * DEMAND * self._kv_tokens / self._streams), longest), 8)
        self._served, self._api, self._rng = served, api, random.Random(seed)
        self._target = Target.of(served.url, ROUTES[api])
        self._pool = Pool(self._target, TIMEOUT_S)
        self._texts = [prompts.make(round(self._longest * INPUT_SHARE))[0].split() for _ in range(PROMPTS)]
        self.measured = Measured("", served.url, api)
        self.found = Found(streams=self._streams, kv_tokens=self._kv_tokens)
        self.samples: list[Sample] = []

    async def run(self, seconds: float) -> Found:
        found, began_s = self.found, time.monotonic()
        tasks = [asyncio.create_task(self._stream(began_s + seconds)) for _ in range(self._streams)]
        try:
            while time.monotonic() < began_s + seconds:
                await asyncio.sleep(min(SAMPLE_S, seconds / 40))
                self._served.check()
                self.samples.append(await asyncio.to_thread(self._sample, time.monotonic() - began_s))
                self._tell(seconds)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._pool.close()
        found.answers = self.measured.answers
        found.errors = dict(self.measured.errors)
        found.output_tokens_per_s = self.measured.output_tokens / (time.monotonic() - began_s)
        left = await asyncio.to_thread(self._served.drained, EMPTY_S)
        if left:
            found.wrong.append(f"{EMPTY_S:.0f} s after the last client left there are still {left}")
        self.judge()
        return found

    async def _stream(self, until_s: float) -> None:
        latencies = [1.0]
        while time.monotonic() < until_s:
            ask = self._ask()
            request = self._target.request(ask.body(self._api, model="tgi", ignore_eos=True, extra={}))
            leave_s = self._rng.random() * statistics.fmean(latencies) if self._rng.random() < LEAVING_SHARE else None
            began_s = time.monotonic()
            try:
                async with asyncio.timeout(leave_s):
                    exchange = await self._pool.post(request)
                self.measured.answered(exchange, ask)
                latencies = [*latencies[-8:], time.monotonic() - began_s]
            except (BadAnswer, OSError, TimeoutError) as error:
                if leave_s is not None and isinstance(error, TimeoutError):
                    self.found.left += 1
                    continue
                self.measured.failed(error)
                await asyncio.sleep(0.1)  # a server that refuses everything is not to be flooded

    def _ask(self) -> Ask:
        """A part of one of the texts: some begin alike, as in production, and most do not."""
        words = self._rng.choice(self._texts)
        total = self._rng.randint(2, self._longest)
        inputs = max(1, min(round(total * INPUT_SHARE), len(words)))
        start = 0 if self._rng.random() < 0.2 else self._rng.randint(0, len(words) - inputs)
        return Ask(" " + " ".join(words[start : start + inputs]), inputs, max(total - inputs, 1))

    def _sample(self, at_s: float) -> Sample:
        resident = {f"{part.role} {pid}": part.resident_bytes for pid, part in self._served.parts().items()}
        metrics = self._served.metrics()
        self.found.preemptions = metrics.get("tgi_preemptions", 0.0)
        return Sample(at_s, metrics.get("tgi_kv_cache_used_tokens", 0.0), resident, [used for _, used in nvidia()])

    def judge(self) -> None:
        found, samples = self.found, self.samples
        if not found.answers:
            found.wrong.append("no answer was complete")
        found.wrong += [f"{count} x {kind}: {self.measured.example[kind]}" for kind, count in found.errors.items()]
        if self.measured.short:
            found.wrong.append(f"{self.measured.short} answers have fewer tokens than asked for")
        used = [sample.kv_used / self._kv_tokens for sample in samples]
        found.kv_used_peak, found.kv_used_median = max(used, default=0.0), statistics.median(used or [0.0])
        if found.kv_used_peak < FULL_SHARE:
            found.wrong.append(f"the KV cache was never more than {found.kv_used_peak:.0%} full: this proves nothing")
        quarter = len(samples) // 4
        early, late = samples[quarter : 2 * quarter], samples[-quarter:] if quarter else []
        if not early or not late:
            return
        for name in late[-1].resident:
            before, after = (
                statistics.median(sample.resident.get(name, 0) for sample in part) for part in (early, late)
            )
            found.resident_mib[name] = (before / 2**20, after / 2**20)
            self._compare(name, before, after)
        for number in range(len(late[-1].accelerators)):
            before, after = (
                statistics.median(sample.accelerators[number] for sample in part) for part in (early, late)
            )
            found.accelerator_mib.append((before / 2**20, after / 2**20))
            self._compare(f"accelerator {number}", before, after)

    def _compare(self, name: str, before: float, after: float) -> None:
        if after - before > GROWTH_BYTES + GROWTH_SHARE * before:
            self.found.wrong.append(f"memory of {name} grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")

    def _tell(self, seconds: float) -> None:
        sample = self.samples[-1]
        if len(self.samples) % 10 == 1:
            print(
                f"{sample.at_s:.0f} of {seconds:.0f} s: {self.measured.answers} answers, {self.found.left} left, "
                f"{sum(self.measured.errors.values())} errors, KV {sample.kv_used / self._kv_tokens:.0%} used, "
                f"{sum(sample.resident.values()) >> 20} MiB resident",
                file=sys.stderr,
                flush=True,
            )
