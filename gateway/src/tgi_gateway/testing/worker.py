"""An HTTP worker without a model, in this process: the real application on any Backend, one token per byte of text.

For tests; needs httpx.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers

from tgi_gateway.api.app import create_app
from tgi_gateway.api.generation import Generations
from tgi_gateway.api.serving import Services
from tgi_gateway.backend import Backend, ModelInfo
from tgi_gateway.keys import Keys
from tgi_gateway.prompt.chat_template import ChatTemplate
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.settings import Settings
from tgi_gateway.telemetry.metrics import Metrics, RequestMetrics
from tgi_gateway.testing.echo import toy_model

if TYPE_CHECKING:
    import httpx

BOS, EOS, FIRST_BYTE = 0, 1, 2
"""Token ids: two special ones, then one per byte."""
VOCAB_SIZE = FIRST_BYTE + 256
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def write_byte_model(folder: Path, template: str = TEMPLATE, more_special: Sequence[str] = ()) -> None:
    """A model folder whose tokenizer makes one token of each byte. `more_special` tokens come after those."""
    vocabulary = {"<s>": BOS, "</s>": EOS}
    vocabulary |= {char: FIRST_BYTE + at for at, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>", *more_special])
    inner.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def byte_toy(**changes: Any) -> ModelInfo:
    """A ModelInfo that fits the byte model; at most 512 tokens."""
    return toy_model(**{"vocab_size": VOCAB_SIZE, "eos_token_ids": (EOS,), "max_total_tokens": 512, **changes})


@dataclass
class Worker:
    """The worker and a client of it."""

    services: Services
    app: FastAPI
    client: httpx.AsyncClient

    async def post(self, path: str, body: object) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def answer(self, path: str, body: object) -> Any:
        """The JSON document of a successful answer."""
        response = await self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    async def error(self, path: str, body: object, status: int | None = None) -> str:
        """What is wrong, as the client is told; `status` None: whatever says that the client is."""
        response = await self.post(path, body)
        assert response.status_code in ((400, 422) if status is None else (status,)), response.text
        return error_text(response.json())

    async def events(self, path: str, body: object) -> list[Any]:
        """The events of a stream that begins well."""
        response = await self.post(path, body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream"
        return parse_events(response.text)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, at most 10 s."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen in 10 s")


def error_text(document: Any) -> str:
    """The message of an error document, TGI's or OpenAI's."""
    told = document["error"]
    return str(told["message"] if isinstance(told, dict) else told)


def parse_events(text: str) -> list[Any]:
    """The documents of a stream; ``[DONE]`` as that string."""
    assert text.endswith("\n\n"), text
    lines = text[:-2].split("\n\n")
    assert all(line.startswith("data: ") for line in lines), lines
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def parse_named_events(text: str) -> list[Any]:
    """The documents of a stream whose events have names."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        events.append(document)
    return events


@asynccontextmanager
async def running_worker(backend: Backend, folder: Path, **settings: Any) -> AsyncGenerator[Worker, None]:
    """Start `backend` and an HTTP worker that calls it directly. `settings` are fields of `Settings`."""
    import httpx

    generations = Generations(backend)
    generations.bind(asyncio.get_running_loop())
    info = await backend.start(generations.emit)
    tokenizer = Tokenizer.from_folder(folder)
    chosen = Settings(**settings)
    services = Services(
        settings=chosen,
        keys=Keys.of(chosen),
        info=info,
        backend=backend,
        generations=generations,
        tokenizer=tokenizer,
        chat_template=ChatTemplate.from_folder(folder),
        metrics=RequestMetrics(
            Metrics(), max_input_tokens=info.max_input_tokens, max_total_tokens=info.max_total_tokens
        ),
    )
    app = create_app(services)
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=30) as client:
            yield Worker(services, app, client)
    finally:
        await backend.stop(0.0)
        tokenizer.close()
