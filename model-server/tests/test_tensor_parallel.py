"""An engine of two ranks in two processes: the tokens of one rank, and a clean end whatever happens to the other."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tgi_gateway.backend import ALL_FEATURES, Capabilities, EngineOptions
from tgi_gateway.errors import StartError, Unhealthy
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StopRules
from tgi_model_server import parallel
from tgi_model_server.backend import TorchBackend
from tgi_model_server.device import Device
from tgi_model_server.engine import load_engine
from tgi_model_server.parallel import Shard
from tgi_model_server.plan import PREVIOUS_TOKEN, StepPlan
from tgi_model_server.plan_wire import PlanDecoder, PlanEncoder
from tgi_model_server.rank_task import RankTask, device_of, name_of, read_plan, write_plan
from tgi_model_server.ranks import Followers
from tgi_model_server.testing.client import Client
from tgi_model_server.testing.devices import (
    BrokenOnRank1,
    DeafOnRank0,
    HotOnRank1,
    ReferenceDevice,
    SmallerOnRank1,
    StaticDevice,
)
from tgi_model_server.testing.models import SMALL, save_random_model

CAPABILITIES = Capabilities(features=ALL_FEATURES - {"grammar", "lora"}, prefix_cache=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"), {**SMALL, "vocab_size": 157})


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Leader(Client):
    """Of an engine of several ranks."""

    @property
    def pids(self) -> list[int]:
        """Of the other ranks."""
        assert isinstance(self.backend, TorchBackend)
        followers = self.backend._followers
        assert followers is not None
        return [follower.process.pid for follower in followers._followers]

    async def unhealthy(self) -> str:
        """What `health` says once it says so."""
        for _ in range(200):
            try:
                await self.backend.health()
            except Unhealthy as error:
                return str(error)
            await asyncio.sleep(0.02)
        raise AssertionError("health does not notice")


@asynccontextmanager
async def serving(folder: Path, device: Callable[[], Device], ranks: int = 2, **options: Any) -> AsyncIterator[Leader]:
    backend = TorchBackend(device, EngineOptions(folder, "small", num_shard=ranks, **options), CAPABILITIES)
    client = Leader(backend)
    client.info = await backend.start(client.emit)
    pids = client.pids if ranks > 1 else []
    try:
        yield client
    finally:
        await backend.stop(0.0)
        assert not any(map(alive, pids))
        assert not dist.is_initialized()


def alive(pid: int) -> bool:
    """Whether it runs; one that nobody has taken note of yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def prompts(count: int, length: int = 40) -> list[tuple[int, ...]]:
    """Two thirds of each prompt are shared with two others."""
    draw = random.Random(count)
    stems = [[draw.randrange(2, 157) for _ in range(2 * length // 3)] for _ in range(count // 3 + 1)]
    return [(*stems[n // 3], *(draw.randrange(2, 157) for _ in range(length - 2 * length // 3))) for n in range(count)]


def greedy(request_id: int, prompt: Sequence[int], new: int = 48, **changes: Any) -> Request:
    return replace(Request(request_id, prompt, SamplingParams(), StopRules(new, ignore_eos=True)), **changes)


@pytest.mark.parametrize("device", [ReferenceDevice, StaticDevice], ids=["depth-1", "static-depth-2"])
async def test_two_ranks_say_what_one_says(folder: Path, device: Callable[[], Device]) -> None:
    asked = [greedy(n, prompt, 36) for n, prompt in enumerate(prompts(6))]
    params = SamplingParams(do_sample=True, temperature=0.9, top_p=0.95, repetition_penalty=1.1)
    drawn = [
        greedy(50 + n, prompt, 16, sampling=replace(params, seed=n), logprobs=True, top_n_tokens=n)
        for n, prompt in enumerate(prompts(4))
    ]
    scored = greedy(70, prompts(1)[0], 2, prefill_logprobs=True, prefill_top_n_tokens=3)
    tokens, scores, others = [], [], []
    for ranks in (1, 2):
        # Prompts come in chunks, and the pool is far too small for all.
        async with serving(
            folder,
            device,
            ranks,
            max_batch_size=6,
            max_total_tokens=96,
            max_batch_total_tokens=240,
            max_batch_prefill_tokens=24,
        ) as client:
            cold = await client.run(*asked)
            assert client.backend.capacity().preemptions > 0
            warm = [await client.run(greedy(100 + n, asked[0].input_ids)) for n in range(2)]
            end = client.ends[101]
            assert isinstance(end, Finished)
            assert end.usage.cached_tokens > 0
            tokens.append([cold, warm, await client.run(*drawn)])
            await client.run(scored)
            told = client.ends[70]
            assert isinstance(told, Finished)
            scores.append([score for request in drawn for score in client.scores[request.request_id]])
            others.append([*told.prefill_logprobs[1:], *(value for top in told.prefill_top for _, value in top)])
            await client.backend.health()
    assert tokens[0] == tokens[1]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    assert others[1] == pytest.approx(others[0], abs=1e-3)


async def test_a_killed_rank_ends_the_engine_and_every_open_request(folder: Path) -> None:
    async with serving(folder, StaticDevice) as client:
        for request_id in range(3):
            client.backend.submit(greedy(request_id, prompts(3)[request_id], 200))
        await client.until(lambda: len(client.tokens[0]) > 2)
        os.kill(client.pids[0], signal.SIGKILL)
        await client.until(lambda: len(client.ends) == 3)
        assert all(isinstance(client.ends[request_id], Failed) for request_id in range(3))
        assert await client.unhealthy() == "the device is lost: rank 1 of 2 was ended by SIGKILL (the system may " + (
            "have run out of memory: see its log)"
        )
        await client.run(greedy(10, prompts(1)[0]))
        assert isinstance(client.ends[10], Failed)


async def test_a_rank_killed_while_idle_is_noticed_without_a_request(folder: Path) -> None:
    async with serving(folder, ReferenceDevice) as client:
        losing = asyncio.create_task(client.backend.lost())
        await client.run(greedy(1, prompts(1)[0], 8))
        assert not losing.done()
        os.kill(client.pids[0], signal.SIGKILL)
        assert "rank 1 of 2 was ended by SIGKILL" in await asyncio.wait_for(losing, 30)


async def test_a_rank_that_breaks_ends_the_engine_with_its_own_words(folder: Path) -> None:
    async with serving(folder, HotOnRank1) as client:
        await client.run(greedy(1, prompts(1)[0], 8))
        assert isinstance(client.ends[1], Finished)
        await client.run(greedy(2, prompts(1)[0], 60))
        assert isinstance(client.ends[2], Failed)
        assert "rank 1 of 2 failed: RuntimeError: the chip is too hot" in await client.unhealthy()


async def test_a_rank_that_hangs_ends_the_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "COLLECTIVE_TIMEOUT_S", 3.0)
    async with serving(folder, ReferenceDevice) as client:
        await client.run(greedy(1, prompts(1)[0], 8))
        os.kill(client.pids[0], signal.SIGSTOP)
        await client.run(greedy(2, prompts(1)[0], 8))
        assert isinstance(client.ends[2], Failed)
        assert "a step broke on one of the 2 ranks" in await client.unhealthy()


async def test_a_device_that_waits_for_ever_in_an_exchange_is_told_to_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_model_server.ranks.STEP_TIMEOUT_S", 1.0)
    monkeypatch.setattr("tgi_model_server.ranks.STEP_POLL_S", 0.1)
    async with serving(folder, DeafOnRank0) as client:
        await client.run(greedy(1, prompts(1)[0], 200))
        assert isinstance(client.ends[1], Failed)
        assert "a step of 2 ranks took more than 1 s" in await client.unhealthy()


async def test_the_smallest_memory_decides_how_many_pages_all_ranks_have(folder: Path) -> None:
    alone = load_engine(ReferenceDevice(), EngineOptions(folder, "small", max_batch_size=64))
    async with serving(folder, SmallerOnRank1, max_batch_size=64) as client:
        assert client.info.max_batch_total_tokens < (alone.num_pages - 1) * alone.page_size == 64 * 256
        await client.run(greedy(1, prompts(1)[0], 4))
        assert isinstance(client.ends[1], Finished)


async def test_a_rank_that_cannot_load_ends_the_start(folder: Path) -> None:
    with pytest.raises(StartError, match="rank 1 of 2 failed: RuntimeError: no memory was found"):
        async with serving(folder, BrokenOnRank1):
            pass
    assert not dist.is_initialized()


async def test_a_device_without_a_name_cannot_have_several_ranks(folder: Path) -> None:
    with pytest.raises(StartError, match=r"can be imported by name, which .*<lambda> cannot"):
        async with serving(folder, lambda: ReferenceDevice()):
            pass


async def test_a_process_runs_one_engine_of_several_ranks_at_a_time(folder: Path) -> None:
    async with serving(folder, ReferenceDevice) as client:
        with pytest.raises(StartError, match="it can run only one"):
            async with serving(folder, ReferenceDevice):
                pass
        await client.run(greedy(1, prompts(1)[0], 4))
        assert isinstance(client.ends[1], Finished)


def test_a_rank_that_ends_before_it_is_ready_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    followers = Followers(ReferenceDevice, EngineOptions(folder, "small", num_shard=2))
    try:
        with pytest.raises(StartError, match="rank 1 of 2 ended with code 1"):
            followers.meet(ReferenceDevice(), Shard(0, 2))
    finally:
        followers.end()


def test_ranks_do_not_outlive_a_killed_rank_0(folder: Path) -> None:
    script = f"""
import pathlib, time
from tgi_gateway.backend import EngineOptions
from tgi_model_server.ranks import Followers
from tgi_model_server.testing.devices import ReferenceDevice
followers = Followers(ReferenceDevice, EngineOptions(pathlib.Path({str(folder)!r}), "small", num_shard=2))
print(followers._followers[0].process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        pid = int(leader.stdout.readline())
        assert alive(pid)
        leader.kill()
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_plans_and_tasks_arrive_as_they_were_sent(folder: Path) -> None:
    plan = StepPlan([3, 1], [1, 2], [9, 4], [[5, 6], (7, 8)], [PREVIOUS_TOKEN, 4, 156], [0], [False], [7], {1: [2, 3]})
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    large = StepPlan(token_ids=list(range(100_000)))

    def read() -> None:
        with os.fdopen(reading, "rb") as plans:
            while (got := read_plan(plans)) is not None:
                received.append(decoder.decode(got))

    encoder, decoder = PlanEncoder(), PlanDecoder()
    received: list[StepPlan] = []
    reader = threading.Thread(target=read)
    reader.start()
    write_plan([writing], encoder.encode(plan), 30.0)
    write_plan([writing], encoder.encode(large), 30.0)
    os.close(writing)
    reader.join()
    assert received == [replace(plan, pages=[[5, 6], [7, 8]]), large]
    options = EngineOptions(folder, "small", num_shard=2, extra={"mine": 3}, cuda_graphs=(1, 2))
    task = RankTask(Shard(1, 2), name_of(ReferenceDevice), options, 1234, 5, 6, "info")
    assert RankTask.decode(task.encode()) == task
    assert isinstance(device_of(task.device), ReferenceDevice)


def test_a_rank_that_takes_no_plan_is_an_error_in_time() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(TimeoutError, match="took no plan"):
        write_plan([writing], bytes(300_000), 0.05)
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        write_plan([writing], b"plan", 0.05)
    os.close(writing)
