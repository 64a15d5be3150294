"""An HTTP worker: uvicorn on the shared listening socket, the engine behind a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from tgi_gateway.api.app import create_app
from tgi_gateway.api.generation import Generations
from tgi_gateway.api.serving import Services
from tgi_gateway.launcher import child
from tgi_gateway.prompt.chat_template import ChatTemplate
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.telemetry.metrics import Metrics, RequestMetrics
from tgi_gateway.wire.client import RemoteBackend

KEEP_ALIVE_S = 75
"""Longer than the 60 s of common proxies, so that they hang up first and no request meets a closing connection."""


class _Server(uvicorn.Server):
    """Tells when it accepts connections; leaves signals to us."""

    def __init__(self, config: uvicorn.Config, reporter: child.Reporter) -> None:
        super().__init__(config)
        self._reporter = reporter

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._reporter.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        yield

    def _stop(self) -> None:
        self.should_exit = True


async def main(assignment: child.Assignment, reporter: child.Reporter) -> None:
    settings = assignment.settings
    folder = Path(assignment.model_path)
    tokenizer = Tokenizer.from_folder(folder, settings.tokenizer_config_path, settings.validation_workers)
    chat_template = ChatTemplate.from_folder(folder, settings.tokenizer_config_path)
    # However long the model takes: the launcher ends this process if the engine fails.
    await _until(Path(assignment.socket_path).is_socket)
    backend = RemoteBackend(Path(assignment.socket_path), worker=assignment.worker)
    generations = Generations(backend, worker=assignment.worker)
    generations.bind(asyncio.get_running_loop())
    info = await backend.start(generations.emit)
    app = create_app(
        Services(
            settings=settings,
            info=info,
            backend=backend,
            generations=generations,
            tokenizer=tokenizer,
            chat_template=chat_template,
            metrics=RequestMetrics(
                Metrics(), max_input_tokens=info.max_input_tokens, max_total_tokens=info.max_total_tokens
            ),
        )
    )
    config = uvicorn.Config(
        app,
        loop="none",
        http="httptools",
        lifespan="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks for the client's address
        backlog=2048,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.graceful_termination_timeout,
    )
    listening = socket.socket(fileno=assignment.listen_fd)
    await _Server(config, reporter).serve(sockets=[listening])
    await backend.stop(0)


async def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 - what is awaited happens in another process
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    sys.exit(child.run(main))
