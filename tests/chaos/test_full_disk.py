"""A disk that is full: a download says so and goes on later, and a server that already runs does not need it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from chaos import SCALE, check, crowd
from fake_hub import WEIGHTS, download, fake_hub, folder_of
from launched import WAIT_S, Gateway, launched, serving
from small_disk import small_disk

PERMITS = 48
ECHO = ("--echo-step-ms", "10", "--max-batch-size", "8", "--max-concurrent-requests", str(PERMITS))
BIG = WEIGHTS * 24
"""25 MB: the hub's library writes in pieces of 10 MB."""

pytestmark = pytest.mark.timeout(120 + 60 * SCALE)


def test_a_disk_that_fills_during_a_download_is_told_and_nothing_half_is_taken_for_a_model(tmp_path: Path) -> None:
    with fake_hub() as hub, small_disk(tmp_path, 40) as disk:
        hub.files["model.safetensors"] = BIG
        hub.pause_at, hub.meanwhile = 15_000_000, disk.fill
        full = download(hub, disk.path)
        assert full.returncode == 1
        assert f"cannot write the download to {disk.path}/hub: No space left on device" in full.stderr
        assert "--huggingface-hub-cache" in full.stderr
        assert "Traceback" not in full.stderr
        assert hub.fetched.count("model.safetensors") == 1, "trying again at once makes no room"

        offline = download(hub, disk.path, HF_HUB_OFFLINE="1")
        assert offline.returncode == 1
        assert "is not, or not completely, in" in offline.stderr

        still = download(hub, disk.path)
        assert still.returncode == 1
        assert "Make room" in still.stderr
        assert hub.fetched.count("model.safetensors") == 1, "what cannot fit is not begun"

        disk.make_room()
        folder = disk.path / folder_of(download(hub, disk.path)).relative_to(tmp_path)
        assert same((folder / "model.safetensors").read_bytes(), BIG)
        assert list(disk.path.rglob("*.incomplete")) == []


def test_a_file_that_may_not_grow_further_is_told_at_once(tmp_path: Path) -> None:
    """As on file systems with a largest size of a file, and with quotas."""
    with fake_hub() as hub:
        hub.files["model.safetensors"] = BIG
        result = download(hub, tmp_path, file_limit=1 << 20)
        assert result.returncode == 1
        assert f"cannot write the download to {tmp_path}/hub: File too large" in result.stderr
        assert hub.fetched.count("model.safetensors") == 1
        assert download(hub, tmp_path, HF_HUB_OFFLINE="1").returncode == 1
        folder = folder_of(download(hub, tmp_path))
        assert same((folder / "model.safetensors").read_bytes(), BIG)


async def test_a_server_whose_temporary_files_have_no_room_left_serves_on_and_restarts(
    byte_model: Path, tmp_path: Path
) -> None:
    with (
        small_disk(tmp_path, 4) as disk,
        serving(byte_model, *ECHO, "--http-workers", "2", "--shard-uds-path", str(disk.path)) as gateway,
    ):
        disk.fill()
        outcomes = await crowd(gateway, 40, tokens=20)
        assert outcomes["finished"] == 40
        for times, module in enumerate(("engine_process", "http_process"), 1):
            os.kill(gateway.children()[module], signal.SIGKILL)
            await asyncio.to_thread(gateway.wait_for, "is back after", times)
            await asyncio.to_thread(until_ready, gateway)
            outcomes = await crowd(gateway, 40, tokens=20)
            # A worker may not have met the new engine yet.
            assert outcomes["finished"] + outcomes["refused"] == 40
        await check(gateway, outcomes, workers=2, permits=PERMITS, lost=True)
        gateway.children()
        gateway.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(gateway.end) == 0
        assert [path.name for path in disk.path.iterdir()] == ["filler"]
        assert "SIGBUS" not in gateway.log


def test_without_room_for_its_own_files_a_server_does_not_start_and_says_why(byte_model: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path, 1) as disk:
        arguments = ("--backend", "echo", "--model-id", str(byte_model), "--shard-uds-path", str(disk.path))
        with launched(*arguments) as gateway:
            assert gateway.end() == 1
            assert "cannot reserve room for the metrics" in gateway.log
            assert "--shard-uds-path" in gateway.log
            assert "Traceback" not in gateway.log
            assert list(disk.path.iterdir()) == []


async def test_a_log_on_a_full_disk_costs_no_answer(byte_model: Path) -> None:
    arguments = ("--backend", "echo", "--model-id", str(byte_model), *ECHO)
    with launched(*arguments, out=Path("/dev/full")) as gateway:
        await asyncio.to_thread(until_ready, gateway)
        outcomes = await crowd(gateway, 40, tokens=20)
        assert outcomes["finished"] == 40
        gateway.children()
        gateway.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(gateway.end) == 0
        assert gateway.left_behind() == []


def same(one: bytes, other: bytes) -> bool:
    """Not `==` in an assertion, which would compare millions of bytes in words."""
    return one == other


def until_ready(gateway: Gateway) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        assert gateway.process.poll() is None, f"ended with {gateway.process.returncode}"
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{gateway.url}/health/ready", timeout=WAIT_S)
            if answer.status_code == 200:
                return
            assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
