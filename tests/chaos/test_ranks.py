"""An engine of several ranks is one thing: whichever of them dies, all are replaced, and none is left over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from chaos import SCALE, Outcomes, check, one_stream
from launched import TOLD_WITHIN_S, launched

FLAGS = ("--backend", "cpu", "--num-shard", "2", "--max-batch-total-tokens", "4096", "--max-concurrent-requests", "16")
LISTENS = "0A"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
MODULE = b"tgi_model_server.rank"

pytestmark = pytest.mark.timeout(180 + 60 * SCALE)


def ranks(engine: int) -> list[int]:
    """Pids of the other ranks of the engine that runs as process group `engine`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if MODULE in (folder / "cmdline").read_bytes().split(b"\0") and os.getpgid(int(folder.name)) == engine:
                found.append(int(folder.name))
    return found


def listening(pids: Iterable[int]) -> set[str]:
    """Addresses at which these processes take TCP connections, as the kernel writes them."""
    sockets = {
        link.removeprefix("socket:[").removesuffix("]")
        for pid in pids
        for fd in Path(f"/proc/{pid}/fd").iterdir()
        if (link := os.readlink(fd)).startswith("socket:[")
    }
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == LISTENS and row[9] in sockets}


async def test_whichever_rank_is_killed_the_group_is_replaced_and_nothing_is_left() -> None:
    with launched(*FLAGS) as gateway:
        await asyncio.to_thread(gateway.wait_for, "Ready at")
        groups: set[int] = set()
        for times, victim in enumerate(("rank", "engine") * max(1, round(SCALE / 4)), 1):
            engine = gateway.children()["engine_process"]
            groups.add(engine)
            (rank,) = ranks(engine)
            met_at = listening([engine, rank])
            assert met_at, "ranks meet somewhere"
            assert met_at <= LOOPBACK
            outcomes = Outcomes()
            streams = [
                asyncio.create_task(one_stream(gateway, outcomes, tokens=1000, prompt=f"Tell me {n} stories."))
                for n in range(4)
            ]
            await asyncio.sleep(0.5)
            os.kill(rank if victim == "rank" else engine, signal.SIGKILL)
            killed_at = time.monotonic()
            await asyncio.gather(*streams)
            assert time.monotonic() - killed_at < TOLD_WITHIN_S
            assert outcomes["failed"] + outcomes["finished"] == 4, f"{outcomes.counts}\n{gateway.log}"
            assert outcomes["failed"] > 0
            await asyncio.to_thread(gateway.wait_for, "is back after", times)
            await check(gateway, outcomes, workers=1, permits=16)
        assert "rank 1 of 2 was ended by SIGKILL" in gateway.log
        groups.add(gateway.children()["engine_process"])
        gateway.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(gateway.end) == 0, gateway.log
        assert gateway.left_behind() == []
        assert [rank for engine in groups for rank in ranks(engine)] == []
