"""One `tgi-gateway` process: started, waited for, started again when it ends, and stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from tgi_gateway.errors import StartError
from tgi_gateway.launcher.processes import ending
from tgi_gateway.launcher.restarts import Restarts

log = logging.getLogger("ray.serve")

HOST = "127.0.0.1"
READY_POLL_S = 0.2
LAST_BYTES = 4000
"""Of its log that are told when it did not start."""


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
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when it takes requests. Raises `StartError`."""
        process = await self._launch()
        self._keeping = asyncio.create_task(self._keep(process))

    async def stop(self) -> None:
        """Let it finish what it has, then end it."""
        if self._keeping is not None:
            self._keeping.cancel()
        self.url, process = None, self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), self._stop_s)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def _launch(self) -> asyncio.subprocess.Process:
        last, port = bytearray(), _free_port()
        process = self._process = await asyncio.create_subprocess_exec(
            *self._command,
            "--port",
            str(port),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environ,
        )
        self._log = asyncio.create_task(_pass_on(process, last))
        while not await _listens(port):
            if process.returncode is not None:
                await self._log
                told = last.decode(errors="replace")
                raise StartError(f"tgi-gateway {ending(process.returncode)} before it was ready:\n{told}")
            await asyncio.sleep(READY_POLL_S)
        self.url = f"http://{HOST}:{port}"
        return process

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        """Have one for ever, or tell why not."""
        restarts = Restarts()
        loop = asyncio.get_running_loop()
        ready_at: float | None = loop.time()
        while True:
            code = await process.wait()
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
                process = await self._launch()
            except StartError as error:
                log.error("%s", error)
                continue
            ready_at = loop.time()


async def _pass_on(process: asyncio.subprocess.Process, last: bytearray) -> None:
    """Its log becomes part of the replica's own, which Ray collects; `last` holds the end of it."""
    assert process.stdout is not None
    while chunk := await process.stdout.read(1 << 16):
        sys.stdout.write(chunk.decode(errors="replace"))
        sys.stdout.flush()
        last += chunk
        del last[:-LAST_BYTES]


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
