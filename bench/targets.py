"""The whole table of targets, through HTTP, against a server that this command starts: Llama 3.1 8B's shape.

    python bench/targets.py --backend cuda                       every row
    python bench/targets.py --backend cuda --rows 256,prefix     some
    python bench/targets.py --backend cuda -- --http-workers 4   with flags for the server
    python bench/targets.py --backend simulated                  a device that only waits: what the host can keep busy
    python bench/targets.py --quick                              a small run of the CPU engine with the demo model
    python bench/targets.py --backend cuda --soak 10             ten minutes at full KV use, with cancels
    python bench/targets.py --quick --backend llamacpp --soak 10   the same with the demo model, by 32 clients
    python bench/targets.py --url http://127.0.0.1:8000 --api openai-completions --model-folder DIR

Weights are random, generated from config.json; prompts are random words, other ones in every request, of exactly the
wanted number of tokens; answers are greedy, streamed, and of exactly the wanted length, or the row has failed. With
--url somebody else's server is measured, which was started on the folder that --model-folder keeps.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import crowd
import simulated
import soak
from machine import machine
from model_folder import WORDS, write_model_folder
from report import Measured
from serve import run_in_loop
from served import NotServing, Served, cpu_by_role, serve
from streams import BadAnswer, Pool, Target
from workload import ROUTES, Api, Ask, PromptMaker, apis

START_LIMIT_S = 400.0
CACHES = ("TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
"""Environment variables of the folders in which compiled kernels are kept."""


@dataclass(frozen=True)
class Measure:
    """One figure of a row; `of` takes what the crowd found."""

    name: str
    unit: str
    of: Callable[[crowd.Outcome], float]
    target: float | None = None
    vllm: float | None = None
    """vLLM 0.26.0 on one H200."""
    more_is_better: bool = False


def _time(kind: str, place: str) -> Callable[[crowd.Outcome], float]:
    """Milliseconds."""
    return lambda outcome: float(outcome.measured.summary()["times_s"][kind].get(place, float("nan"))) * 1e3


def _rate(kind: str) -> Callable[[crowd.Outcome], float]:
    return lambda outcome: float(outcome.measured.summary()[f"{kind}_tokens_per_s"])


GAP_P50 = Measure("gap between tokens, median", "ms", _time("inter_token", "p50"))
GAP_P99 = Measure("gap between tokens, p99", "ms", _time("inter_token", "p99"))
FIRST_P50 = Measure("first token, median", "ms", _time("first_token", "p50"))
OUTPUT = Measure("output tokens/s", "", _rate("output"), more_is_better=True)
INPUT = Measure("input tokens/s", "", _rate("input"), more_is_better=True)
WALL = Measure("wall time", "s", lambda outcome: outcome.measured.seconds)


@dataclass(frozen=True)
class Row:
    """One load of the table."""

    name: str
    streams: int
    requests: int
    input_tokens: int
    """Per request, without `shared_tokens`."""
    output_tokens: int
    measures: tuple[Measure, ...]
    shared_tokens: int = 0
    """Of a prefix that all requests have, sent once before they are."""
    flags: tuple[str, ...] = ()
    """Of a server of its own."""
    speed_up_of: str = ""
    """The row whose first figure, divided by this row's, is this row's result."""
    speed_up_target: float = 0.0

    @property
    def title(self) -> str:
        prefix = f"{self.shared_tokens:,} shared + " if self.shared_tokens else ""
        return (
            f"{self.streams} streams, {prefix}{self.input_tokens:,} -> {self.output_tokens}, {self.requests} requests"
            f"{' ' if self.flags else ''}{' '.join(self.flags)}"
        )


def _aim(measure: Measure, target: float, vllm: float) -> Measure:
    return dataclasses.replace(measure, target=target, vllm=vllm)


START, FIRST_RUN, WARM_CACHES = "start", "start to ready, first run", "start to ready, warm caches"
START_AIMS = {FIRST_RUN: (30.0, 169.0), WARM_CACHES: (30.0, 97.0)}
"""Seconds: target and vLLM's."""
ROWS = (
    Row("1", 1, 8, 128, 256, (_aim(GAP_P50, 3.95, 4.79), GAP_P99, FIRST_P50)),
    Row("32", 32, 128, 512, 256, (_aim(OUTPUT, 5_200, 4_409), GAP_P50, GAP_P99, FIRST_P50)),
    Row("256", 256, 768, 512, 256, (_aim(OUTPUT, 12_500, 10_001), _aim(GAP_P99, 60, 193), GAP_P50, FIRST_P50)),
    Row("long", 8, 32, 8_000, 8, (_aim(INPUT, 43_000, 37_600), FIRST_P50)),
    Row("prefix", 20, 20, 50, 32, (_aim(WALL, 0.5, 1.28), _aim(FIRST_P50, 120, 446)), shared_tokens=32_000),
    Row("tp2", 1, 8, 128, 256, (GAP_P50, GAP_P99), flags=("--num-shard", "2"), speed_up_of="1", speed_up_target=1.7),
)
QUICK_ROWS = (
    Row("1", 1, 2, 16, 24, (GAP_P50, GAP_P99, FIRST_P50)),
    Row("32", 4, 8, 32, 16, (OUTPUT, GAP_P50, GAP_P99, FIRST_P50)),
    Row("256", 16, 24, 32, 16, (OUTPUT, GAP_P99, GAP_P50, FIRST_P50)),
    Row("long", 2, 3, 400, 4, (INPUT, FIRST_P50)),
    Row("prefix", 5, 5, 10, 8, (WALL, FIRST_P50), shared_tokens=400),
)
DEFAULT_ROWS = (START, "1", "32", "256", "long", "prefix")
SERVER_FLAGS = ("--max-batch-size", "256", "--max-concurrent-requests", "1024", "--load-format", "dummy")
QUICK_SOAK_FLAGS = ("--max-batch-total-tokens", "2048", "--max-total-tokens", "256")
QUICK_FLAGS = ("--max-batch-size", "16", "--max-concurrent-requests", "64")


