"""The launcher: starts the engine host and the HTTP workers, replaces those that end, and stops all in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from tgi_gateway import hub, plugins
from tgi_gateway.backend import ModelFiles
from tgi_gateway.cores import logical_cores
from tgi_gateway.errors import PluginError, SettingsError, StartError
from tgi_gateway.keys import KeyFile, Keys
from tgi_gateway.launcher import processes, runtime
from tgi_gateway.launcher.child import Assignment, Order
from tgi_gateway.launcher.display import Display
from tgi_gateway.launcher.processes import Child
from tgi_gateway.launcher.restarts import Restarts
from tgi_gateway.launcher.runtime import RuntimeFolder
from tgi_gateway.settings import SECRET_VARIABLES, Settings
from tgi_gateway.telemetry import files, logs, tracing

logger = logging.getLogger(__name__)

STILL_WAITING_S = 10.0
AFTER_FAILURE_S = 5.0
"""How long HTTP workers get to tell their clients that the engine is gone."""
KEYS_POLL_S = 1.0
"""How often the file of API keys is looked at."""
MARGIN_S = 5.0
"""What an orderly end may take beyond the time that requests get."""


class _Stop(Exception):
    """A signal asked for the end before the server was up."""


@dataclass(eq=False, slots=True)
class _Place:
    """What the server must always have one of: the process that is there now, and how to get another."""

    name: str
    start: Callable[[int], Awaitable[Child]]
    """Of the number of restarts so far."""
    child: Child
    lasting: bool
    """Whether an end is mended by a restart, and not the end of the server."""
    beats_within_s: float = 0.0
    """It counts as dead when it makes no progress for so long; 0: it promises no beats."""
    restarts: Restarts = field(default_factory=Restarts)


def serve(settings: Settings, environ: Mapping[str, str] | None = None) -> int:
    """Run the server until it is told to stop or a process dies; returns the exit code."""
    log = logs.configure(settings.log_level, json_output=settings.json_output)
    supervisor = Supervisor(settings.resolved(), log, os.environ if environ is None else environ)
    try:
        return asyncio.run(supervisor.run())
    except StartError as error:
        logger.error("%s", error)
        return error.exit_code


@dataclass(eq=False)
class Supervisor:
    """One server. `run` is called once."""

    settings: Settings
    log: logs.Log
    environ: Mapping[str, str]
    _signals: list[int] = field(default_factory=list)
    _signalled: asyncio.Event = field(default_factory=asyncio.Event)
    _children: list[Child] = field(default_factory=list)
    _display: Display | None = None
    _phase: str = ""
    _keys: tuple[str, ...] = ()
    """The API keys that are accepted now, see `Keys.hashed`."""
    _key_file: KeyFile | None = None

    async def run(self) -> int:
        """Raises `StartError`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._on_signal, number)
        try:
            return await self._run()
        except _Stop:
            return 128 + self._signals[0]
        finally:
            # Whatever happened: nothing that was started here survives it.
            for child in self._children:
                child.kill()
            if self._children:
                await asyncio.wait([child.exit for child in self._children])

    async def _run(self) -> int:
        began = time.monotonic()
        self._tell_settings()
        tracing.check(self.settings)
        _check_plugin(self.settings.backend)
        if self.settings.api_keys_file is not None:
            self._key_file = KeyFile(Path(self.settings.api_keys_file))
        self._keys = self._accepted()  # a file that cannot be read is told before a model loads
        with (
            contextlib.closing(runtime.bind(self.settings.hostname, self.settings.port)) as taken,
            runtime.runtime_folder(self.settings.shard_uds_path) as folder,
        ):
            with Display(self.log, json_output=self.settings.json_output) as self._display:
                model = await self._model(folder)
                engine = await self._engine(folder, model)
                # Already now: they load while the engine does, and a broken tokenizer is told before the model is in.
                count = self.settings.http_workers
                assert count is not None, "the settings are resolved"
                workers = [await self._worker(worker, folder, model, taken) for worker in range(count)]
                await self._ready(engine.child)
                runtime.listen(taken, dead_after_s=self.settings.slow_client_timeout)
                for worker in workers:
                    await self._ready(worker.child)
            self._display = None
            hostname, port = taken.getsockname()[:2]
            shown = f"[{hostname}]" if ":" in hostname else hostname
            logger.info("Ready at http://%s:%d after %.1f s", shown, port, time.monotonic() - began)
            return await self._watch(engine, workers, folder, taken)

    # Start.

    def _tell_settings(self) -> None:
        for warning in self.settings.warnings():
            logger.warning("%s", warning)
        logger.info("Settings", extra=logs.fields(version=version("tgi-gateway"), **self.settings.public()))
        if self.settings.env:
            logger.info("Environment", extra=logs.fields(**_environment()))

    async def _model(self, folder: RuntimeFolder) -> ModelFiles:
        """The model's local files; downloads and prepares them in a process of its own if need be."""
        plugin = plugins.load(self.settings.backend)
        if plugin.prepare is None and not hub.needs_download(self.settings):
            path = hub.resolve(self.settings, needs=hub.Needs.of(plugin, self.settings.extra))
            files = ModelFiles(path, path)
        else:
            # The only child that may know the hub's token.
            child = await self._start("tgi_gateway.launcher.model_process", self._assignment("model", folder))
            files = msgspec.json.decode(
                await self._ready(child), type=ModelFiles, dec_hook=lambda kind, text: kind(text)
            )
            await child.exit
            self._children.remove(child)
        if self.settings.load_format == "dummy" and not (files.tokenizer / "tokenizer.json").is_file():
            from tgi_gateway.prompt.stand_in import write_stand_in  # here: nobody else needs the text side

            files = ModelFiles(files.model, folder.path / "tokenizer")
            write_stand_in(files.tokenizer, files.model)
            logger.warning("%s has no tokenizer.json: each byte of a text is a token", files.model)
        if self.settings.model_id is None:
            self.settings = replace(self.settings, model_id=hub.DEMO_MODEL_ID)
        return files

    async def _engine(self, folder: RuntimeFolder, model: ModelFiles) -> _Place:
        assignment = replace(
            self._assignment("engine", folder),
            settings=self.settings.without_secrets(),
            model_path=str(model.model),
            tokenizer_path=str(model.tokenizer),
        )

        def start(restarts: int) -> Awaitable[Child]:
            return self._start("tgi_gateway.launcher.engine_process", replace(assignment, restarts=restarts))

        folder.reserve(assignment.process)
        lasting, beats_within_s = self.settings.restart_engine, self.settings.engine_timeout
        return _Place(assignment.process, start, await start(0), lasting, beats_within_s)

    async def _worker(self, worker: int, folder: RuntimeFolder, model: ModelFiles, taken: socket.socket) -> _Place:
        assignment = replace(
            self._assignment(f"http-{worker}", folder),
            settings=self.settings.without_secrets(),
            model_path=str(model.model),
            tokenizer_path=str(model.tokenizer),
            worker=worker,
            listen_fd=taken.fileno(),
        )
        # A worker's own threads are few and short; the cores belong to the engine. A long prompt that nobody has sent
        # before is tokenized by all of the second kind together.
        share = logical_cores() // (self.settings.http_workers or 1)
        few = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": str(max(self.settings.validation_workers, share))}

        async def start(restarts: int) -> Child:
            told = replace(assignment, restarts=restarts, keys=self._keys)
            child = await self._start("tgi_gateway.launcher.http_process", told, few, keep_fds=(taken.fileno(),))
            if told.keys != self._keys:  # they changed meanwhile
                child.order(Order(self._keys))
            return child

        folder.reserve(assignment.process)
        return _Place(assignment.process, start, await start(0), lasting=True)

    def _assignment(self, process: str, folder: RuntimeFolder) -> Assignment:
        return Assignment(
            process=process,
            settings=self.settings,
            report_fd=-1,
            runtime_folder=str(folder.path),
            socket_path=str(folder.socket),
            metrics_folder=str(folder.metrics),
        )

    async def _start(
        self, module: str, assignment: Assignment, more: Mapping[str, str] | None = None, keep_fds: tuple[int, ...] = ()
    ) -> Child:
        environ = {name: value for name, value in self.environ.items() if name not in SECRET_VARIABLES}
        environ["PROMETHEUS_MULTIPROC_DIR"] = assignment.metrics_folder
        environ["PYTHONUNBUFFERED"] = "1"
        environ |= {name: value for name, value in (more or {}).items() if name not in self.environ}
        child = await processes.start(module, assignment, environ=environ, on_line=self._on_line, keep_fds=keep_fds)
        self._children.append(child)
        logger.debug("Started %s", child.name, extra=logs.fields(pid=child.process.pid))
        return child

    async def _ready(self, child: Child) -> str:
        """Wait until `child` is ready, telling from time to time that we still wait; returns its text.

        Raises `_Stop` at a signal and `StartError` if any process dies.
        """
        others = [other for other in self._children if other is not child]
        waiting = asyncio.create_task(child.ready())
        signalled = asyncio.create_task(self._signalled.wait())
        events: list[asyncio.Future[Any]] = [waiting, signalled, *(other.exit for other in others)]
        began = time.monotonic()
        try:
            while True:
                done, _ = await asyncio.wait(events, timeout=STILL_WAITING_S, return_when=asyncio.FIRST_COMPLETED)
                if waiting in done:
                    return waiting.result()
                if signalled in done:
                    raise _Stop
                for other in others:
                    if other.exit.done():
                        await other.ready()  # raises what it told, if it never was
                        raise StartError(f"{other.name} {processes.ending(other.exit.result())} during start-up")
                logger.info("Still starting (%s) after %.0f s", self._phase or "no news", time.monotonic() - began)
        finally:
            waiting.cancel()
            signalled.cancel()

    def _on_line(self, text: bytes, process: str) -> None:
        line = logs.decode(text, process)
        if "phase" in line.fields:
            self._phase = line.message
            if self._display is not None:
                self._display.update(line)
                return
        self.log.write(line)

    # Run and stop.

    async def _watch(
        self, engine: _Place, workers: Sequence[_Place], folder: RuntimeFolder, taken: socket.socket
    ) -> int:
        """Until a signal, or an end that no restart mends."""
        places = [engine, *workers]
        keeping = [asyncio.create_task(self._keep(place, folder)) for place in places]
        signalled = asyncio.create_task(self._signalled.wait())
        following = asyncio.create_task(self._follow_keys(workers))
        try:
            await asyncio.wait([signalled, *keeping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (signalled, following, *keeping):
                task.cancel()
            await asyncio.gather(signalled, following, *keeping, return_exceptions=True)
        taken.close()  # the port must close when the last worker stops accepting
        alive = [place.child for place in workers if place.child.alive]
        if self._signals:
            return await self._drain(engine.child, alive)
        for place, task in zip(places, keeping, strict=True):
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("%s; stopping the server", error)
                await self._fail(place is engine, engine.child, alive)
        return 1

    async def _keep(self, place: _Place, folder: RuntimeFolder) -> None:
        """Have a process in `place` for ever. Raises `StartError` when that cannot be done."""
        ready_at: float | None = time.monotonic()
        while True:
            hung = await self._end_of(place)
            served_s = None if ready_at is None else time.monotonic() - ready_at
            place.child.kill()  # those that it had started
            if place.child in self._children:
                self._children.remove(place.child)
            files.forget(folder.metrics, place.name)
            how = (
                f"made no progress for {place.beats_within_s:g} s and was killed"
                if hung
                else processes.ending(place.child.exit.result())
            )
            delay_s = place.restarts.delay_s(served_s) if place.lasting else None
            if delay_s is None:
                raise StartError(f"{place.name} {how}")
            logger.error("%s %s; starting it again%s", place.name, how, f" in {delay_s:g} s" if delay_s else "")
            await asyncio.sleep(delay_s)
            place.child = await place.start(place.restarts.total)
            began, ready_at = time.monotonic(), None
            try:
                await place.child.ready()
            except StartError as error:
                logger.error("%s did not start: %s", place.name, error)
                continue
            ready_at = time.monotonic()
            logger.info("%s is back after %.1f s", place.name, ready_at - began)

    async def _end_of(self, place: _Place) -> bool:
        """Wait until the process has ended; True if that was because it hung."""
        child = place.child
        if not place.beats_within_s:
            await asyncio.wait([child.exit])
            return False
        silence = asyncio.create_task(child.reports.silence(place.beats_within_s))
        try:
            ends: list[asyncio.Task[Any]] = [child.exit, silence]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            silence.cancel()
        if child.exit.done():
            return False
        child.kill()
        await asyncio.wait([child.exit])
        return True

    def _accepted(self) -> tuple[str, ...]:
        """Raises `SettingsError`."""
        keys = Keys.of(self.settings)
        return () if keys is None else keys.hashed

    async def _follow_keys(self, workers: Sequence[_Place]) -> None:
        """Have every HTTP worker take the keys of a file that has changed; from a broken one nobody takes any."""
        while self._key_file is not None:
            await asyncio.sleep(KEYS_POLL_S)
            if not self._key_file.changed():
                continue
            try:
                before, self._keys = set(self._keys), self._accepted()
            except SettingsError as error:
                logger.error("%s. The %d API keys from before stay in force", error, len(self._keys))
                continue
            for place in workers:
                place.child.order(Order(self._keys))
            added, gone = len(set(self._keys) - before), len(before - set(self._keys))
            logger.info("%d API keys are in force: %d new, %d gone", len(self._keys), added, gone)

    async def _fail(self, without_engine: bool, engine: Child, workers: Sequence[Child]) -> None:
        grace = AFTER_FAILURE_S if without_engine else self.settings.shutdown_timeout + MARGIN_S
        await self._stop_all(workers, grace)
        if engine.alive:
            await self._stop_all([engine], MARGIN_S)

    async def _drain(self, engine: Child, workers: Sequence[Child]) -> int:
        name = signal.Signals(self._signals[0]).name
        logger.info("%s: no new requests; accepted ones have %d s to finish", name, self.settings.shutdown_timeout)
        clean = await self._stop_all(workers, self.settings.shutdown_timeout + MARGIN_S)
        clean = await self._stop_all([engine], MARGIN_S) and clean
        if len(self._signals) > 1:
            logger.warning("Stopped at once by a second signal")
            return 128 + self._signals[1]
        logger.info("Stopped" if clean else "Stopped; a process had to be killed")
        return 0

    async def _stop_all(self, children: Sequence[Child], timeout_s: float) -> bool:
        """End them, at once if a second signal comes; False if one had to be killed."""
        if not children:
            return True
        stopping: asyncio.Future[list[bool]] = asyncio.gather(*(child.stop(timeout_s) for child in children))
        while not stopping.done():
            if len(self._signals) > 1:
                for child in children:
                    child.kill()
            self._signalled.clear()
            again = asyncio.create_task(self._signalled.wait())
            both: list[asyncio.Future[Any]] = [stopping, again]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            again.cancel()
        return all(stopping.result())

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        self._signalled.set()


def _check_plugin(name: str) -> None:
    lacking = plugins.load(name).missing()
    if lacking is not None:
        raise PluginError(f"backend `{name}` cannot run on this machine: {lacking}")


def _environment() -> dict[str, object]:
    """What a bug report needs."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backends": [f"{item.name} {item.version} ({item.distribution})" for item in plugins.installed()],
    }
