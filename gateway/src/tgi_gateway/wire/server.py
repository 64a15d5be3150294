"""Serve any Backend to the HTTP workers: one stream per worker, one message per step."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from tgi_gateway.backend import API_VERSION, Backend, ModelInfo
from tgi_gateway.errors import Unhealthy, ValidationError
from tgi_gateway.types import Failed, StepEvents
from tgi_gateway.wire import engine_pb2 as pb
from tgi_gateway.wire.channel import ATTACH, CANCEL, HEALTH, OPTIONS, SERVICE, WORKER_SHIFT, address, prepare_folder
from tgi_gateway.wire.codec import decode_request, encode_capacity, encode_step, encode_welcome

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

MAX_PENDING_ROWS = 1 << 20
"""Tokens kept for a worker that does not read. More means it hangs: it is cut off and its requests are cancelled."""
CAPACITY_PERIOD_S = 0.25
"""How often an idle stream looks whether capacity changed without an event (an engine that frees pages late)."""


class _Attached:
    """One worker's stream: what waits to be sent and which requests are open."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.open: dict[int, tuple[str, str]] = {}
        """Open requests, each with its tenant and name."""
        self.pending: list[StepEvents] = []
        self.pending_rows = 0
        self.wake = asyncio.Event()
        self.closing: str | None = None
        """Why the stream must end once everything pending is sent; empty for a peaceful end."""
        self.writer: asyncio.Task[None] | None = None

    def close(self, reason: str) -> None:
        """In the event loop."""
        if self.closing is None:
            self.closing = reason
        self.wake.set()

    def cut_off(self) -> None:
        """End the stream although a write of it hangs."""
        self.closing = "it does not read"
        if self.writer is not None:
            self.writer.cancel()


class WireServer:
    """A Backend that listens. Made by `serve`."""

    def __init__(self, backend: Backend, socket_path: Path) -> None:
        self.info: ModelInfo
        self._backend = backend
        self._socket_path = socket_path
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._lock = threading.Lock()  # guards _workers and every worker's open, pending and pending_rows
        self._workers: dict[int, _Attached] = {}
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Start the backend, then listen: a worker that can connect can generate. Raises StartError."""
        target = address(self._socket_path)
        prepare_folder(self._socket_path)
        self.info = await self._backend.start(self.emit)
        server = grpc.aio.server(options=OPTIONS)
        handlers = {
            ATTACH: grpc.stream_stream_rpc_method_handler(
                self._attach, pb.FromWorker.FromString, pb.FromHost.SerializeToString
            ),
            HEALTH: grpc.unary_unary_rpc_method_handler(
                self._health, pb.HealthRequest.FromString, pb.HealthReply.SerializeToString
            ),
            CANCEL: grpc.unary_unary_rpc_method_handler(
                self._cancel, pb.CancelRequest.FromString, pb.CancelReply.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_insecure_port(target)
        self._socket_path.chmod(0o600)
        await server.start()
        self._server = server

    async def stop(self, drain_s: float) -> None:
        """Stop the backend (which drains), send the workers their last events, hang up. Idempotent."""
        await self._backend.stop(drain_s)
        server, self._server = self._server, None
        if server is None:
            return
        with self._lock:
            workers = list(self._workers.values())
        for worker in workers:
            worker.close("")
        await server.stop(grace=1.0)
        self._socket_path.unlink(missing_ok=True)

    async def wait(self) -> None:
        """Return when the server has stopped."""
        if self._server is not None:
            await self._server.wait_for_termination()

    # Events, from the engine's thread.

    def emit(self, events: StepEvents) -> None:
        """The backend's emit: from any thread, never waits for a worker."""
        wake: list[_Attached] = []
        hung: list[_Attached] = []
        with self._lock:
            for worker, part in self._split(events):
                for finished in part.finished:
                    worker.open.pop(finished.request_id, None)
                for failed in part.failed:
                    worker.open.pop(failed.request_id, None)
                if not worker.pending:
                    wake.append(worker)
                worker.pending.append(part)
                worker.pending_rows += len(part.request_ids)
                if worker.pending_rows > MAX_PENDING_ROWS:
                    del self._workers[worker.index]
                    worker.pending.clear()
                    hung.append(worker)
        if threading.get_ident() == self._thread:
            self._wake(wake)
        elif wake:
            self._loop.call_soon_threadsafe(self._wake, wake)
        for worker in hung:
            self._loop.call_soon_threadsafe(worker.cut_off)

    def _split(self, events: StepEvents) -> Iterable[tuple[_Attached, StepEvents]]:
        workers = self._workers
        if len(workers) == 1:
            # Rows of a worker that has gone may be among them; the receiver does not know their ids and skips them.
            return [(worker, events) for worker in workers.values()]
        return [(workers[index], part) for index, part in split_by_worker(events).items() if index in workers]

    @staticmethod
    def _wake(workers: list[_Attached]) -> None:
        for worker in workers:
            worker.wake.set()

    # Streams, in the event loop.

    async def _attach(self, messages: AsyncIterator[pb.FromWorker], context: Context) -> None:
        first = await anext(aiter(messages), None)
        if first is None or not first.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must say hello")
            return
        theirs = first.hello.api_version
        if abs(theirs - API_VERSION) > 1:
            older = "worker" if theirs < API_VERSION else "engine"
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the worker speaks API version {theirs}, this engine {API_VERSION}; neighbouring ones understand each "
                f"other. Upgrade tgi-gateway in the environment of the {older}",
            )
            return
        worker = _Attached(first.hello.worker)
        with self._lock:
            before = self._workers.get(worker.index)
            self._workers[worker.index] = worker
        if before is not None:
            before.close("another worker attached with the same index")
        reader: asyncio.Task[None] | None = None
        try:
            welcome = encode_welcome(self.info, self._backend.capabilities, self._backend.capacity())
            await context.write(pb.FromHost(welcome=welcome))
            reader = asyncio.create_task(self._read(worker, messages))
            worker.writer = asyncio.create_task(self._write(worker, context))
            await asyncio.wait([worker.writer])
        finally:
            for task in (reader, worker.writer):
                if task is not None:
                    task.cancel()
            self._detach(worker)
        if not worker.writer.cancelled() and (error := worker.writer.exception()) is not None:
            log.warning("writing to HTTP worker %d failed: %r", worker.index, error)
            return
        if worker.closing:
            log.warning("HTTP worker %d is cut off: %s", worker.index, worker.closing)
            await context.abort(grpc.StatusCode.ABORTED, worker.closing)

    def _detach(self, worker: _Attached) -> None:
        """Forget the worker and free what its requests hold in the engine."""
        with self._lock:
            if self._workers.get(worker.index) is worker:
                del self._workers[worker.index]
            orphans, worker.open = worker.open, {}
        for request_id in orphans:
            self._backend.cancel(request_id)

    async def _read(self, worker: _Attached, messages: AsyncIterator[pb.FromWorker]) -> None:
        reason = "reading from the worker failed"
        try:
            async for message in messages:
                for submit in message.submits:
                    self._submit(worker, submit)
                for request_id in message.cancels:
                    if request_id in worker.open:
                        self._backend.cancel(request_id)
            reason = ""
        except ValueError as error:
            reason = str(error)
        except Exception:
            log.exception("reading from HTTP worker %d failed", worker.index)
        finally:
            worker.close(reason)

    def _submit(self, worker: _Attached, message: pb.Request) -> None:
        request_id = message.request_id
        if request_id >> WORKER_SHIFT != worker.index:
            raise ValueError(f"request id {request_id} does not carry worker index {worker.index}")
        with self._lock:
            if request_id in worker.open:
                raise ValueError(f"request id {request_id} is already open")
            worker.open[request_id] = (message.tenant, message.name)
        try:
            request = decode_request(message)
        except ValueError as error:
            self.emit(StepEvents(failed=[Failed(request_id, ValidationError.error_type, str(error))]))
            return
        self._backend.submit(request)

    async def _write(self, worker: _Attached, context: Context) -> None:
        """Send what is pending until the stream closes. Whatever arrives during one write is merged into the next."""
        sent = None
        while True:
            steps = self._take(worker)
            capacity = self._backend.capacity()
            if steps:
                await context.write(pb.FromHost(step=encode_step(_merge(steps), capacity)))
                sent = capacity
            elif worker.closing is not None:
                return
            else:
                if capacity != sent:
                    await context.write(pb.FromHost(step=pb.StepEvents(capacity=encode_capacity(capacity))))
                    sent = capacity
                await self._sleep(worker)

    async def _sleep(self, worker: _Attached) -> None:
        """Until there is something to do, or it is time to look at the capacity again."""
        timer = self._loop.call_later(CAPACITY_PERIOD_S, worker.wake.set)
        try:
            await worker.wake.wait()
        finally:
            timer.cancel()

    def _take(self, worker: _Attached) -> list[StepEvents]:
        worker.wake.clear()
        with self._lock:
            steps, worker.pending = worker.pending, []
            worker.pending_rows = 0
        return steps

    async def _health(self, _request: pb.HealthRequest, context: Context) -> pb.HealthReply:
        try:
            await self._backend.health()
        except Unhealthy as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return pb.HealthReply()

    async def _cancel(self, wanted: pb.CancelRequest, _context: Context) -> pb.CancelReply:
        key = (wanted.tenant, wanted.name)
        with self._lock:
            found = [each for worker in self._workers.values() for each, known in worker.open.items() if known == key]
        for request_id in found:
            self._backend.cancel(request_id)
        return pb.CancelReply(cancelled=len(found))


