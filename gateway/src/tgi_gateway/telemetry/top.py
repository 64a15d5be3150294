"""`tgi-gateway top`: a running server's /metrics as a small live table."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tgi_gateway.errors import StartError

TIMEOUT_S = 5.0
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Scrape:
    """What a server told at one moment."""

    at: float
    """time.monotonic()"""
    samples: dict[str, dict[Labels, float]]

    @staticmethod
    def of(text: str, at: float) -> Scrape:
        samples: dict[str, dict[Labels, float]] = defaultdict(dict)
        for line in text.splitlines():
            found = _SAMPLE.fullmatch(line)
            if found is not None:
                samples[found[1]][tuple(_LABEL.findall(found[2] or ""))] = float(found[3])
        return Scrape(at, dict(samples))

    def total(self, name: str) -> float:
        return sum(self.samples.get(name, {}).values())


@dataclass(frozen=True)
class Window:
    """From one scrape to the next. A counter that went down belongs to a server that was started anew."""

    before: Scrape
    after: Scrape

    def rate(self, name: str) -> float:
        """Per second."""
        grown = self.after.total(name) - self.before.total(name)
        return max(grown, 0.0) / max(self.after.at - self.before.at, 1e-9)

    def rates(self, name: str, label: str) -> Iterator[tuple[str, float]]:
        """The same by a label's values."""
        seconds = max(self.after.at - self.before.at, 1e-9)
        for labels, value in self.after.samples.get(name, {}).items():
            grown = value - self.before.samples.get(name, {}).get(labels, 0.0)
            yield dict(labels).get(label, ""), max(grown, 0.0) / seconds

    def share(self, part: str, whole: str) -> float | None:
        grown = self.rate(whole)
        return self.rate(part) / grown if grown else None

    def quantile(self, name: str, q: float) -> float | None:
        """Of a histogram's observations in the window, interpolated as by Prometheus; None without any."""
        after, before = self.after.samples.get(f"{name}_bucket", {}), self.before.samples.get(f"{name}_bucket", {})
        counts: dict[float, float] = defaultdict(float)
        for labels, value in after.items():
            counts[float(dict(labels)["le"])] += value - before.get(labels, 0.0)
        bounds = sorted(counts)
        if not bounds or counts[bounds[-1]] <= 0:
            return None
        wanted, below, low = q * counts[bounds[-1]], 0.0, 0.0
        for bound in bounds:
            if counts[bound] >= wanted:
                inside = counts[bound] - below
                return low if bound == float("inf") else low + (bound - low) * (wanted - below) / inside
            below, low = counts[bound], bound
        return low


def view(window: Window, url: str) -> Table:
    """The table of one window."""
    now, table = window.after, Table(title=url, show_header=False, expand=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    engine = "up" if now.total("tgi_engine_up") else "DOWN"
    table.add_row("engine", engine, f"{now.total('tgi_engine_restarts'):.0f} restarts")
    table.add_row(
        "requests/s", f"{window.rate('tgi_request_success'):.1f}", f"{window.rate('tgi_request_count'):.1f}/s arrive"
    )
    failed = ", ".join(f"{err} {rate:.1f}/s" for err, rate in window.rates("tgi_request_failure", "err") if rate)
    table.add_row("failures/s", f"{window.rate('tgi_request_failure'):.1f}", failed)
    table.add_row(
        "tokens/s",
        f"{window.rate('tgi_generated_tokens'):,.0f}",
        f"{window.rate('tgi_prompt_tokens'):,.0f}/s of prompt",
    )
    table.add_row(
        "in the engine",
        f"{now.total('tgi_batch_current_size'):.0f}",
        f"{now.total('tgi_batch_total_tokens'):,.0f} tokens",
    )
    table.add_row(
        "waiting", f"{now.total('tgi_queue_size'):.0f}", f"{now.total('tgi_queue_prompt_tokens'):,.0f} prompt tokens"
    )
    capacity = now.total("tgi_kv_cache_capacity_tokens")
    used = now.total("tgi_kv_cache_used_tokens")
    table.add_row("KV cache", f"{used / capacity:.0%}" if capacity else "-", f"{used:,.0f} of {capacity:,.0f} tokens")
    hits = window.share("tgi_prefix_cache_hit_tokens", "tgi_prompt_tokens")
    table.add_row("prefix cache", "-" if hits is None else f"{hits:.0%}", "of prompt tokens")
    for title, name in (
        ("first token", "tgi_request_first_token_duration"),
        ("between tokens", "tgi_request_inter_token_duration"),
        ("queue", "tgi_request_queue_duration"),
        ("whole request", "tgi_request_duration"),
    ):
        median, slow = window.quantile(name, 0.5), window.quantile(name, 0.95)
        table.add_row(title, _seconds(median), f"p95 {_seconds(slow)}")
    for key, rate in sorted(window.rates("tgi_key_generated_tokens", "key"), key=lambda pair: -pair[1])[:5]:
        table.add_row(f"key {key}", f"{rate:,.0f}", "tokens/s")
    return table


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def scrape(url: str, api_key: str | None) -> Scrape:
    """Raises `StartError` if nobody answers, or somebody else."""
    request = urllib.request.Request(f"{url.rstrip('/')}/metrics")
    if api_key:
        request.add_header("authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            scraped = Scrape.of(answer.read().decode(errors="replace"), time.monotonic())
    except urllib.error.HTTPError as error:
        hint = "; set API_KEY to the server's key" if error.code == 401 else ""
        raise StartError(f"{url} answers {error.code} to /metrics{hint}") from error
    except (OSError, ValueError) as error:
        raise StartError(f"no server answers at {url} ({error}). Say where it is with --url") from error
    if "tgi_queue_size" not in scraped.samples and "tgi_request_count" not in scraped.samples:
        raise StartError(f"{url} is no tgi-gateway: its /metrics knows no tgi_request_count")
    return scraped


def run(
    url: str, api_key: str | None, *, every_s: float, once: bool, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Show it until interrupted; `once`: one window, then return."""
    console = Console()
    before = scrape(url, api_key)
    sleep(every_s)
    if once:
        console.print(view(Window(before, scrape(url, api_key)), url))
        return
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            try:
                after = scrape(url, api_key)
            except StartError as error:
                live.update(str(error), refresh=True)  # it may come back
            else:
                live.update(view(Window(before, after), url), refresh=True)
                before = after
            sleep(every_s)