@dataclass
class Result:
    """One row's figures as they go into the table and the JSON."""

    row: str
    title: str
    figures: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Why the figures do not count."""
    warnings: list[str] = field(default_factory=list)
    cores: dict[str, float] = field(default_factory=dict)
    """Cores that the server's processes and the clients kept busy."""
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, unit: str, value: float, target: float | None, vllm: float | None, *, more: bool) -> None:
        met = None if target is None else (value >= target if more else value <= target)
        self.figures.append({"name": name, "unit": unit, "value": value, "target": target, "vllm": vllm, "met": met})


@dataclass
class Bench:
    """What all rows have in common."""

    options: argparse.Namespace
    model: Path
    scratch: Path
    results: list[Result] = field(default_factory=list)

    @property
    def api(self) -> Api:
        api: Api = self.options.api
        return api

    def run(self, rows: Sequence[Row], *, with_start: bool) -> None:
        """Every row, those of one server together. Raises `NotServing`."""
        together = [row for row in rows if not row.flags]
        environ = self._plugin()
        if with_start:
            environ |= {name: str(self.scratch / name.lower()) for name in CACHES}
            self._measure_start(environ)
        if together:
            with self._server((), environ) as served:
                if with_start:
                    self._note_start(WARM_CACHES, served)
                for row in together:
                    self._row(row, served)
        for row in rows:
            if row.flags:
                with self._server(row.flags, environ) as served:
                    self._row(row, served)

    def _plugin(self) -> dict[str, str]:
        """Environment in which the chosen backend is installed."""
        return simulated.install(self.scratch) if self.options.backend == simulated.NAME else {}

    def soak(self, minutes: float) -> None:
        with self._server(QUICK_SOAK_FLAGS if self.options.quick else (), self._plugin()) as served:
            found = soak.soak(served, self.api, self.prompts("soak", 0), minutes * 60, seed=self.options.seed)
        result = Result("soak", f"{minutes:g} minutes at full KV use, with cancels", wrong=found.wrong)
        result.details = dataclasses.asdict(found)
        for name, unit, value in (
            ("complete answers", "", found.answers),
            ("clients that left", "", found.left),
            ("output tokens/s", "", found.output_tokens_per_s),
            ("KV used, median", "%", found.kv_used_median * 100),
            ("KV used, peak", "%", found.kv_used_peak * 100),
            ("preemptions", "", found.preemptions),
        ):
            result.add(name, unit, value, None, None, more=True)
        self.results.append(result)

    def prompts(self, name: str, shared_tokens: int) -> PromptMaker:
        """Its own for every row, so that no row profits from the prefixes of another."""
        words = self.model / WORDS
        seed = random.Random(f"{self.options.seed} {name}").getrandbits(32)
        return PromptMaker(seed, shared_tokens, self.model, words if words.exists() else None)

    @contextmanager
    def _server(self, flags: Sequence[str], environ: Mapping[str, str]) -> Iterator[Served]:
        options = self.options
        if options.url:
            yield Served(options.url)
            return
        base = QUICK_FLAGS if options.quick else SERVER_FLAGS
        model = () if options.quick else ("--model-id", str(self.model))
        arguments = ["--backend", options.backend, *model, *base, *flags, *options.server_flags]
        _say(f"starting: tgi-gateway {' '.join(arguments)}   (log: {options.log})")
        with serve(arguments, options.log, environ=environ, timeout_s=options.start_limit) as served:
            _say(f"ready after {served.ready_s:.1f} s")
            yield served

    def _measure_start(self, environ: Mapping[str, str]) -> None:
        self.results.append(Result(START, "start to ready"))
        with self._server((), environ) as served:
            self._note_start(FIRST_RUN, served)

    def _note_start(self, name: str, served: Served) -> None:
        target, vllm = (None, None) if self.options.quick else START_AIMS[name]
        self.results[0].add(name, "s", served.ready_s, target, vllm, more=False)

    def _row(self, row: Row, served: Served) -> None:
        result = Result(row.name, row.title)
        self.results.append(result)
        target = Target.of(served.url, ROUTES[self.api])
        requests = self._requests(row, target, row.requests + 1)
        (warm_up, request), *counted = requests
        try:
            run_in_loop(_send_once(target, request, warm_up, self.api, self.options.row_limit))
            before = served.parts()
            outcome = crowd.run(
                target,
                self.api,
                counted,
                streams=row.streams,
                processes=self.options.clients,
                limit_s=self.options.row_limit,
            )
        except (BadAnswer, OSError, TimeoutError, crowd.Overdue) as error:
            result.wrong.append(str(error) or "timeout")
            served.check()
            return
        result.wrong += exactness(outcome.measured, [ask for ask, _ in counted])
        result.warnings = outcome.warnings()
        result.details = outcome.measured.summary()
        result.cores = {
            f"{role} {name}": value / outcome.measured.seconds
            for role, used in cpu_by_role(before, served.parts()).items()
            for name, value in (("all", sum(used)), ("busiest", used[0]))
            if name == "all" or len(used) > 1
        } | {"client busiest": outcome.busiest_client}
        for measure in row.measures:
            value = measure.of(outcome)
            result.add(measure.name, measure.unit, value, measure.target, measure.vllm, more=measure.more_is_better)
        compared = next((each for each in self.results if each.row == row.speed_up_of and each.figures), None)
        if compared is not None:
            gain = compared.figures[0]["value"] / result.figures[0]["value"]
            result.add(f"times row {row.speed_up_of}", "x", gain, row.speed_up_target, None, more=True)
        _say(f"{row.name}: {'; '.join(_figure(figure) for figure in result.figures)}")

    def _requests(self, row: Row, target: Target, count: int) -> list[tuple[Ask, bytes]]:
        prompts = self.prompts(row.name, row.shared_tokens)
        made = []
        for _ in range(count):
            prompt, tokens = prompts.make(row.shared_tokens + row.input_tokens)
            ask = Ask(prompt, tokens, row.output_tokens)
            made.append((ask, target.request(ask.body(self.api, model=self.options.model, ignore_eos=True, extra={}))))
        return made


