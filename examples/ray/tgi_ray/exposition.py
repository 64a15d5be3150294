"""One text of metrics from those of several servers, told apart by the label `replica`."""

from __future__ import annotations

from collections.abc import Mapping


def merged(texts: Mapping[str, str]) -> str:
    """Of texts in Prometheus's format, by replica; all samples of a metric stand together, as the format demands."""
    families: dict[str, list[str]] = {}
    described: dict[str, list[str]] = {}
    for replica, text in texts.items():
        name = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                described.setdefault(name, [])
            if line.startswith("#"):
                if line not in described.setdefault(name, []):
                    described[name].append(line)
            elif line:
                families.setdefault(name, []).append(_labelled(line, replica))
    lines = [line for name, comments in described.items() for line in (*comments, *families.get(name, ()))]
    return "".join(f"{line}\n" for line in lines)


def _labelled(sample: str, replica: str) -> str:
    name, brace, labels = sample.partition("{")
    if brace and " " not in name:
        return f'{name}{{replica="{replica}",{labels}'
    name, _, value = sample.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'
