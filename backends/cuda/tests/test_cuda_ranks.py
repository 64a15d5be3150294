"""Tensor parallelism on GPUs: the tokens of one rank, through graphs and prompts, and a clear end when a rank dies."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import StartError
from tgi_gateway.types import Failed, Request, SamplingParams, StopRules
from tgi_model_server.backend import TorchBackend
from tgi_model_server.testing.client import Client
from tgi_model_server.testing.models import SMALL, save_random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
    pytest.mark.timeout(300),
]
MODEL = {
    **SMALL,
    "vocab_size": 515,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"), MODEL)


@asynccontextmanager
async def serving(folder: Path, ranks: int, **options: Any) -> AsyncIterator[Client]:
    from tgi_backend_cuda.device import CudaDevice
    from tgi_backend_cuda.plugin import CAPABILITIES

    backend = TorchBackend(CudaDevice, EngineOptions(folder, "small", num_shard=ranks, **options), CAPABILITIES)
    client = Client(backend)
    client.info = await backend.start(client.emit)
    try:
        yield client
    finally:
        await backend.stop(0.0)


def requests(count: int) -> list[Request]:
    draw = random.Random(count)
    prompts = [tuple(draw.randrange(2, 515) for _ in range(draw.choice([3, 40, 333]))) for _ in range(count)]
    return [Request(n, prompt, SamplingParams(), StopRules(40, ignore_eos=True)) for n, prompt in enumerate(prompts)]


@pytest.mark.parametrize("graphs", [(), None], ids=["eager", "graphs"])
async def test_two_gpus_say_what_one_says(folder: Path, graphs: tuple[int, ...] | None) -> None:
    answers = []
    for ranks in (1, 2):
        async with serving(
            folder, ranks, dtype="float32", max_batch_size=12, max_batch_prefill_tokens=256, cuda_graphs=graphs
        ) as client:
            together = await client.run(*requests(12))
            alone = [await client.run(replace(request, request_id=100 + n)) for n, request in enumerate(requests(2))]
            answers.append((together, alone))
    assert answers[0] == answers[1]


async def test_a_killed_rank_ends_the_engine_in_the_middle_of_an_answer(folder: Path) -> None:
    async with serving(folder, 2, max_batch_size=4) as client:
        losing = asyncio.create_task(client.backend.lost())
        client.backend.submit(Request(1, (5, 6, 7), SamplingParams(), StopRules(1000, ignore_eos=True)))
        await client.until(lambda: len(client.tokens[1]) > 20)
        backend = client.backend
        assert isinstance(backend, TorchBackend)
        followers = backend._followers
        assert followers is not None
        os.kill(followers._followers[0].process.pid, signal.SIGKILL)
        assert "rank 1 of 2 was ended by SIGKILL" in await asyncio.wait_for(losing, 60)
        await client.until(lambda: 1 in client.ends)
        assert isinstance(client.ends[1], Failed)


async def test_more_shards_than_gpus_are_refused_with_how_many_there_are(folder: Path) -> None:
    found = torch.cuda.device_count()
    with pytest.raises(StartError, match=f"--num-shard is {found * 2}, but torch finds {found} GPUs"):
        async with serving(folder, found * 2):
            pass
