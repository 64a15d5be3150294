"""Many clients: a closed loop of requests spread over several client processes, so that none of them is the limit."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import report
from serve import Load, Own, raise_file_limit, run_in_loop
from streams import Pool, Target
from workload import Api, Ask

READY_S = 120.0
"""How long client processes may take to start."""


class Overdue(Exception):
    """The clients were not done in time."""


@dataclass
class Outcome:
    """What all clients measured together."""

    measured: report.Measured
    clients: list[Own] = field(default_factory=list)
    began_s: float = math.inf
    """time.perf_counter(), which processes of one machine share, of the first request."""
    ended_s: float = 0.0
    """Of the last answer."""

    @property
    def busiest_client(self) -> float:
        """Share of a core."""
        return max(own.summary()["cpu_share"] for own in self.clients)

    def warnings(self) -> list[str]:
        return sorted({warning for own in self.clients for warning in own.warnings()})


def run(
    target: Target, api: Api, requests: Sequence[tuple[Ask, bytes]], *, streams: int, processes: int, limit_s: float
) -> Outcome:
    """Send `requests`, `streams` at any time, from `processes` processes. Raises `Overdue` after `limit_s`."""
    processes = max(1, min(processes, streams, len(requests)))
    context = multiprocessing.get_context("spawn")
    outcome = Outcome(report.Measured("", "", api))
    crowd: list[tuple[Any, Connection]] = []
    try:
        for number in range(processes):
            ours, theirs = context.Pipe()
            share = streams // processes + (number < streams % processes)
            part = list(requests[number::processes])
            client = context.Process(target=_client, args=(theirs, target, api, part, share, limit_s), daemon=True)
            client.start()
            theirs.close()
            crowd.append((client, ours))
        connections = [connection for _, connection in crowd]
        _receive(connections, READY_S)
        for connection in connections:
            connection.send("go")
        for measured, own, began_s, ended_s in _receive(connections, limit_s):
            outcome.measured.add(measured)
            outcome.clients.append(own)
            outcome.began_s = min(outcome.began_s, began_s)
            outcome.ended_s = max(outcome.ended_s, ended_s)
    finally:
        for client, connection in crowd:
            client.kill()
            client.join()
            connection.close()
    outcome.measured.seconds = outcome.ended_s - outcome.began_s
    return outcome


def _receive(connections: Sequence[Connection], limit_s: float) -> list[Any]:
    """One message of each, in any order."""
    left, messages, deadline_s = list(connections), [], time.monotonic() + limit_s
    while left:
        ready = wait(left, max(deadline_s - time.monotonic(), 0.0))
        if not ready:
            raise Overdue(f"{len(left)} of {len(connections)} client processes were not done after {limit_s:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            try:
                messages.append(connection.recv())
            except EOFError:
                raise Overdue("a client process ended early; its message is above") from None
            left.remove(connection)
    return messages


def _client(
    connection: Connection, target: Target, api: Api, part: list[tuple[Ask, bytes]], streams: int, limit_s: float
) -> None:
    raise_file_limit()
    load, own = Load(report.Measured("", "", api), Pool(target, limit_s), part), Own()

    async def work() -> tuple[float, float]:
        connection.send("ready")
        connection.recv()
        began_s = time.perf_counter()
        with own.watch():
            await load.closed_loop(part, streams)
        return began_s, time.perf_counter()

    with suppress(KeyboardInterrupt):  # the parent tells of it
        began_s, ended_s = run_in_loop(work())
        connection.send((load.measured, own, began_s, ended_s))
