"""EchoBackend: a whole engine without a model. It answers with the prompt's own tokens, round and round.

Read it as the example of a correct Backend. `submit` and `cancel` only append to an inbox, from any thread; one task
owns everything else, so nothing needs a lock, and a cancel waits for one step at most.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from tgi_gateway.backend import Backend, Capabilities, Capacity, Emit, EngineOptions, ModelInfo, refuse_unsupported
from tgi_gateway.errors import (
    GatewayError,
    IncompleteGeneration,
    ModelError,
    Unhealthy,
    ValidationError,
)
from tgi_gateway.testing import distribution
from tgi_gateway.types import NO_LOGPROB, Failed, Finished, FinishReason, Request, StepEvents, Token, Usage

log = logging.getLogger(__name__)

ECHO_CAPABILITIES = Capabilities(
    features=frozenset(
        {
            "sampling",
            "seed",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
            "logit_bias",
            "logprobs",
            "top_n_tokens",
            "prefill_logprobs",
            "ignore_eos",
            "min_new_tokens",
            "stop_token_ids",
        }
    ),
    max_top_n_tokens=20,
)
HEALTH_TIMEOUT_S = 5.0


def toy_model(
    *,
    model_id: str = "echo",
    vocab_size: int = 32_000,
    eos_token_ids: tuple[int, ...] = (),
    max_total_tokens: int = 4096,
    max_input_tokens: int | None = None,
    max_sequences: int = 128,
    max_batch_total_tokens: int | None = None,
    max_batch_prefill_tokens: int | None = None,
) -> ModelInfo:
    """The ModelInfo of an engine without a model; by default every sequence can have its full length."""
    max_input_tokens = max_total_tokens - 1 if max_input_tokens is None else max_input_tokens
    return ModelInfo(
        model_id=model_id,
        max_input_tokens=max_input_tokens,
        max_total_tokens=max_total_tokens,
        max_batch_total_tokens=max_batch_total_tokens or max_sequences * max_total_tokens,
        max_batch_prefill_tokens=max_batch_prefill_tokens or max_input_tokens,
        max_sequences=max_sequences,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        device="none",
    )


def toy_model_from(options: EngineOptions) -> ModelInfo:
    """As the options say; vocabulary, end token and length come from the folder's config.json, if there is one."""
    config_path = options.model_path / "config.json"
    try:
        config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{config_path} is not JSON: {error}") from error
    eos = config.get("eos_token_id")
    return toy_model(
        model_id=options.model_id,
        vocab_size=config.get("vocab_size") or 32_000,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        max_total_tokens=options.max_total_tokens or config.get("max_position_embeddings") or 4096,
        max_input_tokens=options.max_input_tokens,
        max_sequences=options.max_batch_size or 128,
        max_batch_total_tokens=options.max_batch_total_tokens,
        max_batch_prefill_tokens=options.max_batch_prefill_tokens,
    )


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the engine, waiting or running."""

    request: Request
    submitted_at: float
    """time.monotonic() seconds, as all times here."""
    started_at: float = 0.0
    not_before: float = 0.0
    """It takes part in no step before this time."""
    output: list[int] = field(default_factory=list)

    @property
    def kv_tokens(self) -> int:
        """Reserved from its first step to its end, so that it never runs out."""
        return len(self.request.input_ids) + self.request.stop.max_new_tokens

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.input_ids), len(self.output))


class EchoBackend(Backend):
    """One step every `step_s` seconds gives one token to each running sequence; 0 is as fast as possible."""

    def __init__(
        self,
        model: ModelInfo | None = None,
        *,
        step_s: float = 0.0,
        capabilities: Capabilities = ECHO_CAPABILITIES,
        health_timeout_s: float = HEALTH_TIMEOUT_S,
    ) -> None:
        self.model = model or toy_model()
        self._step_s = step_s
        self._capabilities = capabilities
        self._health_timeout_s = health_timeout_s
        self._inbox: deque[Sequence | int | asyncio.Future[None] | None] = deque()
        """Submitted sequences, ids to cancel, health checks to answer; None asks to stop."""
        self._wake = asyncio.Event()
        self._waiting: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}
        self._next_step_at = 0.0
        self._free_kv_tokens = self.model.max_batch_total_tokens
        self._stopping = False
        self._ended = False
        self._task: asyncio.Task[None] | None = None

    # Any thread.

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def submit(self, request: Request) -> None:
        self._post(Sequence(request, time.monotonic()))

    def cancel(self, request_id: int) -> None:
        self._post(request_id)

    def capacity(self) -> Capacity:
        """As of the last step; what still waits has taken nothing yet."""
        limit = self.model.max_sequences
        return Capacity(
            limit, limit - len(self._running), self.model.max_batch_total_tokens, max(0, self._free_kv_tokens)
        )

    def _post(self, item: Sequence | int | asyncio.Future[None] | None) -> None:
        assert self._task is not None, "start() comes first"
        self._inbox.append(item)
        if self._ended:  # after the append: either the end of `_run` saw the item, or we see the end
            self._refuse_inbox()
        else:
            self._loop.call_soon_threadsafe(self._wake.set)

    # The event loop that called `start`.

    async def start(self, emit: Emit) -> ModelInfo:
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name="echo-steps")
        return self.model

    async def health(self) -> None:
        """A step loop that turns can generate: there is nothing else here that could break."""
        if self._task is None or self._ended:
            raise Unhealthy("the step loop is not running")
        answered = self._loop.create_future()
        self._post(answered)
        try:
            await asyncio.wait_for(answered, self._health_timeout_s)
        except TimeoutError:
            raise Unhealthy("the step loop does not answer") from None

    async def stop(self, drain_s: float) -> None:
        if self._task is None:
            return
        self._post(None)
        await asyncio.wait([self._task], timeout=drain_s)
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            while not (self._stopping and not self._waiting and not self._running and not self._inbox):
                await self._until_there_is_work()
                events = StepEvents()
                self._take_inbox(events)
                self._admit()
                now = time.monotonic()
                if self._running and now >= self._next_step_at:
                    self._next_step_at = now + self._step_s
                    self._step(events, now)
                if events:
                    self._emit(events)
        except Exception:
            log.exception("the step loop died")
        finally:
            self._ended = True
            self._free_kv_tokens = self.model.max_batch_total_tokens
            unfinished = [*self._waiting, *self._running]
            self._waiting.clear()
            self._running.clear()
            self._fail(unfinished, IncompleteGeneration("the engine stopped"))
            self._refuse_inbox()

    async def _until_there_is_work(self) -> None:
        """Return at once if a step is due, else when it is or when something lies in the inbox."""
        timeout = None
        if self._running:
            first = min(sequence.not_before for sequence in self._running.values())
            timeout = max(first, self._next_step_at) - time.monotonic()
        if self._inbox or (self._waiting and not self._running) or (timeout is not None and timeout <= 0):
            await asyncio.sleep(0)  # the other tasks of this loop get their turn between any two steps
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
        self._wake.clear()

    def _take_inbox(self, events: StepEvents) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            match item:
                case Sequence():
                    try:
                        self._check(item.request)
                    except GatewayError as error:
                        events.failed.append(Failed(item.request.request_id, error.error_type, error.detail))
                    else:
                        self._waiting[item.request.request_id] = item
                case int():
                    sequence = self._remove(item)
                    if sequence is not None:
                        # Whoever cancels after a stop string still wants what is known by then.
                        known = self._prompt_logprobs(sequence.request) if sequence.output else ()
                        events.finished.append(_finished(sequence, "cancelled", known))
                case None:
                    self._stopping = True
                case _:
                    if not item.done():
                        item.set_result(None)

    def _check(self, request: Request) -> None:
        """Raise what is wrong with the request. Nothing is ignored: what cannot be honoured is refused."""
        if self._stopping:
            raise IncompleteGeneration("the engine is stopping")
        refuse_unsupported(request, self._capabilities)
        prompt = len(request.input_ids)
        if not 1 <= prompt <= self.model.max_input_tokens:
            raise ValidationError(f"the prompt has {prompt} tokens; allowed are 1 to {self.model.max_input_tokens}")
        if request.stop.max_new_tokens < 1:
            raise ValidationError(f"`max_new_tokens` is {request.stop.max_new_tokens}; it must be at least 1")
        limit = min(self.model.max_total_tokens, self.model.max_batch_total_tokens)
        if prompt + request.stop.max_new_tokens > limit:
            raise ValidationError(
                f"prompt ({prompt}) and `max_new_tokens` ({request.stop.max_new_tokens}) exceed {limit} tokens"
            )
        if request.sampling.do_sample and not request.sampling.temperature > 0:
            raise ValidationError(f"`temperature` is {request.sampling.temperature}; it must be above 0")
        if not all(0 <= token_id < self.model.vocab_size for token_id in request.input_ids):
            raise ValidationError(f"the prompt has token ids outside the vocabulary of {self.model.vocab_size}")

    def _admit(self) -> None:
        """First come, first served: a large request is not overtaken for ever by small ones."""
        while self._waiting and len(self._running) < self.model.max_sequences:
            request_id, sequence = next(iter(self._waiting.items()))
            if sequence.kv_tokens > self._free_kv_tokens:
                return
            del self._waiting[request_id]
            self._free_kv_tokens -= sequence.kv_tokens
            sequence.started_at = time.monotonic()
            sequence.not_before = sequence.started_at + self.delay_s(sequence)
            self._running[request_id] = sequence

    def _remove(self, request_id: int) -> Sequence | None:
        """Take a request out, with everything it holds."""
        sequence = self._running.pop(request_id, None)
        if sequence is None:
            return self._waiting.pop(request_id, None)
        self._free_kv_tokens += sequence.kv_tokens
        return sequence

    def _step(self, events: StepEvents, now: float) -> None:
        for request_id, sequence in list(self._running.items()):
            if now < sequence.not_before:
                continue
            try:
                token = self.next_token(sequence)
            except GatewayError as error:  # this request's failure, and only this one's
                self._remove(request_id)
                events.failed.append(Failed(request_id, error.error_type, error.detail))
                continue
            sequence.output.append(token.token_id)
            sequence.not_before = now + self.delay_s(sequence)
            if token.top:
                events.top[len(events.request_ids)] = token.top
            events.request_ids.append(request_id)
            events.token_ids.append(token.token_id)
            events.logprobs.append(token.logprob)
            reason = self._stop_reason(sequence)
            if reason is not None:
                self._remove(request_id)
                events.finished.append(_finished(sequence, reason, self._prompt_logprobs(sequence.request)))

    def _stop_reason(self, sequence: Sequence) -> FinishReason | None:
        stop, last = sequence.request.stop, sequence.output[-1]
        if len(sequence.output) >= stop.max_new_tokens:
            return "length"
        if last in self.model.eos_token_ids and not stop.ignore_eos:
            return "eos_token"
        if last in stop.stop_token_ids:
            return "stop_sequence"
        return None

    def _fail(self, request_ids: list[int], error: GatewayError) -> None:
        if request_ids:
            self._emit(StepEvents(failed=[Failed(each, error.error_type, error.detail) for each in request_ids]))

    def _refuse_inbox(self) -> None:
        """After the end. popleft makes it safe from several threads: each item is answered once."""
        with suppress(IndexError):
            while True:
                item = self._inbox.popleft()
                if isinstance(item, Sequence):
                    self._fail([item.request.request_id], IncompleteGeneration("the engine has stopped"))

    # The model, so to speak.

    def delay_s(self, sequence: Sequence) -> float:  # noqa: ARG002
        """How long the sequence sits out before its next token, on top of the step interval."""
        return 0.0

    def expected_token(self, sequence: Sequence) -> int:
        """The most likely next token."""
        prompt = sequence.request.input_ids
        return prompt[len(sequence.output) % len(prompt)]

    def next_token(self, sequence: Sequence) -> Token:
        """Choose the sequence's next token. A GatewayError ends this sequence, any other exception the engine."""
        request, vocab_size = sequence.request, self.model.vocab_size
        expected = self.expected_token(sequence)
        banned: tuple[int, ...] = ()
        if len(sequence.output) < request.stop.min_new_tokens:
            eos = () if request.stop.ignore_eos else self.model.eos_token_ids
            banned = (*eos, *request.stop.stop_token_ids)
        token_id = distribution.choose(
            expected, vocab_size, request.sampling, request.input_ids, sequence.output, banned
        )
        return Token(
            request.request_id,
            token_id,
            distribution.logprob(expected, token_id, vocab_size) if request.logprobs else NO_LOGPROB,
            distribution.most_likely(expected, request.top_n_tokens, vocab_size),
        )

    def _prompt_logprobs(self, request: Request) -> tuple[float, ...]:
        """Each prompt token, after the ones before it."""
        if not request.prefill_logprobs:
            return ()
        prompt = request.input_ids
        expected = distribution.expected_in_prompt(prompt)
        known = zip(expected, prompt[1:], strict=True)
        return (NO_LOGPROB, *(distribution.logprob(guess, actual, self.model.vocab_size) for guess, actual in known))


def _finished(sequence: Sequence, reason: FinishReason, prompt_logprobs: tuple[float, ...] = ()) -> Finished:
    started_at = sequence.started_at or time.monotonic()
    queue_s = started_at - sequence.submitted_at
    return Finished(sequence.request.request_id, reason, sequence.usage, queue_s, prompt_logprobs)