def exactness(measured: Measured, asked: Sequence[Ask]) -> list[str]:
    """What is wrong with a load of which every answer must have exactly the tokens that were asked for."""
    wrong = [f"{count} x {kind}: {measured.example[kind]}" for kind, count in measured.errors.items()]
    for name, got, wanted in (
        ("answers", measured.answers, len(asked)),
        ("output tokens", measured.output_tokens, sum(ask.output_tokens for ask in asked)),
        ("input tokens", measured.input_tokens, sum(ask.prompt_tokens for ask in asked)),
    ):
        if got != wanted:
            wrong.append(f"{got:,} {name} instead of {wanted:,}")
    return wrong


async def _send_once(target: Target, request: bytes, ask: Ask, api: Api, limit_s: float) -> None:
    pool = Pool(target, limit_s)
    try:
        Measured("", "", api).answered(await pool.post(request), ask)
    finally:
        pool.close()


def table(results: Sequence[Result]) -> str:
    """For people."""
    lines = [f"{'':38}{'measured':>12}{'target':>10}{'':5}{'vLLM':>9}"]
    for result in results:
        lines += ["", f"{result.row}: {result.title}"]
        for figure in result.figures:
            met = {True: " met", False: " no", None: ""}[figure["met"]]
            name = f"  {figure['name']}{', ' if figure['unit'] else ''}{figure['unit']}"
            lines.append(
                f"{name:38}{figure['value']:>12,.2f}{_number(figure['target']):>10}{met:5}{_number(figure['vllm']):>9}"
            )
        if result.cores:
            lines.append("  cores busy: " + ", ".join(f"{name} {value:.2f}" for name, value in result.cores.items()))
        lines += [f"  WARNING: {warning}" for warning in result.warnings]
        lines += [f"  WRONG: {wrong}" for wrong in result.wrong]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,g}"


