"""Client: who submits to a backend in the running event loop, and keeps what it says in order."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Self

from tgi_gateway.backend import ModelInfo
from tgi_gateway.types import Failed, Finished, Request, StepEvents
from tgi_model_server.stepped import SteppedBackend


class Client:
    """A started backend and what it said. Asserts that each request ends once, and has no token afterwards."""

    def __init__(self, backend: SteppedBackend) -> None:
        self.backend = backend
        self.info: ModelInfo
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.scores: dict[int, list[float]] = defaultdict(list)
        self.ends: dict[int, Finished | Failed] = {}
        self.steps: list[StepEvents] = []
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def serving(cls, backend: SteppedBackend) -> AsyncIterator[Self]:
        """`backend` from its start to its stop, and who listens to it."""
        client = cls(backend)
        client.info = await backend.start(client.emit)
        try:
            yield client
        finally:
            await backend.stop(0.0)

    def emit(self, events: StepEvents) -> None:
        self._loop.call_soon_threadsafe(self._take, events)

    def _take(self, events: StepEvents) -> None:
        self.steps.append(events)
        for request_id, token, score in zip(events.request_ids, events.token_ids, events.logprobs, strict=True):
            assert request_id not in self.ends
            self.tokens[request_id].append(token)
            self.scores[request_id].append(score)
        ends: list[Finished | Failed] = [*events.finished, *events.failed]
        for end in ends:
            assert end.request_id not in self.ends
            self.ends[end.request_id] = end
        self._news.set()

    async def until(self, done: Callable[[], bool], timeout_s: float = 60) -> None:
        async with asyncio.timeout(timeout_s):
            while not done():
                self._news.clear()
                await self._news.wait()

    async def run(self, *requests: Request) -> list[list[int]]:
        """Submit all at once; their tokens once all have ended."""
        for request in requests:
            self.backend.submit(request)
        await self.until(lambda: all(request.request_id in self.ends for request in requests))
        return [self.tokens[request.request_id] for request in requests]
