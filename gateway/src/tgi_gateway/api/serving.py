"""What every generating route shares: permits, opening and collecting generations, and the account of one call."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from json.encoder import encode_basestring
from typing import Any, TypeAlias, TypeVar

from tgi_gateway.api import caller
from tgi_gateway.api.doors import Doors
from tgi_gateway.api.errors import INTERNAL, ClientGone, failure_label
from tgi_gateway.api.generation import Generation, Generations, Piece
from tgi_gateway.backend import Backend, ModelInfo
from tgi_gateway.errors import Cancelled, GatewayError, Overloaded, Unhealthy
from tgi_gateway.host.pace import Pace
from tgi_gateway.keys import Keys
from tgi_gateway.prompt import stops, tools, validate
from tgi_gateway.prompt.chat_template import ChatTemplate
from tgi_gateway.prompt.reasoning import Marks
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.prompt.tools import Family
from tgi_gateway.prompt.validate import Limits, Valid
from tgi_gateway.settings import Settings
from tgi_gateway.telemetry import logs
from tgi_gateway.telemetry.metrics import RequestMetrics
from tgi_gateway.telemetry.tracing import Tracing

log = logging.getLogger("tgi_gateway.request")

T = TypeVar("T")

MAX_TOP_LOGPROBS = 20

VERSION = version("tgi-gateway")
FINGERPRINT = f"{VERSION}-native"
LOGGED_CHARACTERS = 1000
"""Of a prompt and of an answer, under --log-prompts."""


class Permits:
    """How many generations this worker holds at once; the engine host has the last word over all workers."""

    def __init__(self, limit: int, running: Callable[[], int] = lambda: 0) -> None:
        """`running` tells how many requests the engine has; the others wait for it."""
        self._limit = limit
        self._running = running
        self._taken = 0
        self._pace = Pace()

    @property
    def taken(self) -> int:
        return self._taken

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Raises `Overloaded` at once when there are not enough: nobody waits."""
        if self._taken + count > self._limit:
            waiting = max(self._taken - self._running(), 0)
            raise Overloaded(retry_after_s=self._pace.retry_after_s(time.perf_counter(), waiting + count))
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count
            self._pace.ended(time.perf_counter(), count)


@dataclass
class Services:
    """Everything the routes work with. The backend has been started with ``generations.emit``."""

    settings: Settings
    info: ModelInfo
    backend: Backend
    generations: Generations
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    metrics: RequestMetrics
    keys: Keys | None
    """None: every caller is welcome."""
    reachable: Callable[[], bool] = lambda: True
    """Whether the engine is there, be it well or not."""
    doors: Doors = field(default_factory=Doors)
    tracing: Tracing | None = None
    limits: Limits = field(init=False)
    openai_limits: Limits = field(init=False)
    """Of OpenAI's routes, whose clients may ask for more alternatives than TGI's, unless the operator says how many."""
    permits: Permits = field(init=False)
    adapters: frozenset[str] = field(init=False)
    compute_type: str = field(init=False)
    eos_token_ids: frozenset[int] = field(init=False)
    slow_template: bool = field(init=False, default=False)
    family: Family = field(init=False)
    """How the model calls tools."""
    reasoning: Marks | None = field(init=False)
    """How it writes its thoughts, unless its family has a way of its own."""

    def __post_init__(self) -> None:
        self.permits = Permits(self.settings.max_concurrent_requests, self._running)
        self.adapters = frozenset(adapter.partition("=")[0] for adapter in self.settings.lora_adapters)
        template = "" if self.chat_template is None else self.chat_template.source(with_tools=True)
        self.family, self.reasoning = tools.recognised(
            template, self.settings.tool_call_parser, self.settings.reasoning_parser
        )
        self.serve(self.info)

    def serve(self, info: ModelInfo) -> None:
        """From now on with this engine: one that was started again may have other limits."""
        self.info = info
        self.limits = self.openai_limits = Limits.of(self.settings, info)
        if "max_top_n_tokens" not in self.settings.given:
            self.openai_limits = replace(self.limits, max_top_n_tokens=MAX_TOP_LOGPROBS)
        self.eos_token_ids = frozenset(info.eos_token_ids)
        kind = f"{self.settings.num_shard or 1}-{info.device or 'unknown'}"
        self.compute_type = self.settings.compute_type or kind

    def _running(self) -> int:
        capacity = self.backend.capacity()
        return capacity.max_sequences - capacity.free_sequences

    def check_open(self) -> None:
        """Raises `Unhealthy` if a request that comes now could not be taken."""
        self.doors.enter()
        if not self.reachable():
            raise Unhealthy("The engine is not available; try again")

    def open(self, valid: Valid, *, keep_stop: bool, visible: frozenset[int] = frozenset()) -> Generation:
        """Submit it; `visible` special tokens are text. Raises `Unsupported` for what the engine lacks."""
        calling = caller.current()
        salt = valid.request.cache_salt
        if calling.tenant and not self.settings.share_prefixes_across_keys:
            salt = f"{calling.tenant}:{salt}"
        request = replace(
            valid.request,
            request_id=self.generations.next_id(),
            cache_salt=salt,
            name=calling.request_id,
            tenant=calling.tenant,
            priority=max(valid.request.priority, calling.priority),
            traceparent=calling.traceparent,
        )
        matcher = stops.matcher(request.stop.stop_strings, keep_stop)
        decoder = self.tokenizer.decoder(request.input_ids)
        ending_ids = frozenset(request.stop.stop_token_ids)
        if not request.stop.ignore_eos:
            ending_ids |= self.eos_token_ids
        return self.generations.open(
            request, decoder, matcher, self.tokenizer.special_texts, ending_ids, visible, silent=valid.silent
        )


