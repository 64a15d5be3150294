"""The engine host's Backend, seen from an HTTP worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from tgi_gateway.backend import API_VERSION, Capabilities, Capacity, Emit, ModelInfo
from tgi_gateway.errors import GatewayError, IncompleteGeneration, StartError, Unhealthy, ValidationError
from tgi_gateway.types import Failed, Request, StepEvents
from tgi_gateway.wire import engine_pb2 as pb
from tgi_gateway.wire.channel import ATTACH, CANCEL, HEALTH, SERVICE, WORKER_OPTIONS, address
from tgi_gateway.wire.codec import (
    ID_BYTES,
    decode_capabilities,
    decode_capacity,
    decode_model,
    decode_step,
    encode_request,
)

log = logging.getLogger(__name__)

Reply = TypeVar("Reply", bound=Message)
Call = Any
"""grpc.aio.StreamStreamCall, which has no complete type."""

MAX_TOKENS_PER_MESSAGE = 8 << 20
"""Prompt tokens sent in one message; at up to 5 bytes each this stays below the message limit."""
RECONNECT_S = 0.1
ANSWER_TIMEOUT_S = 30.0


class RemoteBackend:
    """A Backend whose engine lives in the host process behind `socket_path`.

    When the host goes away, every open request fails at once with `IncompleteGeneration` and later ones with
    `Unhealthy`, until a new host answers on the same socket; then everything works again.
    """

    def __init__(
        self,
        socket_path: Path,
        *,
        worker: int = 0,
        connect_timeout_s: float | None = 60.0,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        """`connect_timeout_s`: how long `start` waits for the host; None: for ever.

        `on_lost` is called in the event loop with the reason, after the open requests have failed.
        """
        self._target = address(socket_path)
        self._worker = worker
        self._connect_timeout_s = connect_timeout_s
        self._on_lost = on_lost
        self._when_attached: Callable[[ModelInfo], None] | None = None
        self._lock = threading.Lock()  # guards the next five
        self._attached = False
        self._stopping = False
        self._open: set[int] = set()
        self._submits: list[pb.Request] = []
        self._cancels: list[int] = []
        self._capabilities: Capabilities | None = None
        self._capacity = Capacity(0, 0, 0, 0)
        self._emit: Emit
        self._loop: asyncio.AbstractEventLoop
        self._thread = 0
        self._wake: asyncio.Event
        self._drained: asyncio.Event
        self._channel: Any = None
        self._task: asyncio.Task[None] | None = None

    @property
    def capabilities(self) -> Capabilities:
        """Those of the host's engine; known after `start`."""
        if self._capabilities is None:
            raise RuntimeError("capabilities are known after start()")
        return self._capabilities

    @property
    def attached(self) -> bool:
        """Whether a host is there now."""
        return self._attached

    def when_attached(self, call: Callable[[ModelInfo], None]) -> None:
        """`call` is told, in the event loop, of each host that takes the place of one that went away."""
        self._when_attached = call

    async def start(self, emit: Emit) -> ModelInfo:
        """Connect, waiting for the host if it is not there yet. `emit` is called in this event loop."""
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._wake, self._drained = asyncio.Event(), asyncio.Event()
        self._channel = grpc.aio.insecure_channel(self._target, options=WORKER_OPTIONS)
        try:
            call, welcome = await asyncio.wait_for(self._attach(), self._connect_timeout_s)
        except (TimeoutError, grpc.RpcError) as error:
            await self._channel.close(None)
            detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else None
            raise StartError(
                f"the engine host does not answer on {self._target}: "
                f"{detail or f'no answer in {self._connect_timeout_s} s'}. See the host's log."
            ) from error
        self._task = asyncio.create_task(self._run(call))
        return decode_model(welcome.model)

    def submit(self, request: Request) -> None:
        try:
            message = encode_request(request)
        except (ValueError, TypeError) as error:
            # Numbers and strings that no message can hold; the library's text would tell a client nothing.
            log.info("request %d cannot be sent: %s", request.request_id, error)
            self._refuse(request.request_id, ValidationError("a number or a string of the request is out of range"))
            return
        with self._lock:
            duplicate = request.request_id in self._open
            attached = self._attached and not self._stopping
            if attached and not duplicate:
                self._open.add(request.request_id)
                self._submits.append(message)
        if duplicate:
            self._refuse(request.request_id, ValidationError(f"request id {request.request_id} is already open"))
        elif not attached:
            self._refuse(request.request_id, Unhealthy("The engine is not available; try again"))
        else:
            self._notify()

    def cancel(self, request_id: int) -> None:
        with self._lock:
            if request_id not in self._open:
                return
            self._cancels.append(request_id)
        self._notify()

    def capacity(self) -> Capacity:
        """As of the host's last message: after each step with events, and within 250 ms of other changes."""
        return self._capacity

    async def health(self) -> None:
        await self._ask(HEALTH, pb.HealthRequest(), pb.HealthReply)

    async def cancel_named(self, tenant: str, name: str) -> int:
        """See `tgi_gateway.backend.CancelsByName`."""
        reply = await self._ask(CANCEL, pb.CancelRequest(tenant=tenant, name=name), pb.CancelReply)
        return reply.cancelled

    async def _ask(self, method: str, request: Message, kind: type[Reply]) -> Reply:
        """One question and its answer, beside the stream. Raises `Unhealthy`."""
        if self._channel is None or not self._attached:
            raise Unhealthy("The engine is not available")
        call = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=kind.FromString,
        )
        try:
            reply: Reply = await call(request, timeout=ANSWER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and self._attached:
                raise Unhealthy(error.details() or "unhealthy") from error
            raise Unhealthy("The engine does not answer") from error
        return reply

    async def stop(self, drain_s: float) -> None:
        """Detach this worker; the engine goes on for the others."""
        with self._lock:
            self._stopping = True
            if not self._open:
                self._drained.set()
        task, self._task = self._task, None
        if task is None:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drained.wait(), max(drain_s, 0.0))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._lose("this server stops")
        await self._channel.close(None)
        self._channel = None

    # The rest runs in the event loop, except `_notify` and `_refuse`.

    def _notify(self) -> None:
        if threading.get_ident() == self._thread:
            self._wake.set()
        else:
            self._loop.call_soon_threadsafe(self._wake.set)

    def _refuse(self, request_id: int, error: GatewayError) -> None:
        # Not from within submit(): the caller may not have noted the request yet.
        events = StepEvents(failed=[Failed(request_id, error.error_type, error.detail)])
        self._loop.call_soon_threadsafe(self._emit, events)

    async def _attach(self) -> tuple[Call, pb.Welcome]:
        """Open the stream; raises AioRpcError. Waits as long as nobody listens."""
        call: Call = self._channel.stream_stream(
            f"/{SERVICE}/{ATTACH}",
            request_serializer=pb.FromWorker.SerializeToString,
            response_deserializer=pb.FromHost.FromString,
        )(wait_for_ready=True)
        try:
            await call.write(pb.FromWorker(hello=pb.Hello(worker=self._worker, api_version=API_VERSION)))
            first = await anext(aiter(call), None)
        except BaseException:
            call.cancel()
            raise
        if first is None:
            raise StartError("the engine host hung up")
        welcome: pb.Welcome = first.welcome
        self._capabilities = decode_capabilities(welcome.capabilities)
        self._capacity = decode_capacity(welcome.capacity)
        with self._lock:
            self._attached = True
        return call, welcome

    async def _run(self, call: Call) -> None:
        """Serve one stream after the other until cancelled."""
        while True:
            try:
                reason = await self._exchange(call)
            finally:
                call.cancel()
            self._lose("the engine went away; try again")
            log.error("the engine host is gone: %s", reason)
            if self._on_lost is not None:
                self._on_lost(reason)
            call = await self._reattach()
            log.info("attached to the engine host again")

    async def _reattach(self) -> Call:
        while True:
            await asyncio.sleep(RECONNECT_S)
            with contextlib.suppress(grpc.RpcError, StartError):
                call, welcome = await self._attach()
                if self._when_attached is not None:
                    self._when_attached(decode_model(welcome.model))
                return call

    async def _exchange(self, call: Call) -> str:
        """Send and receive until the stream breaks; returns why."""
        writer = asyncio.create_task(self._write(call))
        try:
            async for message in call:
                self._receive(message.step)
        except grpc.RpcError as error:
            return error.details() or "no reason given" if isinstance(error, grpc.aio.AioRpcError) else str(error)
        except Exception as error:
            log.exception("a message of the engine host cannot be used")
            return repr(error)
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
        return "it hung up"

    def _receive(self, message: pb.StepEvents) -> None:
        events = decode_step(message)
        if message.HasField("capacity"):
            self._capacity = decode_capacity(message.capacity)
        if events.finished or events.failed:
            with self._lock:
                self._open.difference_update([event.request_id for event in events.finished])
                self._open.difference_update([event.request_id for event in events.failed])
                if self._stopping and not self._open:
                    self._drained.set()
        if events:
            self._emit(events)

    async def _write(self, call: Call) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (message := self._next_message()) is not None:
                try:
                    await call.write(message)
                except (grpc.RpcError, asyncio.InvalidStateError):
                    return  # the reader learns the same and tells why

    def _next_message(self) -> pb.FromWorker | None:
        """Everything that waits to be sent, as far as it fits; cancels only after the last submit."""
        with self._lock:
            tokens = count = 0
            for submit in self._submits:
                tokens += len(submit.input_ids) // ID_BYTES
                if count and tokens > MAX_TOKENS_PER_MESSAGE:
                    break
                count += 1
            submits, self._submits = self._submits[:count], self._submits[count:]
            cancels: list[int] = []
            if not self._submits:
                cancels, self._cancels = self._cancels, cancels
        return pb.FromWorker(submits=submits, cancels=cancels) if submits or cancels else None

    def _lose(self, detail: str) -> None:
        """The stream is over: end every open request."""
        with self._lock:
            self._attached = False
            lost, self._open = self._open, set()
            self._submits, self._cancels = [], []
        if lost:
            error_type = IncompleteGeneration.error_type
            text = IncompleteGeneration(f"Incomplete generation: {detail}").detail
            self._emit(StepEvents(failed=[Failed(request_id, error_type, text) for request_id in sorted(lost)]))
