"""Load against a running server: time to first token, gaps between tokens, throughput.

    python bench/serve.py --url http://127.0.0.1:3000 --concurrency 16 --requests 200
    python bench/serve.py --api openai-chat --url ours=http://127.0.0.1:3000 --url theirs=http://127.0.0.1:8000 --rate 4

Closed loop (--concurrency): so many requests are always under way. Open loop (--rate): requests are sent at random
times whether or not the server keeps up. Several --url are measured in turns, so that a change of the machine's mood
meets all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from array import array
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import report
from streams import BadAnswer, Pool, Target
from workload import ROUTES, Api, Ask, Lengths, PromptMaker, apis, asks, poisson

T = TypeVar("T")
LAG_PROBE_S = 0.01
BUSY_SHARE = 0.85
"""Above this share of a core the generator is a part of what it measures."""
LAG_LIMIT_S = 0.01


class Unusable(Exception):
    """The first request to a server failed: nothing else would come of the rest."""


@dataclass
class Load:
    """One target with its requests."""

    measured: report.Measured
    pool: Pool
    requests: list[tuple[Ask, bytes]]
    under_way: int = 0

    async def one(self, ask: Ask, request: bytes) -> None:
        self.under_way += 1
        try:
            self.measured.answered(await self.pool.post(request), ask)
        except (BadAnswer, OSError, TimeoutError) as error:
            self.measured.failed(error)
        except asyncio.CancelledError:
            self.measured.unfinished += 1
            raise
        finally:
            self.under_way -= 1

    async def closed_loop(self, part: Sequence[tuple[Ask, bytes]], concurrency: int) -> None:
        waiting = iter(part)

        async def client() -> None:
            for ask, request in waiting:
                await self.one(ask, request)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(part))):
                group.create_task(client())

    async def open_loop(self, part: Sequence[tuple[Ask, bytes]], rate: float, seed: int) -> None:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for (ask, request), due_s in zip(part, poisson(rate, seed), strict=False):
                wait_s = start + due_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                self.measured.late.append(max(time.perf_counter() - start - due_s, 0.0))
                group.create_task(self.one(ask, request))


@dataclass
class Own:
    """What the generator itself costs while it measures."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    lags: array[float] = field(default_factory=lambda: array("d"))

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        task = asyncio.ensure_future(self._probe())
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall_s += time.perf_counter() - wall
            self.cpu_s += time.process_time() - cpu
            task.cancel()

    async def _probe(self) -> None:
        while True:
            due = time.perf_counter() + LAG_PROBE_S
            await asyncio.sleep(LAG_PROBE_S)
            self.lags.append(max(time.perf_counter() - due, 0.0))

    def summary(self) -> dict[str, float]:
        lags = report.distribution(self.lags)
        return {
            "cpu_share": self.cpu_s / self.wall_s if self.wall_s else 0.0,
            "loop_lag_p99_s": lags.get("p99", 0.0),
            "loop_lag_max_s": lags.get("max", 0.0),
        }

    def warnings(self) -> list[str]:
        found, own = [], self.summary()
        if own["cpu_share"] > BUSY_SHARE:
            found.append(
                f"the load generator used {own['cpu_share']:.0%} of a core: it may be the bottleneck, not the server"
            )
        if own["loop_lag_p99_s"] > LAG_LIMIT_S:
            found.append(
                f"the load generator's event loop was late by {own['loop_lag_p99_s'] * 1e3:.0f} ms (p99): "
                "times contain that; give it a core of its own"
            )
        return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--url", action="append", required=True, metavar="[LABEL=]URL", help="server; repeat to compare several")
    add("--api", choices=apis(), action="append", help="default tgi; repeat to give one per --url")
    add("--concurrency", type=_positive, help="closed loop: requests under way (default 8 without --rate)")
    add("--rate", type=float, help="open loop: requests per second, Poisson")
    add("--requests", type=_positive, default=100, help="per server (default %(default)s)")
    add("--warmup", type=int, default=4, help="requests per server that do not count (default %(default)s)")
    add("--rounds", type=_positive, help="turns in which several servers are measured (default 4, one server 1)")
    add("--input-tokens", type=_lengths, default=_lengths("128"), metavar="N|uniform:A:B|normal:M:D|list:A,B")
    add("--output-tokens", type=_lengths, default=_lengths("64"), metavar="N|uniform:A:B|normal:M:D|list:A,B")
    add("--shared-prefix-tokens", type=int, default=0, help="with which all prompts begin (default 0)")
    add("--tokenizer", type=Path, metavar="DIR", help="folder with tokenizer.json: prompts of exact length")
    add("--words", type=Path, metavar="FILE", help="words that prompts are made of (default: a list of common ones)")
    add("--model", default="tgi", help="model name sent to OpenAI routes (default %(default)s)")
    add("--no-ignore-eos", action="store_true", help="let answers end before their length")
    add("--extra", type=_json_object, default={}, metavar="JSON", help="further fields of the body, or of `parameters`")
    add(
        "--second-extra",
        type=_json_object,
        action="append",
        metavar="JSON",
        help="as --extra, of every second request; repeat to give one per --url",
    )
    add("--header", action="append", default=[], metavar="NAME:VALUE", help="e.g. authorization: Bearer KEY")
    add("--timeout", type=float, default=600.0, help="seconds per request (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write everything there as well")
    add("--quiet", action="store_true", help="no progress")
    return made