def split_by_worker(events: StepEvents) -> dict[int, StepEvents]:
    """What each worker, by its index, gets of `events`."""
    parts: dict[int, StepEvents] = {}
    logprobs, top = events.logprobs, events.top
    for row, request_id in enumerate(events.request_ids):
        part = parts.get(request_id >> WORKER_SHIFT)
        if part is None:
            part = parts[request_id >> WORKER_SHIFT] = StepEvents()
        if row in top:
            part.top[len(part.request_ids)] = top[row]
        part.request_ids.append(request_id)
        part.token_ids.append(events.token_ids[row])
        part.logprobs.append(logprobs[row])
    for finished in events.finished:
        parts.setdefault(finished.request_id >> WORKER_SHIFT, StepEvents()).finished.append(finished)
    for failed in events.failed:
        parts.setdefault(failed.request_id >> WORKER_SHIFT, StepEvents()).failed.append(failed)
    return parts


def _merge(steps: list[StepEvents]) -> StepEvents:
    """One StepEvents of several, in order. Never changes its inputs: an engine may still look at them."""
    if len(steps) == 1:
        return steps[0]
    merged = StepEvents()
    for step in steps:
        base = len(merged.request_ids)
        for row, top in step.top.items():
            merged.top[base + row] = top
        merged.request_ids.extend(step.request_ids)
        merged.token_ids.extend(step.token_ids)
        merged.logprobs.extend(step.logprobs)
        merged.finished.extend(step.finished)
        merged.failed.extend(step.failed)
    return merged


async def serve(backend: Backend, socket_path: Path) -> WireServer:
    """Start `backend` and serve it on a Unix socket of mode 0600. Raises StartError."""
    server = WireServer(backend, socket_path)
    await server.start()
    return server
