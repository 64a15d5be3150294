"""The demo model on a GPU against the CPU engine: greedy tokens in every circumstance; graphs against eager steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tgi_backend_cpu.plugin import create as create_cpu
from tgi_gateway.backend import EngineOptions
from tgi_gateway.hub import demo_model
from tgi_gateway.types import SamplingParams
from tgi_model_server.backend import TorchBackend
from tgi_model_server.testing.client import Client
from tgi_model_server.testing.models import make_request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(300),
]
NEW_TOKENS = 48
LONG = "The mail boat sails from island to island, and on every island somebody waits for a letter. " * 12
TEXTS = [
    "What is the capital of France?",
    "What is 17 plus 25?",
    "Count from 3 to 12.",
    "Tell me a story about a fox.",
    "Hello!",
    LONG + "Who waits?",
    LONG + "What sails?",
    LONG + "Where to?",
    LONG + "Why?",
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(demo_model() / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


def create_cuda(options: EngineOptions) -> TorchBackend:
    from tgi_backend_cuda.plugin import create

    backend = create(options)
    assert isinstance(backend, TorchBackend)
    return backend


async def answers(
    backend: Any, *rounds: Sequence[Sequence[int]], sampling: SamplingParams | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities of each prompt, those of a round at once."""
    client = Client(backend)
    client.info = await backend.start(client.emit)
    tokens: list[list[int]] = []
    scores: list[list[float]] = []
    try:
        number = 0
        for prompts in rounds:
            requests = []
            for prompt in prompts:
                number += 1
                requests.append(
                    make_request(number, prompt, max_new_tokens=NEW_TOKENS, logprobs=True, sampling=sampling)
                )
            tokens += await client.run(*requests)
            scores += [client.scores[request.request_id] for request in requests]
    finally:
        await backend.stop(0.0)
    return tokens, scores


def options(**more: Any) -> EngineOptions:
    return EngineOptions(demo_model(), "demo", max_total_tokens=1024, max_batch_total_tokens=20_000, **more)


async def test_greedy_tokens_in_float32_are_those_of_the_cpu(prompts: list[list[int]]) -> None:
    wanted, scores = await answers(create_cpu(options(dtype="float32")), prompts)
    found, others = await answers(create_cuda(options(dtype="float32")), prompts)
    assert found == wanted
    for one, other in zip(scores, others, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


async def test_alone_or_in_a_batch_cold_or_warm_gives_the_same_tokens_in_float32(prompts: list[list[int]]) -> None:
    together, _ = await answers(create_cuda(options(dtype="float32")), prompts, prompts)
    alone, _ = await answers(create_cuda(options(dtype="float32")), *([prompt] for prompt in prompts))
    assert together == [*alone, *alone]


async def test_graphs_give_what_eager_steps_give(prompts: list[list[int]]) -> None:
    for dtype in ("float32", "bfloat16"):
        graphs, scores = await answers(create_cuda(options(dtype=dtype)), prompts)
        eager, others = await answers(create_cuda(options(dtype=dtype, cuda_graphs=())), prompts)
        if dtype == "float32":
            assert graphs == eager
        agree(graphs, scores, eager, others, 0.1)


async def test_bfloat16_stays_within_the_declared_tolerance_of_float32(prompts: list[list[int]]) -> None:
    wanted, scores = await answers(create_cpu(options(dtype="float32")), prompts)
    found, others = await answers(create_cuda(options(dtype="bfloat16")), prompts)
    agree(found, others, wanted, scores, 0.1)


async def test_draws_are_those_of_the_seed_alone_or_in_a_batch(prompts: list[list[int]]) -> None:
    sampling = SamplingParams(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, seed=7)
    together, _ = await answers(create_cuda(options(dtype="float32")), prompts, sampling=sampling)
    alone, _ = await answers(
        create_cuda(options(dtype="float32")), *([prompt] for prompt in prompts), sampling=sampling
    )
    assert together == alone


def agree(
    tokens: list[list[int]],
    scores: list[list[float]],
    others: list[list[int]],
    other_scores: list[list[float]],
    tolerance: float,
) -> None:
    """As long as the tokens are the same, so are their log-probabilities; and where they part it was a close call."""
    for one, other, one_scores, two_scores in zip(tokens, others, scores, other_scores, strict=True):
        for token, second, score, second_score in zip(one, other, one_scores, two_scores, strict=True):
            assert score == pytest.approx(second_score, abs=tolerance)
            if token != second:
                break
