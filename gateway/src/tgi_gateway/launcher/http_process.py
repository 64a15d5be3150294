"""An HTTP worker: uvicorn on the shared listening socket, the engine behind a Unix socket; drains when told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tgi_gateway.api.app import create_app
from tgi_gateway.api.generation import Generations
from tgi_gateway.api.serving import Services
from tgi_gateway.api.sse import SLOWNESS, Slowness
from tgi_gateway.backend import ModelInfo
from tgi_gateway.errors import Unhealthy
from tgi_gateway.keys import Keys
from tgi_gateway.launcher import child
from tgi_gateway.prompt.chat_template import ChatTemplate
from tgi_gateway.prompt.piece_shares import PieceShares
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.telemetry.metrics import Metrics, RequestMetrics
from tgi_gateway.telemetry.tracing import Tracing
from tgi_gateway.wire.client import RemoteBackend

LAST_WORDS_S = 2.0
"""For answers that the end of the drain cuts short: how long clients get to read that it did."""
TICK_S = 1.0
KEEP_ALIVE_S = 75
"""Longer than the 60 s of common proxies, so that they hang up first and no request meets a closing connection."""


def _protocol(limit_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which tells a stream how to get rid of a client that does not read."""

    class Protocol(HttpToolsProtocol):
        def on_message_begin(self) -> None:
            super().on_message_begin()
            scope = cast(MutableMapping[str, Any], self.scope)
            scope[SLOWNESS] = Slowness(limit_s, self.transport.abort)

    return Protocol


class _Server(uvicorn.Server):
    """Tells when it accepts connections; at SIGTERM it goes on until nobody is inside, or the time is over."""

    def __init__(self, config: uvicorn.Config, reporter: child.Reporter, services: Services) -> None:
        super().__init__(config)
        self._reporter = reporter
        self._services = services
        self._draining: asyncio.Task[None] | None = None
        self._done = asyncio.Event()

    async def main_loop(self) -> None:
        """uvicorn's, which wakes ten times a second, for a date that changes once."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._done.wait(), TICK_S)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._reporter.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        yield

    def _stop(self) -> None:
        self._draining = self._draining or asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """The port stays open meanwhile: probes read that this server is not ready, clients that another one is."""
        services = self._services
        services.doors.close()
        if not await services.doors.empty(services.settings.shutdown_timeout):
            services.generations.close(Unhealthy("The server stopped before the answer was complete; try again"))
            await services.doors.empty(LAST_WORDS_S)
        self.should_exit = True
        self._done.set()


async def main(assignment: child.Assignment, reporter: child.Reporter) -> None:
    settings = assignment.settings
    folder = Path(assignment.tokenizer_path)
    keys = Keys(assignment.keys) if assignment.keys else None

    def obey(order: child.Order) -> None:
        if keys is not None:
            keys.replace(order.keys)

    reporter.obey(obey)
    workers = settings.http_workers or 1
    shares = PieceShares(Path(assignment.runtime_folder), assignment.worker, workers) if workers > 1 else None
    tokenizer = Tokenizer.from_folder(folder, settings.tokenizer_config_path, settings.validation_workers, shares)
    chat_template = ChatTemplate.from_folder(folder, settings.tokenizer_config_path)
    # However long the model takes: the launcher ends this process if the engine fails.
    await _until(Path(assignment.socket_path).is_socket)
    services: Services | None = None  # the engine may go away before the rest is made

    def lost(_why: str) -> None:
        if services is not None:
            services.metrics.engine(up=False)

    def attached(info: ModelInfo) -> None:
        if services is not None:
            services.serve(info)
            services.metrics.engine(up=True)

    backend = RemoteBackend(
        Path(assignment.socket_path),
        worker=assignment.worker,
        connect_timeout_s=None,
        on_lost=lost,
    )
    generations = Generations(backend, worker=assignment.worker, restarts=assignment.restarts)
    generations.bind(asyncio.get_running_loop())
    info = await backend.start(generations.emit)
    services = Services(
        settings=settings,
        info=info,
        backend=backend,
        generations=generations,
        tokenizer=tokenizer,
        chat_template=chat_template,
        metrics=RequestMetrics(
            Metrics(assignment.process),
            max_input_tokens=info.max_input_tokens,
            max_total_tokens=info.max_total_tokens,
            restarted=assignment.restarts > 0,
        ),
        keys=keys,
        reachable=lambda: backend.attached,
        tracing=Tracing.of(settings, assignment.process),
    )
    backend.when_attached(attached)
    config = uvicorn.Config(
        create_app(services),
        loop="none",
        http=_protocol(settings.slow_client_timeout),
        lifespan="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks for the client's address
        backlog=2048,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(LAST_WORDS_S),  # for connections; requests were waited for before
    )
    listening = socket.socket(fileno=assignment.listen_fd)
    await _Server(config, reporter, services).serve(sockets=[listening])
    await backend.stop(0)
    if services.tracing is not None:
        await asyncio.to_thread(services.tracing.flush)


async def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 - what is awaited happens in another process
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    sys.exit(child.run(main))
