"""Who is inside a worker, and whether more may come: what a drain waits for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from tgi_gateway.errors import Unhealthy


class Doors:
    """Belongs to the event loop."""

    def __init__(self) -> None:
        self._inside = 0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """From now on `enter` refuses; whoever is inside goes on."""
        self._closed = True

    @contextlib.contextmanager
    def stay(self) -> Iterator[None]:
        """Be inside, from the first byte of a request to the last of its answer."""
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    def enter(self) -> None:
        """Raises `Unhealthy` once they are closed."""
        if self._closed:
            raise Unhealthy("The server is stopping; another one will answer")

    async def empty(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False if somebody still is after `timeout_s`."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
