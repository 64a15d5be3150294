"""What a load measured: samples per request, percentiles per target, as a table and as JSON."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from streams import BadAnswer, Exchange, has_token, payload
from workload import Api, Ask

PERCENTILES = (50, 90, 95, 99)
MEASURES = {
    "first_token": "time to first token",
    "inter_token": "gap between tokens",
    "inter_chunk": "gap between chunks",
    "time_per_output_token": "time per output token",
    "latency": "latency, whole answer",
}
"""Key -> what it is. A chunk is what arrived at once; tokens of one chunk have gaps of 0. Time per output token is the
mean of a request: (last token - first token) / (tokens - 1)."""


@dataclass
class Measured:
    """What is known of one target so far; all times in seconds."""

    label: str
    url: str
    api: Api
    seconds: float = 0.0
    """Time in which this target was under load."""
    answers: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    chunks: int = 0
    short: int = 0
    """Answers with fewer tokens than asked for."""
    unfinished: int = 0
    """Requests under way when the run was interrupted."""
    errors: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)
    """Per kind of error the words of the first."""
    times: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in MEASURES})
    late: array[float] = field(default_factory=lambda: array("d"))
    """Open loop: how much later than planned a request was sent."""

    def failed(self, error: Exception) -> None:
        if isinstance(error, BadAnswer):
            kind = error.kind
        elif isinstance(error, TimeoutError):
            kind = "timeout"
        elif isinstance(error, OSError):
            kind = "no connection"
        else:
            raise error
        self.errors[kind] += 1
        self.example.setdefault(kind, str(error))

    def answered(self, exchange: Exchange, ask: Ask) -> None:
        """Raises `BadAnswer` for a stream that has no token, tells an error or breaks off."""
        trailing, prompt_tokens, tokens = look_into_tail(exchange, self.api)
        if not exchange.first_token_at:
            raise BadAnswer("empty answer")
        chunks = token_chunks(exchange, trailing)
        events = sum(count for _, count in chunks)
        tokens = tokens or events
        first, last = exchange.first_token_at, chunks[-1][0] if chunks else exchange.first_token_at
        self.answers += 1
        self.input_tokens += prompt_tokens or ask.prompt_tokens
        self.output_tokens += tokens
        self.chunks += len(chunks)
        self.short += tokens < ask.output_tokens
        times = self.times
        times["first_token"].append(first - exchange.sent_at)
        times["latency"].append(exchange.ended_at - exchange.sent_at)
        if tokens > 1:
            times["time_per_output_token"].append((last - first) / (tokens - 1))
        gaps, chunk_gaps = times["inter_token"], times["inter_chunk"]
        before = first
        for index, (at, count) in enumerate(chunks):
            if index:
                chunk_gaps.append(at - before)
                gaps.append(at - before)
            gaps.extend([0.0] * (count - 1))
            before = at

    def add(self, other: Measured) -> None:
        """Count what another client measured at the same time; `seconds` stays as it is."""
        for name in ("answers", "input_tokens", "output_tokens", "chunks", "short", "unfinished"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.errors.update(other.errors)
        self.example = {**other.example, **self.example}
        for name, values in other.times.items():
            self.times[name].extend(values)
        self.late.extend(other.late)

    def summary(self) -> dict[str, Any]:
        """Seconds, tokens and counts, ready for JSON."""
        seconds = self.seconds or float("nan")
        return {
            "label": self.label,
            "url": self.url,
            "api": self.api,
            "seconds": self.seconds,
            "answers": self.answers,
            "errors": dict(self.errors),
            "error_examples": self.example,
            "short_answers": self.short,
            "unfinished": self.unfinished,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "chunks": self.chunks,
            "requests_per_s": self.answers / seconds if self.answers else 0.0,
            "input_tokens_per_s": self.input_tokens / seconds if self.answers else 0.0,
            "output_tokens_per_s": self.output_tokens / seconds if self.answers else 0.0,
            "times_s": {name: distribution(values) for name, values in self.times.items()},
            "sent_late_s": distribution(self.late),
        }


def look_into_tail(exchange: Exchange, api: Api) -> tuple[int, int, int]:
    """(last events without a token, prompt tokens, output tokens; 0 where not told). Raises `BadAnswer`."""
    values = [payload(event) for event in exchange.tail]
    trailing = prompt_tokens = tokens = 0
    for event in reversed(exchange.tail):
        if has_token(event):
            break
        trailing += 1
    for value in values:
        if not isinstance(value, dict):
            continue
        if value.get("error"):
            error = value["error"]
            raise BadAnswer("error in stream", str(error.get("message", error) if isinstance(error, dict) else error))
        told = value.get("usage") or value.get("details") or {}
        prompt_tokens = told.get("prompt_tokens") or told.get("input_length") or prompt_tokens
        tokens = told.get("completion_tokens") or told.get("generated_tokens") or tokens
    if api == "tgi":
        complete = bool(values) and isinstance(values[-1], dict) and values[-1].get("generated_text") is not None
    else:
        complete = bool(exchange.tail) and exchange.tail[-1].endswith(b"[DONE]")
    if not complete:
        raise BadAnswer("stream broke off")
    return trailing, prompt_tokens, tokens


def token_chunks(exchange: Exchange, trailing: int) -> list[tuple[float, int]]:
    """(when a chunk arrived, its events with a token), without the events before the first and after the last token."""
    chunks = list(zip(exchange.arrivals, exchange.events, strict=True))
    for end, without in ((0, exchange.leading), (-1, trailing)):
        while without and chunks:
            at, count = chunks[end]
            if count > without:
                chunks[end] = (at, count - without)
                break
            without -= count
            del chunks[end]
    return chunks


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Mean, extremes and percentiles; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {"count": len(ordered), "mean": sum(ordered) / len(ordered), "min": ordered[0], "max": ordered[-1]}
    return found | {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Between the two neighbouring values, linearly."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def table(document: dict[str, Any]) -> str:
    """The document of a run for people."""
    lines: list[str] = []
    for target in document["targets"]:
        errors = sum(target["errors"].values())
        lines += [
            "",
            f"{target['label']}   {target['url']}   {target['api']}",
            f"  {target['answers']} answers, {errors} errors in {target['seconds']:.1f} s; "
            f"{target['output_tokens']:,} tokens out, {target['input_tokens']:,} in",
            f"  {target['output_tokens_per_s']:,.1f} tokens/s out   {target['input_tokens_per_s']:,.1f} tokens/s in   "
            f"{target['requests_per_s']:,.2f} requests/s",
        ]
        lines += [f"  {count} x {kind}: {target['error_examples'][kind]}" for kind, count in target["errors"].items()]
        if target["short_answers"]:
            lines.append(f"  {target['short_answers']} answers have fewer tokens than asked for")
        if target["unfinished"]:
            lines.append(f"  {target['unfinished']} requests were under way when it was interrupted")
        if target["answers"]:
            lines.append(f"  {'milliseconds':<24}" + "".join(f"{name:>10}" for name in _COLUMNS))
            for name, text in MEASURES.items():
                lines.append(_row(text, target["times_s"][name]))
            if target["sent_late_s"]:
                lines.append(_row("sent later than planned", target["sent_late_s"]))
    generator = document["generator"]
    lines += [
        "",
        f"load generator: {generator['cpu_share']:.0%} of a core, event loop late by "
        f"{generator['loop_lag_p99_s'] * 1e3:.1f} ms (p99)",
        *(f"WARNING: {warning}" for warning in document["warnings"]),
    ]
    return "\n".join(lines)


_COLUMNS = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")


def _row(text: str, values: dict[str, float]) -> str:
    cells = (f"{values[name] * 1e3:>10.2f}" if values else f"{'-':>10}" for name in _COLUMNS)
    return f"  {text:<24}" + "".join(cells)