def loads(options: argparse.Namespace) -> list[Load]:
    """Everything prepared, so that making requests costs nothing later. Raises ValueError, OSError."""
    names: list[Api] = options.api or ["tgi"]
    if len(names) not in (1, len(options.url)):
        raise ValueError(f"{len(names)} --api for {len(options.url)} --url: give one, or one each")
    seconds: list[dict[str, Any]] = options.second_extra or [{}]
    if len(seconds) not in (1, len(options.url)):
        raise ValueError(f"{len(seconds)} --second-extra for {len(options.url)} --url: give one, or one each")
    prompts = PromptMaker(options.seed, options.shared_prefix_tokens, options.tokenizer, options.words)
    count = options.requests + max(options.warmup, 0)
    made = asks(count, prompts, options.input_tokens, options.output_tokens, options.seed)
    headers = tuple(
        (name.strip(), value.strip()) for name, _, value in (each.partition(":") for each in options.header)
    )
    found = []
    for index, text in enumerate(options.url):
        label, separator, url = text.partition("=")
        if not separator or "/" in label:
            label, url = f"server {index + 1}", text
        api = names[index if len(names) > 1 else 0]
        target = Target.of(url, ROUTES[api], headers)
        second = {**options.extra, **seconds[index if len(seconds) > 1 else 0]}
        requests = [
            (
                ask,
                target.request(
                    ask.body(
                        api,
                        model=options.model,
                        ignore_eos=not options.no_ignore_eos,
                        extra=second if place % 2 else options.extra,
                    )
                ),
            )
            for place, ask in enumerate(made)
        ]
        found.append(Load(report.Measured(label, url, api), Pool(target, options.timeout), requests))
    return found


async def warm_up(load: Load, count: int) -> None:
    """Send the first requests, uncounted. Raises their failure."""
    for ask, request in load.requests[:count]:
        report.Measured("", "", load.measured.api).answered(await load.pool.post(request), ask)
    del load.requests[:count]


async def measure(options: argparse.Namespace, all_loads: list[Load], own: Own) -> None:
    """All rounds of all targets."""
    rounds = options.rounds or (4 if len(all_loads) > 1 else 1)
    for number in range(rounds):
        for load in all_loads:
            size = len(load.requests)
            part = load.requests[size * number // rounds : size * (number + 1) // rounds]
            work: Coroutine[Any, Any, None]
            if options.rate:
                work = load.open_loop(part, options.rate, options.seed + number)
            else:
                work = load.closed_loop(part, options.concurrency or 8)
            start = time.perf_counter()
            try:
                with own.watch():
                    await work
            finally:
                load.measured.seconds += time.perf_counter() - start


async def show_progress(all_loads: list[Load]) -> None:
    """One line that is written anew, or on no terminal a line every ten seconds."""
    terminal = sys.stderr.isatty()
    while True:
        await asyncio.sleep(0.5 if terminal else 10)
        parts = [
            f"{load.measured.label}: {load.measured.answers}/{len(load.requests)}"
            f" ({load.under_way} under way, {sum(load.measured.errors.values())} errors)"
            for load in all_loads
        ]
        print(
            "\r\x1b[K" + "  ".join(parts) if terminal else "  ".join(parts),
            end="" if terminal else "\n",
            file=sys.stderr,
        )
        sys.stderr.flush()


async def run(options: argparse.Namespace, all_loads: list[Load]) -> dict[str, Any]:
    """The document of a run; after Ctrl-C of what was measured until then. Raises `Unusable`."""
    own = Own()
    progress = None if options.quiet else asyncio.create_task(show_progress(all_loads))
    work = asyncio.create_task(_warm_up_and_measure(options, all_loads, own))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, work.cancel)
    try:
        await asyncio.wait([work])
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        if progress is not None:
            progress.cancel()
            if sys.stderr.isatty():
                print("\r\x1b[K", end="", file=sys.stderr)
        for load in all_loads:
            load.pool.close()
    interrupted = work.cancelled()
    if not interrupted:
        work.result()
    return {
        "settings": {name: _plain(value) for name, value in vars(options).items()},
        "targets": [load.measured.summary() for load in all_loads],
        "generator": own.summary(),
        "warnings": own.warnings(),
        "interrupted": interrupted,
    }


async def _warm_up_and_measure(options: argparse.Namespace, all_loads: list[Load], own: Own) -> None:
    for load in all_loads:
        try:
            await warm_up(load, max(options.warmup, 0))
        except (BadAnswer, OSError, TimeoutError) as error:
            raise Unusable(
                f"{load.measured.url}: {error or 'timeout'}. Is it a server of --api {load.measured.api}?"
            ) from error
    await measure(options, all_loads, own)


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    if options.rate is not None and (options.rate <= 0 or options.concurrency):
        made.error("--rate is positive and goes without --concurrency")
    try:
        all_loads = loads(options)
    except (ValueError, OSError) as error:
        made.error(str(error))
    raise_file_limit()
    try:
        document = run_in_loop(run(options, all_loads))
    except Unusable as error:
        print(error, file=sys.stderr)
        return 1
    print(report.table(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if document["interrupted"]:
        return 130
    return 0 if all(target["answers"] and not target["errors"] for target in document["targets"]) else 1


def run_in_loop(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in the fastest event loop there is."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


def raise_file_limit() -> None:
    """One connection is one file."""
    if os.name == "posix":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _plain(value: object) -> object:
    if isinstance(value, Lengths):
        return value.text
    return str(value) if isinstance(value, Path) else value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


if __name__ == "__main__":
    sys.exit(main())