@dataclass(slots=True)
class Answer:
    """A finished generation."""

    valid: Valid
    generation: Generation
    pieces: list[Piece]

    @property
    def mean_logprob(self) -> float:
        return validate.mean_logprob([piece.logprob for piece in self.pieces])


Enough: TypeAlias = Callable[[Sequence[Piece]], bool]
"""Told of the tokens as they come: whether the answer is whole."""


async def collect(
    services: Services,
    valid: Valid,
    *,
    keep_stop: bool,
    visible: frozenset[int] = frozenset(),
    enough: Enough | None = None,
) -> Answer:
    """Generate to the end."""
    pieces: list[Piece] = []
    async with services.open(valid, keep_stop=keep_stop, visible=visible) as generation:
        async for batch in generation:
            pieces += batch
            if enough is not None and enough(batch):
                generation.complete()
    refuse_cancelled(generation)
    return Answer(valid, generation, pieces)


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, side by side; the first failure ends all."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect_all(
    services: Services,
    valids: Sequence[Valid],
    *,
    keep_stop: bool,
    visible: frozenset[int] = frozenset(),
    enough: Callable[[], Enough | None] = lambda: None,
) -> list[Answer]:
    """Generate side by side; the first failure ends all. `enough` is made for each."""
    return await together(
        [collect(services, valid, keep_stop=keep_stop, visible=visible, enough=enough()) for valid in valids]
    )


def refuse_cancelled(generation: Generation) -> None:
    """An answer that was cut short is no answer. Whoever hung up does not come here: it was cancelled by name."""
    if generation.reason == "cancelled":
        raise Cancelled


async def interleave(streams: Sequence[AsyncGenerator[bytes, None]]) -> AsyncGenerator[bytes, None]:
    """Chunks of several streams as they come. The first failure ends all."""
    queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(stream: AsyncGenerator[bytes, None]) -> None:
        try:
            async for chunk in stream:
                await queue.put(chunk)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)
        finally:
            await stream.aclose()

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    open_streams = len(streams)
    try:
        while open_streams:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one generation."""

    total: float
    validation: float
    """From the request's arrival to its submission."""
    queue: float
    inference: float
    per_token: float

    @staticmethod
    def of(generation: Generation, arrived_at: float) -> Times:
        total = generation.ended_at - arrived_at
        validation = generation.started_at - arrived_at
        queue = generation.finished.queue_s if generation.finished is not None else 0.0
        inference = max(total - validation - queue, 0.0)
        return Times(total, validation, queue, inference, inference / max(generation.generated_tokens, 1))


