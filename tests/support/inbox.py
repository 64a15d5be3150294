"""A Backend in this event loop, and what it emits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tgi_gateway.backend import Backend
from tgi_gateway.types import Event, Failed, Finished, StepEvents, Token


class Inbox:
    """Keeps every event and lets a test wait for endings."""

    def __init__(self) -> None:
        self.steps: list[StepEvents] = []
        self.events: list[Event] = []
        self._changed = asyncio.Event()

    def emit(self, step: StepEvents) -> None:
        self.steps.append(step)
        self.events.extend(step.events())
        self._changed.set()

    async def ending(self, request_id: int) -> Finished | Failed:
        async with asyncio.timeout(10):
            while True:
                for event in self.events:
                    if isinstance(event, (Finished, Failed)) and event.request_id == request_id:
                        return event
                self._changed.clear()
                await self._changed.wait()

    def tokens(self, request_id: int) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, Token) and event.request_id == request_id]


@asynccontextmanager
async def running(backend: Backend) -> AsyncIterator[Inbox]:
    inbox = Inbox()
    await backend.start(inbox.emit)
    try:
        yield inbox
    finally:
        await backend.stop(0.0)
