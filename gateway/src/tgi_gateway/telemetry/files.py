"""The files in which processes keep their counters, by place: `engine`, `http-0`, ...

`prometheus_client` maps them into memory and lets them grow as labels come. A page that is written for the first time
on a full disk ends the process (SIGBUS), so every place gets its files at once, written in full and larger than they
will ever need to be; who follows in a place goes on counting in them. Zeros are an empty file.
"""

from __future__ import annotations

import os
from pathlib import Path

GAUGES = "gauge_livemostrecent"
RESERVED_BYTES = {"counter": 256 << 10, "histogram": 512 << 10, GAUGES: 64 << 10}
"""By the library's name of the kind."""


def reserve(folder: Path, place: str) -> None:
    """Make the files of a place. Raises OSError."""
    for kind in RESERVED_BYTES:
        _zero(folder, place, kind)


def forget(folder: Path, place: str) -> None:
    """Its process has ended: its gauges are nobody's any more. What it counted stays counted."""
    _zero(folder, place, GAUGES)


def use(place: str) -> None:
    """Let metrics that are made from now on be those of `place`, not of a process id."""
    from prometheus_client import values

    values.ValueClass = values.MultiProcessValue(lambda: place)  # type: ignore[no-untyped-call]


def _zero(folder: Path, place: str, kind: str) -> None:
    descriptor = os.open(folder / f"{kind}_{place}.db", os.O_WRONLY | os.O_CREAT, 0o600)
    with open(descriptor, "wb", buffering=0) as file:
        left = memoryview(bytes(RESERVED_BYTES[kind]))
        while left:
            left = left[file.write(left) :]
