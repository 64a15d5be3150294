"""What a run of the contract found, as a table to read, a page to include in docs, and a document for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rich.table import Table

from tgi_gateway.backend import ALL_FEATURES, BackendPlugin

Outcome = Literal["passed", "failed", "skipped", "known failure"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True)
class Result:
    """One test."""

    name: str
    group: str
    """The class of the contract that defines it."""
    outcome: Outcome
    reason: str
    seconds: float
    log: str = ""
    """What was logged meanwhile, of a failure: an engine that dies says there of what."""


@dataclass(frozen=True, slots=True)
class Report:
    """One run over one backend."""

    plugin: BackendPlugin
    distribution: str
    version: str
    results: Sequence[Result]

    def count(self, outcome: Outcome, group: str | None = None) -> int:
        return sum(each.outcome == outcome and group in (None, each.group) for each in self.results)

    @property
    def capabilities(self) -> dict[str, str]:
        declared = self.plugin.capabilities
        return {
            "declared": ", ".join(sorted(declared.features)) or "no feature",
            "not declared": ", ".join(sorted(ALL_FEATURES - declared.features)) or "nothing",
            "prefix cache": "yes" if declared.prefix_cache else "no",
            "batching": "yes" if declared.batching else "no",
            "alone against batched": "exact" if declared.batch_invariant else f"within {declared.tolerance:g}",
        }

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Group and counts by outcome, the last row over all."""
        groups = dict.fromkeys(each.group for each in self.results)
        rows = [(group, *(str(self.count(outcome, group)) for outcome in OUTCOMES)) for group in groups]
        return [*rows, ("all", *(str(self.count(outcome)) for outcome in OUTCOMES))]

    @property
    def title(self) -> str:
        return f"backend {self.plugin.name}: {self.plugin.summary}"

    def capability_table(self) -> Table:
        table = Table(title=self.title, title_justify="left", show_header=False)
        for name, value in self.capabilities.items():
            table.add_row(name, value)
        return table

    def result_table(self) -> Table:
        table = Table(title="results", title_justify="left")
        for column in ("group", *OUTCOMES):
            table.add_column(column, justify="left" if column == "group" else "right")
        *groups, whole = self.rows
        for row in groups:
            table.add_row(*row)
        table.add_section()
        table.add_row(*whole)
        return table

    def markdown(self) -> str:
        """Both tables, then what failed or is known to fail, and what was not tried and why, for a page of docs."""
        lines = [
            f"## {self.title}",
            "",
            f"{self.distribution} {self.version}, interface {self.plugin.api_version}.",
            "",
        ]
        lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self.capabilities.items()), ""]
        lines += [f"| group | {' | '.join(OUTCOMES)} |", f"|---|{'---:|' * len(OUTCOMES)}"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        told = [each for each in self.results if each.outcome in ("failed", "known failure")]
        reasons = ((each, each.reason.strip().replace("\n", "; ")) for each in told)
        lines += [""] * bool(told) + [f"* {each.outcome}: `{each.name}`: {reason}" for each, reason in reasons]
        untried = {
            reason: tests
            for reason, tests in self.by_reason("skipped").items()
            if not reason.startswith(("declared:", "not declared:"))  # of which the first table tells
        }
        lines += [""] * bool(untried) + [f"* skipped: {_few(tests)}: {reason}" for reason, tests in untried.items()]
        return "\n".join(lines) + "\n"

    def by_reason(self, outcome: Outcome) -> dict[str, list[Result]]:
        """The tests that ended so, by what is told of them."""
        found: dict[str, list[Result]] = {}
        for each in self.results:
            if each.outcome == outcome:
                found.setdefault(each.reason, []).append(each)
        return found

    def document(self) -> dict[str, Any]:
        """For machines."""
        capabilities = dataclasses.asdict(self.plugin.capabilities)
        return {
            "backend": self.plugin.name,
            "distribution": self.distribution,
            "version": self.version,
            "api_version": self.plugin.api_version,
            "capabilities": capabilities | {"features": sorted(self.plugin.capabilities.features)},
            "counts": {outcome: self.count(outcome) for outcome in OUTCOMES},
            "tests": [dataclasses.asdict(each) for each in self.results],
        }


def _few(tests: Sequence[Result]) -> str:
    return ", ".join(f"`{each.name}`" for each in tests) if len(tests) <= 3 else f"{len(tests)} tests"
