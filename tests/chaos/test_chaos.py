"""Whatever dies, hangs or misbehaves: every request ends once, everything comes back, and it can be seen.

In `make test` in a short form; `make chaos` runs it longer (the variable CHAOS is the factor).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from chaos import SCALE, Outcomes, check, check_memory, crowd, memory_mib, one_stream, settle, throng
from launched import WAIT_S, Gateway, launched, serving

PERMITS = 48
ECHO = ("--echo-step-ms", "10", "--max-batch-size", "8", "--max-concurrent-requests", str(PERMITS))

KILLS = 2
"""Of one server: it waits ever longer before it starts a process again, and at last gives up."""

pytestmark = pytest.mark.timeout(120 + 60 * SCALE)


def rounds(count: int) -> range:
    return range(max(1, round(count * SCALE)))


async def kill_soon(gateway: Gateway, module: str, number: signal.Signals, after_s: float) -> None:
    await asyncio.sleep(after_s)
    victims = [pid for pid, kind in gateway.pids().items() if kind == module]
    if victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victims[0], number)


async def until_back(gateway: Gateway, times: int) -> None:
    await asyncio.to_thread(gateway.wait_for, "is back after", times)


async def test_an_engine_that_is_killed_at_any_moment_loses_no_request_untold(byte_model: Path) -> None:
    for server in rounds(1):
        with serving(byte_model, *ECHO, "--http-workers", "2") as gateway:
            for each in range(KILLS):

                async def kill(after_s: float = 0.3 + 0.2 * ((server + each) % 5)) -> None:
                    await kill_soon(gateway, "engine_process", signal.SIGKILL, after_s)

                outcomes = await crowd(gateway, 40, tokens=60, over_s=0.8, seed=each, meanwhile=kill)
                assert outcomes["failed"] + outcomes["refused"] > 0
                await until_back(gateway, each + 1)
                await check(gateway, outcomes, workers=2, permits=PERMITS)
            told = await asyncio.to_thread(settle, gateway)
            assert told["tgi_engine_restarts"] == KILLS
            await stopped(gateway)


async def test_an_engine_that_is_frozen_is_replaced(byte_model: Path) -> None:
    with serving(byte_model, *ECHO, "--engine-timeout", "5") as gateway:

        async def freeze() -> None:
            await kill_soon(gateway, "engine_process", signal.SIGSTOP, 0.4)

        outcomes = await crowd(gateway, 40, tokens=60, over_s=0.5, meanwhile=freeze)
        assert outcomes["failed"] > 0
        await until_back(gateway, 1)
        await check(gateway, outcomes, workers=1, permits=PERMITS)
        await stopped(gateway)


async def test_an_http_worker_that_is_killed_takes_only_its_own_requests(byte_model: Path) -> None:
    for server in rounds(1):
        with serving(byte_model, *ECHO, "--http-workers", "2") as gateway:
            for each in range(KILLS):

                async def kill(after_s: float = 0.3 + 0.1 * ((server + each) % 7)) -> None:
                    await kill_soon(gateway, "http_process", signal.SIGKILL, after_s)

                outcomes = await crowd(gateway, 40, tokens=60, over_s=0.6, seed=each, meanwhile=kill)
                assert outcomes["finished"] > 0
                assert outcomes["failed"] == 0
                await until_back(gateway, each + 1)
                await check(gateway, outcomes, workers=2, permits=PERMITS, lost=True)
            await stopped(gateway)


async def test_clients_that_vanish_at_random_moments_leave_nothing_behind(byte_model: Path) -> None:
    with serving(byte_model, *ECHO) as gateway:
        await check(gateway, await crowd(gateway, 200, tokens=40, over_s=1.0, leaving=True), workers=1, permits=PERMITS)
        before = memory_mib(gateway)
        for each in rounds(1):
            count = 1000 if SCALE > 1 else 600
            outcomes = await crowd(gateway, count, tokens=40, over_s=4.0, leaving=True, seed=each)
            await check(gateway, outcomes, workers=1, permits=PERMITS)
        await asyncio.to_thread(check_memory, gateway, before)
        await stopped(gateway)


async def test_of_ten_times_too_many_requests_some_are_refused_and_the_rest_finish(byte_model: Path) -> None:
    with serving(byte_model, *ECHO) as gateway:
        await check(gateway, await crowd(gateway, 200, tokens=20, over_s=1.0), workers=1, permits=PERMITS)
        before = memory_mib(gateway)
        burst = await crowd(gateway, 10 * PERMITS, tokens=20, over_s=0.5)
        assert burst["finished"] >= PERMITS
        lasting = await throng(gateway, 10 * PERMITS, tokens=20, for_s=6 * SCALE)
        for outcomes in (burst, lasting):
            assert outcomes["refused"] > 0
            assert outcomes["finished"] + outcomes["refused"] == outcomes.counts.total(), outcomes.counts
            await check(gateway, outcomes, workers=1, permits=PERMITS)
        await asyncio.to_thread(check_memory, gateway, before)
        await stopped(gateway)


async def test_connections_that_never_say_anything_whole_hold_nobody_up(byte_model: Path) -> None:
    pieces = (
        b"",
        b"POST /gen",
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n\r\n{",
        b"\x16\x03\x01",
    )
    with serving(byte_model, *ECHO) as gateway, contextlib.ExitStack() as stack:
        for number in range(200):
            half = stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), WAIT_S))
            half.sendall(pieces[number % len(pieces)])
        outcomes = await crowd(gateway, 40, tokens=20)
        assert outcomes["finished"] == 40
        stack.close()
        await check(gateway, outcomes, workers=1, permits=PERMITS)
        await stopped(gateway)


async def test_an_engine_killed_while_it_computes_long_prompts_gives_every_page_back() -> None:
    with launched("--max-batch-total-tokens", "8192", "--max-concurrent-requests", "16") as gateway:
        await asyncio.to_thread(gateway.wait_for, "Ready at")
        outcomes = Outcomes()
        prompt = "Tell me a story about a fox and a hen. " * 60
        streams = [
            asyncio.create_task(one_stream(gateway, outcomes, tokens=50, prompt=f"{n} {prompt}")) for n in range(8)
        ]
        await kill_soon(gateway, "engine_process", signal.SIGKILL, 0.5)
        await asyncio.gather(*streams)
        assert outcomes["failed"] + outcomes["refused"] + outcomes["finished"] == 8
        await until_back(gateway, 1)
        await check(gateway, outcomes, workers=1, permits=8)
        outcomes = Outcomes()
        leaving = [one_stream(gateway, outcomes, tokens=200, prompt=prompt, leave_after_s=0.1 * n) for n in range(1, 9)]
        await asyncio.gather(*leaving)
        await check(gateway, outcomes, workers=1, permits=8)
        await stopped(gateway)


async def test_an_engine_whose_files_are_gone_is_given_up_with_its_reason(byte_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    script.write_text('{"scripts": [{"tokens": [7, 8, 9]}]}')
    arguments = ("--backend", "scripted", "--model-id", str(byte_model), "--script", str(script))
    with launched(*arguments) as gateway:
        await asyncio.to_thread(gateway.wait_for, "Ready at")
        gateway.children()
        script.rename(tmp_path / "elsewhere")
        assert (await crowd(gateway, 3, tokens=3))["finished"] == 3
        await kill_soon(gateway, "engine_process", signal.SIGKILL, 0.0)
        assert await asyncio.to_thread(gateway.end) == 1
        assert "engine did not start: script file" in gateway.log
        assert gateway.left_behind() == []


async def stopped(gateway: Gateway) -> None:
    """It ends as told, without a trace."""
    gateway.children()
    gateway.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(gateway.end) == 0, gateway.log
    assert gateway.left_behind() == []
    assert "Traceback" not in gateway.log


JUMPING_CLOCK = """
import time
real, real_ns, began = time.time, time.time_ns, time.monotonic()
def jump():
    half_seconds = int((time.monotonic() - began) * 2)
    return (0, 86_400, -86_400, 3_600)[half_seconds % 4]
