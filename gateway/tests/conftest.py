"""A running HTTP worker without a model: real application, real engine contract, one token per byte of text."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tgi_gateway.api.app import create_app
from tgi_gateway.api.generation import Generation, Generations
from tgi_gateway.api.serving import Services
from tgi_gateway.backend import ModelInfo
from tgi_gateway.prompt.chat_template import ChatTemplate
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.settings import Settings
from tgi_gateway.testing.echo import ECHO_CAPABILITIES, EchoBackend, toy_model

BOS, EOS, BYTES = 0, 1, 2
"""Token ids: two special ones, then one per byte value."""
VOCAB_SIZE = BYTES + 256
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
ALL_FEATURES = replace(ECHO_CAPABILITIES, features=ECHO_CAPABILITIES.features | {"logit_bias", "typical_p"})


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer makes one token of each byte."""
    folder = tmp_path_factory.mktemp("byte-model")
    vocabulary = {"<s>": BOS, "</s>": EOS}
    vocabulary |= {char: BYTES + place for place, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Tally:
    """Request metrics as plain lists."""

    requests: int = 0
    successes: list[Generation] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def count(self) -> None:
        self.requests += 1

    def success(self, generation: Generation, arrived_at: float) -> None:
        assert generation.ended_at >= arrived_at
        self.successes.append(generation)

    def failure(self, err: str) -> None:
        self.failures.append(err)

    def exposition(self) -> tuple[bytes, str]:
        return f"tgi_request_count {self.requests}\n".encode(), "text/plain; version=0.0.4"


@dataclass
class Worker:
    """A worker and a client of it."""

    services: Services
    backend: EchoBackend
    client: httpx.AsyncClient
    metrics: Tally

    async def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return (
            await self.client.post(path, json=body, **more)
            if body is not None
            else await self.client.post(path, **more)
        )

    async def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream that begins well; `[DONE]` as it is."""
        response = await self.post(path, body)
        assert response.status_code == 200, response.text
        return parse_events(response.text)


def parse_events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    lines = text[:-2].split("\n\n")
    assert all(line.startswith("data: ") for line in lines), lines
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


StartWorker = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def start(byte_model: Path) -> AsyncGenerator[StartWorker, None]:
    """Start a worker: ``await start(backend=..., max_best_of=3)``; stopped at the end of the test."""
    async with AsyncExitStack() as stack:

        async def begin(backend: EchoBackend | None = None, **settings: Any) -> Worker:
            import asyncio

            engine = backend or EchoBackend(byte_toy(), capabilities=ALL_FEATURES)
            generations = Generations(engine)
            generations.bind(asyncio.get_running_loop())
            info = await engine.start(generations.emit)
            stack.push_async_callback(engine.stop, 0.0)
            tokenizer = Tokenizer.from_folder(byte_model)
            stack.callback(tokenizer.close)
            metrics = Tally()
            services = Services(
                settings=Settings(**settings),
                info=info,
                backend=engine,
                generations=generations,
                tokenizer=tokenizer,
                chat_template=ChatTemplate.from_folder(byte_model),
                metrics=metrics,
            )
            transport = httpx.ASGITransport(create_app(services))
            client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://worker"))
            return Worker(services, engine, client, metrics)

        yield begin


def byte_toy(**changes: Any) -> ModelInfo:
    return toy_model(**{"vocab_size": VOCAB_SIZE, "eos_token_ids": (EOS,), "max_total_tokens": 512, **changes})


@pytest.fixture
async def worker(start: StartWorker) -> Worker:
    """A worker that answers with the prompt, over and over."""
    return await start()