@dataclass(slots=True)
class Call:
    """One HTTP request to a generating route: when it came, what is told about it afterwards."""

    services: Services
    route: str
    arrived_at: float = field(default_factory=time.perf_counter)
    headers: MutableMapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.headers["x-compute-type"] = self.services.compute_type
        self.services.metrics.count()

    def stream_headers(self, characters: int) -> None:
        self.headers["x-compute-characters"] = str(characters)
        self.headers["x-accel-buffering"] = "no"
        self.headers["cache-control"] = "no-cache"

    def succeeded(self, generation: Generation, seed: int | None) -> Times:
        """Account for a finished generation, in metrics and log."""
        times = Times.of(generation, self.arrived_at)
        self.services.metrics.success(generation, self.arrived_at)
        span = caller.current().span
        if span is not None and self.services.tracing is not None:
            self.services.tracing.add("validate", span.traceparent, self.arrived_at, generation.started_at)
            span.set(
                total_time=duration(times.total),
                validation_time=duration(times.validation),
                queue_time=duration(times.queue),
                inference_time=duration(times.inference),
                time_per_token=duration(times.per_token),
                seed=str(seed),
                input_tokens=len(generation.request.input_ids),
                generated_tokens=generation.generated_tokens,
            )
        if log.isEnabledFor(logging.INFO):
            told = logs.span(
                self.route,
                request_id=generation.request.name,
                total_time=duration(times.total),
                validation_time=duration(times.validation),
                queue_time=duration(times.queue),
                inference_time=duration(times.inference),
                time_per_token=duration(times.per_token),
                seed=seed,
                input_tokens=len(generation.request.input_ids),
                generated_tokens=generation.generated_tokens,
                finish_reason=generation.reason,
                **self._texts(generation),
            )
            # After the answer has left: a line costs as much as a tenth of a short request.
            asyncio.get_running_loop().call_soon(partial(log.info, "Success", extra=told))
        return times

    def _texts(self, generation: Generation) -> dict[str, str]:
        """What the log says of prompt and answer: nothing, unless the operator asked for it."""
        if not self.services.settings.log_prompts:
            return {}
        begin = generation.request.input_ids[:LOGGED_CHARACTERS]
        prompt = self.services.tokenizer.decode(begin, skip_special_tokens=False)
        return {"prompt": prompt[:LOGGED_CHARACTERS], "answer": generation.text[:LOGGED_CHARACTERS]}

    def failed(self, error: Exception) -> None:
        """Account for a request that ended without its answer."""
        span = caller.current().span
        if isinstance(error, ClientGone):
            if span is not None:
                span.fail("dropped", "The client hung up")
            self.services.metrics.failure("dropped", caller.current().tenant)
            log.info("Client hung up", extra=self._span())
            return
        known = error if isinstance(error, GatewayError) else INTERNAL  # whoever answers logs the traceback
        if span is not None:
            span.fail(known.error_type, str(known))
        self.services.metrics.failure(failure_label(known), caller.current().tenant)
        log.log(level_of(known), "%s", known, extra=self._span(error_type=known.error_type))

    def _span(self, **values: object) -> dict[str, Any]:
        return logs.span(self.route, request_id=caller.current().request_id, **values)

    def account(self, answers: Sequence[Answer], characters: int, *, elapsed: bool = True) -> None:
        """Record finished answers and fill the response headers with their sums."""
        all_times = [self.succeeded(answer.generation, answer.valid.seed) for answer in answers]
        headers = self.headers
        if elapsed:
            headers["x-compute-time"] = repr(all_times[0].total)
        headers["x-compute-characters"] = str(characters)
        for name, values in (
            ("total", [times.total for times in all_times]),
            ("validation", [times.validation for times in all_times]),
            ("queue", [times.queue for times in all_times]),
            ("inference", [times.inference for times in all_times]),
        ):
            headers[f"x-{name}-time"] = _milliseconds(sum(values))
        headers["x-time-per-token"] = _milliseconds(sum(times.per_token for times in all_times))
        headers["x-prompt-tokens"] = str(sum(len(answer.valid.request.input_ids) for answer in answers))
        headers["x-generated-tokens"] = str(sum(answer.generation.generated_tokens for answer in answers))


def level_of(error: GatewayError) -> int:
    """Neither a client's mistake nor a full server is an error of the server."""
    failed = error.status in (424, 500, 503) and not isinstance(error, Overloaded)
    return logging.ERROR if failed else logging.INFO


def duration(seconds: float) -> str:
    """As TGI logs it: ``12.3ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1.0:
            return f"{seconds * scale:.6g}{unit}"
    return f"{seconds * 1e9:.0f}ns"


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1e3))


def number(value: float) -> str:
    """A JSON number; null for what has none."""
    return repr(value) if math.isfinite(value) else "null"


def quoted(text: str) -> str:
    """A JSON string of which no reader, however it splits lines, takes a part for a line's end."""
    literal = encode_basestring(text)
    if literal.isascii():
        return literal
    return literal.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")
