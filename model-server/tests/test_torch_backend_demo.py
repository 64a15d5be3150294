"""The demo model through TorchBackend on the CPU, against transformers: greedy, 64 tokens, in every circumstance."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tgi_backend_cpu.plugin import create
from tgi_gateway.backend import EngineOptions
from tgi_gateway.hub import demo_model
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StepEvents, StopRules

NEW_TOKENS = 64
SYSTEM = (
    "You are a helpful assistant on a small ship that carries mail between seven islands. Answer every question in one "
    "or two short sentences, never mention the weather unless somebody asks for it, and greet the captain by name."
)
QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What is 17 plus 25?",
    "What is 9 times 8?",
    "Count from 3 to 12.",
    "Sort these numbers: 9 4 7 1.",
    "Repeat after me: the green boat sails at noon.",
    "Tell me a story about a fox in a forest.",
    "Tell me a story about a sailor on an island.",
    "Hello! Who are you?",
    "Which is larger, 12 or 21?",
    "Say the days of the week.",
    "What color is the sky?",
    "Write the word river backwards.",
    "Thank you!",
    "How many letters has the word lantern?",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo_model()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[tuple[int, ...]]:
    tokenizer: Any = AutoTokenizer
    tokenizer = tokenizer.from_pretrained(folder)
    return [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def answers(folder: Path, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """What transformers generates, past any end of text."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        found.append(tokens[0, len(prompt) :].tolist())
    assert all(len(tokens) == NEW_TOKENS for tokens in found)
    return found


def generate(folder: Path, *rounds: list[tuple[int, ...]], **options: Any) -> tuple[list[list[list[int]]], int, int]:
    """Each round's prompts all at once, greedy; also how many prompt tokens were cached, and the preemptions."""

    async def serve() -> tuple[list[list[list[int]]], int, int]:
        backend = create(EngineOptions(folder, "demo", dtype="float32", **options))
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        tokens: dict[int, list[int]] = defaultdict(list)
        ends: dict[int, Finished | Failed] = {}

        def take(events: StepEvents) -> None:
            for request_id, token in zip(events.request_ids, events.token_ids, strict=True):
                tokens[request_id].append(token)
            ends.update({end.request_id: end for end in events.finished})
            ends.update({end.request_id: end for end in events.failed})
            news.set()

        def emit(events: StepEvents) -> None:
            loop.call_soon_threadsafe(take, events)

        await backend.start(emit)
        answers = []
        request_id = 0
        for prompts in rounds:
            ids = range(request_id, request_id + len(prompts))
            for request_id, prompt in zip(ids, prompts, strict=True):
                backend.submit(Request(request_id, prompt, SamplingParams(), StopRules(NEW_TOKENS, ignore_eos=True)))
            async with asyncio.timeout(90):
                while not all(request_id in ends for request_id in ids):
                    news.clear()
                    await news.wait()
            answers.append([tokens[request_id] for request_id in ids])
            request_id = ids.stop
        preemptions = backend.capacity().preemptions
        await backend.stop(0.0)
        finished = [end for end in ends.values() if isinstance(end, Finished)]
        assert len(finished) == len(ends)
        return answers, sum(end.usage.cached_tokens for end in finished), preemptions

    return asyncio.run(serve())


def test_a_batch_of_one_a_batch_of_sixteen_and_a_warm_cache_agree_with_transformers(
    folder: Path, prompts: list[tuple[int, ...]], answers: list[list[int]]
) -> None:
    (together, again, *alone), cached, _ = generate(
        folder, prompts, prompts, *([prompt] for prompt in prompts[:6]), max_batch_total_tokens=4096
    )
    assert together == answers
    assert again == answers
    assert alone == [[answer] for answer in answers[:6]]
    assert cached > len(prompts) * 32


def test_without_prefix_cache_and_in_small_chunks_agrees_with_transformers(
    folder: Path, prompts: list[tuple[int, ...]], answers: list[list[int]]
) -> None:
    (together,), cached, _ = generate(
        folder, prompts, max_batch_total_tokens=4096, max_batch_prefill_tokens=24, prefix_caching=False
    )
    assert together == answers
    assert cached == 0


def test_forced_preemption_agrees_with_transformers(
    folder: Path, prompts: list[tuple[int, ...]], answers: list[list[int]]
) -> None:
    (together,), _, preemptions = generate(folder, prompts, max_total_tokens=256, max_batch_total_tokens=640)
    assert preemptions > 0
    assert together == answers