def _figure(figure: Mapping[str, Any]) -> str:
    return f"{figure['name']} {figure['value']:,.2f} {figure['unit']}".rstrip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="targets.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    names = ", ".join((START, *(row.name for row in ROWS)))
    add("--backend", help="of the server (default cuda; cpu with --quick)")
    add("--rows", help=f"comma list of {names} (default {','.join(DEFAULT_ROWS)})")
    add("--quick", action="store_true", help="small loads and the demo model: does it all work?")
    add("--soak", type=float, metavar="MINUTES", help="no rows: random loads at full KV use, then check for leaks")
    add("--url", help="measure this server instead of starting one")
    add("--api", choices=apis(), default="tgi", help="routes to use (default %(default)s)")
    add("--model", default="tgi", help="model name sent to OpenAI routes (default %(default)s)")
    add("--model-folder", type=Path, metavar="DIR", help="write config.json and tokenizer there and keep them")
    cores = os.cpu_count() or 1
    add("--clients", type=int, default=max(1, min(4, cores // 4)), help="client processes (default %(default)s here)")
    add("--row-limit", type=float, default=120.0, metavar="S", help="a row that takes longer failed (%(default)s)")
    add("--start-limit", type=float, default=START_LIMIT_S, metavar="S", help="for the server's start (%(default)s)")
    add("--seed", type=int, default=time.time_ns() % 1_000_000, help="of the prompts (default: another in every run)")
    add("--log", type=Path, default=Path("targets-server.log"), help="the server's log (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything there as well")
    add("server_flags", nargs="*", metavar="-- FLAG", help="further flags of the server")
    return made


def chosen(options: argparse.Namespace) -> tuple[list[Row], bool]:
    """(rows, whether to measure the start). Raises ValueError for a name that is no row's."""
    known = {row.name: row for row in (QUICK_ROWS if options.quick else ROWS)}
    names = options.rows.split(",") if options.rows else [name for name in DEFAULT_ROWS if name in (START, *known)]
    unknown = [name for name in names if name not in (START, *known)]
    if unknown:
        raise ValueError(f"--rows: no {', '.join(unknown)}; there are {', '.join((START, *known))}")
    return [row for row in known.values() if row.name in names], START in names and not options.url


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    try:
        rows, with_start = chosen(options)
    except ValueError as error:
        made.error(str(error))
    options.backend = options.backend or ("cpu" if options.quick else "cuda")
    options.log.unlink(missing_ok=True)
    interrupted = ""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tgi-bench-")))
        bench = Bench(options, _model(options, scratch), scratch)
        try:
            if options.soak:
                bench.soak(options.soak)
            else:
                bench.run(rows, with_start=with_start)
        except NotServing as error:
            interrupted = str(error)
        except KeyboardInterrupt:
            interrupted = "interrupted"
    print(table(bench.results))
    if options.backend == simulated.NAME and options.log.exists():
        lines = options.log.read_text("utf-8", "replace").splitlines()
        print("\n".join(line[line.index("device busy") :] for line in lines if "device busy" in line))
    if interrupted:
        print(f"\n{interrupted}", file=sys.stderr)
    document = {
        "machine": machine(),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "results": [dataclasses.asdict(result) for result in bench.results],
        "interrupted": interrupted,
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 1 if interrupted or any(result.wrong for result in bench.results) else 0


def _model(options: argparse.Namespace, scratch: Path) -> Path:
    """The folder whose tokenizer makes the prompts, and which the server serves."""
    if options.quick:
        return Path(importlib.import_module("tgi_demo_model").model_path())
    folder: Path = options.model_folder or scratch / "llama-8b-shape"
    if not (folder / WORDS).exists():
        write_model_folder(folder)
    return folder.resolve()


if __name__ == "__main__":
    sys.exit(main())
