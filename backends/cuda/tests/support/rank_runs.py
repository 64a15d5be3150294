"""Engines of one and of several GPUs, each in a process of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tgi_gateway.backend import EngineOptions
from tgi_gateway.types import Request, SamplingParams, StopRules
from tgi_model_server.backend import TorchBackend
from tgi_model_server.testing.client import Client


def serving(folder: Path, ranks: int, **options: Any) -> AbstractAsyncContextManager[Client]:
    from tgi_backend_cuda.device import CudaDevice
    from tgi_backend_cuda.plugin import CAPABILITIES

    options = {"num_shard": ranks, **options}
    return Client.serving(TorchBackend(CudaDevice, EngineOptions(folder, "small", **options), CAPABILITIES))


def in_a_process(run: Callable[..., Coroutine[Any, Any, Any]], *arguments: object) -> Any:
    """What `run` returns in one of its own, as an engine has: torch counts the meetings of a process, and so ranks of a
    second engine there would wait for each other in vain.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, run, *arguments).result()


def _run(run: Callable[..., Coroutine[Any, Any, Any]], *arguments: object) -> Any:
    return asyncio.run(run(*arguments))


def requests(count: int) -> list[Request]:
    draw = random.Random(count)
    prompts = [tuple(draw.randrange(2, 515) for _ in range(draw.choice([3, 40, 333]))) for _ in range(count)]
    return [Request(n, prompt, SamplingParams(), StopRules(40, ignore_eos=True)) for n, prompt in enumerate(prompts)]


async def answers(folder: Path, ranks: int, graphs: tuple[int, ...] | None) -> tuple[list[list[int]], ...]:
    async with serving(
        folder, ranks, dtype="float32", max_batch_size=12, max_batch_prefill_tokens=256, cuda_graphs=graphs
    ) as client:
        together = await client.run(*requests(12))
        alone = [(await client.run(replace(request, request_id=100 + n)))[0] for n, request in enumerate(requests(2))]
        return together, alone


async def kill_a_rank(folder: Path) -> tuple[str, str]:
    """In the middle of an answer: what ended the engine, and how the answer ended."""
    async with serving(folder, 2, max_batch_size=4) as client:
        losing = asyncio.create_task(client.backend.lost())
        client.backend.submit(Request(1, (5, 6, 7), SamplingParams(), StopRules(1000, ignore_eos=True)))
        await client.until(lambda: len(client.tokens[1]) > 20)
        backend = client.backend
        assert isinstance(backend, TorchBackend)
        followers = backend._followers
        assert followers is not None
        os.kill(followers._followers[0].process.pid, signal.SIGKILL)
        why = await asyncio.wait_for(losing, 60)
        await client.until(lambda: 1 in client.ends)
        return why, type(client.ends[1]).__name__
