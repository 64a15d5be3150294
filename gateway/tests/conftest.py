"""Fixtures of the HTTP tests: a worker whose engine answers with the prompt's own tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.testing.echo import ECHO_CAPABILITIES, EchoBackend
from tgi_gateway.testing.recorded import HERMES, Recorded
from tgi_gateway.testing.worker import Worker, byte_toy, running_worker, write_byte_model


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-model")
    write_byte_model(folder)
    return folder


@pytest.fixture
async def start_worker(byte_model: Path) -> AsyncGenerator[Callable[..., Any], None]:
    """``await start_worker(backend, max_best_of=3)``; everything ends with the test."""
    async with AsyncExitStack() as stack:

        async def start(backend: EchoBackend | None = None, **settings: Any) -> Worker:
            engine = backend or EchoBackend(byte_toy(), capabilities=ECHO_CAPABILITIES)
            return await stack.enter_async_context(running_worker(engine, byte_model, **settings))

        yield start


@pytest.fixture
async def worker(start_worker: Callable[..., Any]) -> Worker:
    """Echoes: its answer to `abc` is `abcabc...` until `max_new_tokens`."""
    started: Worker = await start_worker()
    return started


@pytest.fixture
async def says(tmp_path: Path) -> AsyncGenerator[Callable[..., Any], None]:
    """``await says("text", template)``: a worker whose model answers so, special tokens by their text."""
    async with AsyncExitStack() as stack:

        async def start(
            text: str, template: str = HERMES, special: tuple[str, ...] = (), grammar: bool = False, **settings: Any
        ) -> Worker:
            write_byte_model(tmp_path, template, special)
            backend = Recorded(list(Tokenizer.from_folder(tmp_path).encode(text, False).ids), grammar=grammar)
            return await stack.enter_async_context(running_worker(backend, tmp_path, **settings))

        yield start


@pytest.fixture
def slow() -> EchoBackend:
    """Hundreds of tokens, a hundredth of a second each: no answer ends within a test."""
    return EchoBackend(byte_toy(max_total_tokens=100_000), step_s=0.01)