time.time = lambda: real() + jump()
time.time_ns = lambda: real_ns() + jump() * 10**9
"""


async def test_a_clock_that_jumps_by_days_changes_nothing(byte_model: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    with serving(byte_model, *ECHO, "--engine-timeout", "20", PYTHONPATH=str(tmp_path)) as gateway:
        outcomes = await crowd(gateway, 40, tokens=60, over_s=2.0)
        assert outcomes["finished"] == 40
        await kill_soon(gateway, "http_process", signal.SIGKILL, 0.0)
        await until_back(gateway, 1)
        outcomes = await crowd(gateway, 40, tokens=60, over_s=2.0)
        assert outcomes["finished"] == 40
        await check(gateway, outcomes, workers=1, permits=PERMITS, lost=True)
        days = {line[:10] for line in gateway.log.splitlines() if line[:2] == "20"}
        assert len(days) > 1, "the clock did jump"
        await stopped(gateway)


async def test_a_model_folder_that_is_swapped_is_used_by_the_next_process(byte_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(byte_model, folder)
    with serving(folder, *ECHO) as gateway:

        async def swap() -> None:
            await asyncio.sleep(0.2)
            folder.rename(tmp_path / "old")
            await asyncio.sleep(0.2)
            shutil.copytree(byte_model, folder)

        outcomes = await crowd(gateway, 40, tokens=40, over_s=0.6, meanwhile=swap)
        assert outcomes["finished"] == 40
        for times, module in enumerate(("engine_process", "http_process"), 1):
            await kill_soon(gateway, module, signal.SIGKILL, 0.0)
            await until_back(gateway, times)
        outcomes = await crowd(gateway, 40, tokens=40)
        assert outcomes["finished"] == 40
        await check(gateway, outcomes, workers=1, permits=PERMITS, lost=True)
        await stopped(gateway)
