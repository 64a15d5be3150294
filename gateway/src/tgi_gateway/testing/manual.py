"""ManualBackend: an engine driven by hand. A test says what each step yields, and sees what the engine was asked."""

from __future__ import annotations

import threading

from tgi_gateway.backend import ALL_FEATURES, Backend, Capabilities, Capacity, Emit, ModelInfo
from tgi_gateway.errors import Unhealthy
from tgi_gateway.testing.echo import toy_model
from tgi_gateway.types import Event, Failed, Finished, FinishReason, Request, StepEvents, Token, Usage


class ManualBackend(Backend):
    """Takes everything, runs nothing. Its capacity is whatever `free` was set to."""

    def __init__(self, model: ModelInfo | None = None) -> None:
        self.model = model or toy_model()
        self.free = Capacity(
            self.model.max_sequences,
            self.model.max_sequences,
            self.model.max_batch_total_tokens,
            self.model.max_batch_total_tokens,
        )
        self.submitted: dict[int, Request] = {}
        """All requests ever, in order."""
        self.cancelled: list[int] = []
        self.healthy = True
        self.stopped_with: float | None = None
        self.changed = threading.Condition()
        """Notified after each submit and cancel, for tests with threads."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(features=ALL_FEATURES)

    async def start(self, emit: Emit) -> ModelInfo:
        self.emit = emit
        return self.model

    def submit(self, request: Request) -> None:
        with self.changed:
            self.submitted[request.request_id] = request
            self.changed.notify_all()

    def wait_for(self, request_id: int, timeout_s: float = 10.0) -> Request:
        """Block until the engine was given this request; for a thread beside the event loop."""
        with self.changed:
            assert self.changed.wait_for(lambda: request_id in self.submitted, timeout_s)
            return self.submitted[request_id]

    def wait_for_cancel(self, request_id: int, timeout_s: float = 10.0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: request_id in self.cancelled, timeout_s)

    def cancel(self, request_id: int) -> None:
        with self.changed:
            self.cancelled.append(request_id)
            self.changed.notify_all()

    def capacity(self) -> Capacity:
        return self.free

    async def health(self) -> None:
        if not self.healthy:
            raise Unhealthy

    async def stop(self, drain_s: float) -> None:
        self.stopped_with = drain_s

    def step(self, *events: Event) -> None:
        """Run a step that had these events."""
        self.emit(StepEvents.pack(events))

    def token(self, request_id: int, token_id: int = 1) -> None:
        self.step(Token(request_id, token_id))

    def finish(self, request_id: int, reason: FinishReason = "length", generated_tokens: int = 1) -> None:
        prompt_tokens = len(self.submitted[request_id].input_ids)
        self.step(Finished(request_id, reason, Usage(prompt_tokens, generated_tokens)))

    def fail(self, request_id: int, error_type: str = "generation", message: str = "broken") -> None:
        self.step(Failed(request_id, error_type, message))
