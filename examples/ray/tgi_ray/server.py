"""One `tgi-gateway` process: started, waited for, started again when it ends, and stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence

from tgi_gateway.errors import StartError
from tgi_gateway.launcher.processes import ending
from tgi_gateway.launcher.restarts import Restarts

log = logging.getLogger("ray.serve")

HOST = "127.0.0.1"
READY_POLL_S = 0.2
LAST_LINES = 20
"""Of its log, when it did not start."""


class Server:
    """`url` is where it listens; None while nobody does. `failure` is why nobody ever will."""

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str], stop_s: float) -> None:
        """`stop_s`: how long it may take to stop before it is killed."""
        self.url: str | None = None
        self.failure: str | None = None
        gateway = [sys.executable, "-m", "tgi_gateway", *arguments, "--hostname", HOST]
        self._command = [sys.executable, "-m", "tgi_ray.tied", str(os.getpid()), *gateway]
        # Ray's own wish for the threads of an actor would bind the engine to them.
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self._environ = {**inherited, **variables}
        self._stop_s = stop_s
        self._process: asyncio.subprocess.Process
        self._log: asyncio.Task[None]
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when it takes requests. Raises `StartError`."""
        await self._launch()
        self._keeping = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Let it finish what it has, then end it."""
        if self._keeping is not None:
            self._keeping.cancel()
        self.url = None
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), self._stop_s)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def _launch(self) -> None:
        last: deque[str] = deque(maxlen=LAST_LINES)
        port = _free_port()
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            "--port",
            str(port),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environ,
            limit=1 << 20,
        )
        self._log = asyncio.create_task(_pass_on(self._process, last))
        while not await _listens(port):
            if self._process.returncode is not None:
                await self._log
                code = self._process.returncode
                raise StartError(f"tgi-gateway {ending(code)} before it was ready:\n" + "\n".join(last))
            await asyncio.sleep(READY_POLL_S)
        self.url = f"http://{HOST}:{port}"

    async def _keep(self) -> None:
        """Have one for ever, or tell why not."""
        restarts = Restarts()
        loop = asyncio.get_running_loop()
        ready_at: float | None = loop.time()
        while True:
            code = await self._process.wait()
            self.url = None
            why = f"tgi-gateway {ending(code)}"
            delay_s = restarts.delay_s(None if ready_at is None else loop.time() - ready_at)
            if delay_s is None:
                self.failure = why
                return
            log.error("%s; starting it again in %g s", why, delay_s)
            await asyncio.sleep(delay_s)
            ready_at = None
            try:
                await self._launch()
            except StartError as error:
                log.error("%s", error)
                continue
            ready_at = loop.time()


async def _pass_on(process: asyncio.subprocess.Process, last: deque[str]) -> None:
    """Its log becomes part of the replica's own, which Ray collects."""
    assert process.stdout is not None
    while line := await process.stdout.readline():
        text = line.decode(errors="replace").rstrip()
        print(text, flush=True)
        last.append(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


async def _listens(port: int) -> bool:
    """tgi-gateway listens once its model is loaded and warm, whatever it logs and whoever may ask."""
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    return True
