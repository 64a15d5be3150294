"""Tensor parallelism on GPUs: the tokens of one rank, through graphs and prompts, and a clear end when a rank dies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_runs import answers, in_a_process, kill_a_rank, serving

from tgi_gateway.errors import StartError
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


@pytest.mark.parametrize("graphs", [(), None], ids=["eager", "graphs"])
def test_two_gpus_say_what_one_says(folder: Path, graphs: tuple[int, ...] | None) -> None:
    one, two = (in_a_process(answers, folder, ranks, graphs) for ranks in (1, 2))
    assert one == two


def test_a_killed_rank_ends_the_engine_in_the_middle_of_an_answer(folder: Path) -> None:
    why, end = in_a_process(kill_a_rank, folder)
    assert "rank 1 of 2 was ended by SIGKILL" in why
    assert end == "Failed"


async def test_more_shards_than_gpus_are_refused_with_how_many_there_are(folder: Path) -> None:
    found = torch.cuda.device_count()
    with pytest.raises(StartError, match=f"--num-shard is {found * 2}, but torch finds {found} GPUs"):
        async with serving(folder, found * 2):
            pass
