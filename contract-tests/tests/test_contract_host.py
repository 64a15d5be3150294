"""The gateway's own Backends keep the contract too: admission around an engine, and an engine behind a socket."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path

from tgi_contract_tests import BackendContract
from tgi_gateway.backend import Backend, Capabilities, Capacity, Emit, ModelInfo
from tgi_gateway.host.dispatch import Dispatch
from tgi_gateway.testing import EchoBackend, toy_model
from tgi_gateway.types import Request
from tgi_gateway.wire.client import RemoteBackend
from tgi_gateway.wire.server import WireServer, serve

MODEL = toy_model(vocab_size=1000, eos_token_ids=(2,), max_total_tokens=128, max_sequences=4)


class OverTheWire(Backend):
    """A RemoteBackend together with the host that it talks to."""

    def __init__(self) -> None:
        self._engine = Dispatch(EchoBackend(MODEL, step_s=0.001), max_concurrent_requests=1000)
        self._folder = Path(tempfile.gettempdir()) / f"tgi-{uuid.uuid4().hex}"
        self._remote = RemoteBackend(self._folder / "host.sock")
        self._server: WireServer | None = None

    @property
    def capabilities(self) -> Capabilities:
        return self._engine.capabilities

    async def start(self, emit: Emit) -> ModelInfo:
        self._folder.mkdir(mode=0o700)
        self._server = await serve(self._engine, self._folder / "host.sock")
        return await self._remote.start(emit)

    def submit(self, request: Request) -> None:
        self._remote.submit(request)

    def cancel(self, request_id: int) -> None:
        self._remote.cancel(request_id)

    def capacity(self) -> Capacity:
        return self._remote.capacity()

    async def health(self) -> None:
        await self._remote.health()

    async def stop(self, drain_s: float) -> None:
        await self._remote.stop(drain_s)
        if self._server is not None:
            await self._server.stop(drain_s)
            shutil.rmtree(self._folder, ignore_errors=True)


class TestDispatch(BackendContract):
    patience_s = 2.0
    end_prompt = (5, 6, 2, 7)

    def make(self) -> Backend:
        return Dispatch(EchoBackend(MODEL, step_s=0.001), max_concurrent_requests=1000)


class TestOverTheWire(BackendContract):
    patience_s = 10.0
    end_prompt = (5, 6, 2, 7)

    def make(self) -> Backend:
        return OverTheWire()
