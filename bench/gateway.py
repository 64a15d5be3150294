"""The gateway alone: how many streamed tokens one HTTP core carries, and what a request waits beyond its engine.

    python bench/gateway.py            a table
    python bench/gateway.py --json F   also as JSON

Three processes as in production, the engine replaced by one that does no work: engine host (dispatch and gRPC over a
Unix socket), HTTP worker (the real process: validation, detokenizer, JSON, uvicorn), and a client over TCP. The core's
rate is tokens by CPU seconds of the HTTP worker, all its threads counted; so it holds whatever else the machine does.
"Each its own": the engine is paced so that every token has a wake-up and a write of its own, the worst case. "Flood":
the engine offers more than the worker takes, and steps that pile up are sent together. "Delay": from the engine's step
to the client, for a sample of tokens.
The bare application writes the same chunks from the same uvicorn and does nothing else.
"""

# Nothing else runs in this process while it starts others.
# ruff: noqa: ASYNC220, ASYNC230

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import msgspec
import tokenizers
import uvicorn
import uvloop
from machine import ROOT, machine
from tokenizers import decoders, models, pre_tokenizers, trainers

from tgi_gateway.backend import ALL_FEATURES, Backend, Capabilities, Capacity, Emit, ModelInfo
from tgi_gateway.host.dispatch import Dispatch
from tgi_gateway.launcher.child import Assignment, Report
from tgi_gateway.settings import Settings
from tgi_gateway.types import Finished, Request, StepEvents, Usage
from tgi_gateway.wire.server import serve

CHUNK = (
    b'data: {"index":17,"token":{"id":1234,"text":" token","logprob":-0.5,"special":false},'
    b'"generated_text":null,"details":null}\n\n'
)
"""What the bare application sends: one event of the native API."""
PROMPT = "What is the capital of France?"
MAX_TOTAL_TOKENS = 8192
TARGET_TOKENS_PER_S = 60_000
TARGET_ADDED_MS = 1.0

# The engine.


class NullBackend(Backend):
    """Every `step_s` seconds one token for each request. A token's log-probability is minus the time it was made at.

    With ``step_s = 0`` a request's tokens all come in one step as soon as it is submitted.
    """

    def __init__(self, model: ModelInfo, step_s: float) -> None:
        self._model = model
        self._step_s = step_s
        self._running: dict[int, tuple[Request, int]] = {}
        self._task: asyncio.Task[None] | None = None
        self._tokens = [token_id for token_id in range(300, 1324) if token_id < model.vocab_size]

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(features=ALL_FEATURES)

    async def start(self, emit: Emit) -> ModelInfo:
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        if self._step_s:
            self._task = asyncio.create_task(self._run())
        return self._model

    def submit(self, request: Request) -> None:
        self._loop.call_soon(self._take, request)  # the wire calls in the event loop

    def cancel(self, request_id: int) -> None:
        self._loop.call_soon(self._drop, request_id)

    def capacity(self) -> Capacity:
        limit, tokens = self._model.max_sequences, self._model.max_batch_total_tokens
        return Capacity(limit, limit - len(self._running), tokens, tokens)

    async def health(self) -> None:
        return

    async def stop(self, drain_s: float) -> None:  # noqa: ARG002
        if self._task is not None:
            self._task.cancel()

    def _take(self, request: Request) -> None:
        self._running[request.request_id] = (request, 0)
        if not self._step_s:
            while self._running:
                self._step()

    def _drop(self, request_id: int) -> None:
        running = self._running.pop(request_id, None)
        if running is not None:
            request, done = running
            ending = Finished(request_id, "cancelled", Usage(len(request.input_ids), done))
            self._emit(StepEvents(finished=[ending]))

    async def _run(self) -> None:
        due = time.monotonic()
        while True:
            due = max(due + self._step_s, time.monotonic() - 10 * self._step_s)
            await asyncio.sleep(max(due - time.monotonic(), 0))
            if self._running:
                self._step()

    def _step(self) -> None:
        tokens, made_at = self._tokens, -time.monotonic()
        events = StepEvents()
        for request_id, (request, done) in list(self._running.items()):
            events.request_ids.append(request_id)
            events.token_ids.append(tokens[(request_id + done) % len(tokens)])
            events.logprobs.append(made_at)
            self._running[request_id] = (request, done + 1)
            if done + 1 == request.stop.max_new_tokens:
                del self._running[request_id]
                events.finished.append(Finished(request_id, "length", Usage(len(request.input_ids), done + 1)))
        self._emit(events)


async def engine_host(model: ModelInfo, step_s: float, socket_path: Path) -> None:
    server = await serve(Dispatch(NullBackend(model, step_s), max_concurrent_requests=100_000), socket_path)
    print("ready", flush=True)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.stop(0.0)


# The bare application.


_waiting: list[asyncio.Future[None]] = []


async def ticked(step_s: float) -> None:
    """Until the next step; one timer wakes all streams, as one message of an engine does."""
    loop = asyncio.get_running_loop()
    if not _waiting:
        loop.call_later(step_s, _tick)
    future = loop.create_future()
    _waiting.append(future)
    await future


def _tick() -> None:
    for future in _waiting:
        if not future.done():
            future.set_result(None)
    _waiting.clear()


async def bare(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """Streams as many chunks as the path says: /TOKENS/STEP_SECONDS; with 0 seconds without waiting."""
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    _, chunks, step_s = scope["path"].split("/")
    for _ in range(int(chunks)):
        if float(step_s):
            await ticked(float(step_s))
        await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def bare_server(listen_fd: int) -> None:
    config = uvicorn.Config(
        bare, loop="none", http="httptools", lifespan="off", log_config=None, access_log=False, server_header=False
    )
    uvloop.run(uvicorn.Server(config).serve(sockets=[socket.socket(fileno=listen_fd)]))


# Processes.


def listen() -> socket.socket:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(2048)
    listening.set_inheritable(True)
    return listening


async def ended(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        await asyncio.to_thread(process.wait, 10)
    except subprocess.TimeoutExpired:
        process.kill()
        await asyncio.to_thread(process.wait)


@dataclass
class Served:
    """A server to measure."""

    pid: int
    port: int

    def cpu_s(self) -> float:
        """CPU time of all its threads so far."""
        total_ns = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            total_ns += int((task / "schedstat").read_text().split()[0])
        return total_ns / 1e9


@asynccontextmanager
async def bare_application() -> AsyncIterator[Served]:
    with listen() as listening:
        process = subprocess.Popen(
            [sys.executable, __file__, "--bare", str(listening.fileno())], pass_fds=[listening.fileno()]
        )
        try:
            yield Served(process.pid, listening.getsockname()[1])
        finally:
            await ended(process)


@asynccontextmanager
async def gateway(folder: Path, step_s: float) -> AsyncIterator[Served]:
    """Engine host and HTTP worker."""
    runtime = Path(tempfile.mkdtemp(prefix="tgi-bench-"))
    socket_path = runtime / "engine.sock"
    settings = Settings(max_concurrent_requests=100_000)
    engine = subprocess.Popen(
        [sys.executable, __file__, "--engine", str(step_s), "--socket", str(socket_path), "--model", str(folder)],
        stdout=subprocess.PIPE,
    )
    assert engine.stdout is not None
    await asyncio.to_thread(engine.stdout.readline)
    report_read, report_write = os.pipe()
    with listen() as listening:
        worker = subprocess.Popen(
            [sys.executable, "-m", "tgi_gateway.launcher.http_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listening.fileno(), report_write],
            start_new_session=True,
        )
        os.close(report_write)
        assert worker.stdin is not None
        assignment = Assignment(
            process="http",
            settings=settings,
            report_fd=report_write,
            runtime_folder=str(runtime),
            socket_path=str(socket_path),
            model_path=str(folder),
            listen_fd=listening.fileno(),
        )
        worker.stdin.write(msgspec.json.encode(assignment) + b"\n")
        worker.stdin.flush()
        try:
            with open(report_read, "rb") as reports:
                line = await asyncio.to_thread(reports.readline)
            report = msgspec.json.decode(line, type=Report)
            if report.kind != "ready":
                sys.exit(f"the HTTP worker did not start: {report.text}")
            yield Served(worker.pid, listening.getsockname()[1])
        finally:
            await ended(worker)
            await ended(engine)


# The client.


@dataclass
class Tally:
    """What all streams of a run received."""

    tokens: int = 0
    requests: int = 0
    wrong: list[str] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)
    """From the engine's step to the client, of some tokens."""
    stopping: bool = False


class Stream(asyncio.Protocol):
    """One connection that asks again as soon as an answer is complete."""

    def __init__(self, request: bytes, marks: int, tally: Tally, sample: bool) -> None:
        self._request = request
        self._marks = marks
        self._tally = tally
        self._sample = sample
        self._seen = 0
        self._tail = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        # A mark may lie across two reads: the last 5 bytes of a read are looked at again with the next.
        window = self._tail + data
        found = window.count(b"data: ")
        self._tail = window[-5:]
        self._seen += found
        self._tally.tokens += found
        if self._sample and found:
            at = data.find(b'"logprob":-')
            if at >= 0:
                self._tally.delays_s.append(now - float(data[at + 11 : data.index(b",", at)]))
        if not data.endswith(b"0\r\n\r\n"):
            return
        if self._seen != self._marks:
            self._tally.wrong.append(f"{self._seen} events instead of {self._marks}: {data[:200]!r}")
        self._tally.requests += 1
        self._seen, self._tail = 0, b""
        if self._tally.stopping or self._tally.wrong:
            self.transport.close()
        else:
            self.transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._tally.stopping and not self._tally.wrong:
            self._tally.wrong.append(f"connection lost: {error}")
        if not self.done.done():
            self.done.set_result(None)


def post(path: str, body: object) -> bytes:
    data = msgspec.json.encode(body)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


@dataclass
class Throughput:
    """One run. Rates are per second."""

    name: str
    streams: int
    tokens: int
    requests: int
    wall_s: float
    cpu_s: float
    tokens_per_core_s: float
    tokens_per_s: float
    microseconds_per_token: float
    delay_p50_ms: float | None = None
    delay_p99_ms: float | None = None


async def measure(
    name: str, served: Served, request: bytes, marks: int, *, streams: int, seconds: float, sample: bool = False
) -> Throughput:
    loop = asyncio.get_running_loop()
    tally = Tally()
    connections = []
    for _ in range(streams):
        _transport, stream = await loop.create_connection(
            functools.partial(Stream, request, marks, tally, sample), "127.0.0.1", served.port
        )
        connections.append(stream)
    await asyncio.sleep(min(1.0, seconds / 4))
    tokens, requests, cpu_s, began = tally.tokens, tally.requests, served.cpu_s(), time.perf_counter()
    tally.delays_s.clear()
    await asyncio.sleep(seconds)
    wall_s, cpu_s = time.perf_counter() - began, served.cpu_s() - cpu_s
    tokens, requests, delays_s = tally.tokens - tokens, tally.requests - requests, sorted(tally.delays_s)
    tally.stopping = True
    for stream in connections:
        stream.transport.abort()
    await asyncio.gather(*(stream.done for stream in connections))
    if tally.wrong:
        sys.exit(f"{name}: {tally.wrong[0]}")
    return Throughput(
        name,
        streams,
        tokens,
        requests,
        wall_s,
        cpu_s,
        tokens_per_core_s=tokens / cpu_s,
        tokens_per_s=tokens / wall_s,
        microseconds_per_token=cpu_s / tokens * 1e6,
        delay_p50_ms=percentile(delays_s, 0.5),
        delay_p99_ms=percentile(delays_s, 0.99),
    )


def percentile(ordered: list[float], part: float) -> float | None:
    """In milliseconds, of sorted seconds."""
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)] * 1e3 if ordered else None


@dataclass
class Latency:
    """One request after the other, each for one token that the engine makes at once."""

    name: str
    requests: int
    p50_ms: float
    p99_ms: float
    mean_ms: float


async def added_latency(name: str, served: Served, request: bytes, requests: int) -> Latency:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    times_s = []
    for number in range(requests + requests // 10):
        began = time.perf_counter()
        writer.write(request)
        answer = b""
        while not (answer.endswith(b"0\r\n\r\n") or (b"content-length" in answer and answer.endswith(b"}"))):
            answer += await reader.read(65536)
        if number >= requests // 10:
            times_s.append(time.perf_counter() - began)
        if not answer.startswith(b"HTTP/1.1 200"):
            sys.exit(f"{name}: {answer!r}")
    writer.close()
    times_s.sort()
    p50, p99 = percentile(times_s, 0.5), percentile(times_s, 0.99)
    assert p50 is not None
    assert p99 is not None
    return Latency(name, requests, p50, p99, statistics.fmean(times_s) * 1e3)


# The model: a tokenizer is all that is needed.


def demo_model() -> Path | None:
    """The bundled model, if it is installed with its weights."""
    spec = find_spec("tgi_demo_model")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for found in sorted(Path(place).rglob("tokenizer.json")):
            return found.parent
    return None


def train_tokenizer(folder: Path) -> None:
    """Byte-level BPE of 4,096 tokens over this repository's own text."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "gateway").rglob("*.py"))]
    inner.train_from_iterator(texts, trainer)
    inner.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def model_info(folder: Path) -> ModelInfo:
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return ModelInfo(
        model_id="null",
        max_input_tokens=MAX_TOTAL_TOKENS - 1,
        max_total_tokens=MAX_TOTAL_TOKENS,
        max_batch_total_tokens=MAX_TOTAL_TOKENS * 4096,
        max_batch_prefill_tokens=MAX_TOTAL_TOKENS,
        max_sequences=4096,
        vocab_size=inner.get_vocab_size(),
        eos_token_ids=(),
        device="none",
    )


# What is measured.


def native(tokens: int) -> bytes:
    return post("/generate_stream", {"inputs": PROMPT, "parameters": {"max_new_tokens": tokens}})


def chat(tokens: int, *, stream: bool = True) -> bytes:
    messages = [{"role": "user", "content": PROMPT}]
    return post("/v1/chat/completions", {"messages": messages, "max_tokens": tokens, "stream": stream})


@dataclass
class Results:
    machine: dict[str, object]
    model: str
    throughput: list[Throughput]
    latency: list[Latency]


async def bench(folder: Path, *, seconds: float, streams: int, tokens: int, offered: int) -> Results:
    results = Results(machine(), str(folder), [], [])

    async def run(name: str, served: Served, request: bytes, marks: int, *, sample: bool = False) -> None:
        done = await measure(name, served, request, marks, streams=streams, seconds=seconds, sample=sample)
        results.throughput.append(done)

    async with bare_application() as served:
        await run("bare ASGI, each its own", served, post(f"/{tokens}/{streams / offered}", {}), tokens)
        await run("bare ASGI, flood", served, post(f"/{tokens}/0", {}), tokens)
    async with gateway(folder, streams / offered) as served:
        await run("native, each its own", served, native(tokens), tokens, sample=True)
        await run("chat, each its own", served, chat(tokens), tokens + 1)
    async with gateway(folder, streams / TARGET_TOKENS_PER_S) as served:
        await run(f"native, {TARGET_TOKENS_PER_S:,}/s offered", served, native(tokens), tokens, sample=True)
    async with gateway(folder, streams / 400_000) as served:
        await run("native, flood", served, native(tokens), tokens, sample=True)
        await run("chat, flood", served, chat(tokens), tokens + 1)
    async with gateway(folder, 0.0) as served:
        requests = int(200 * max(seconds, 1))
        generate = post("/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 1}})
        results.latency.append(await added_latency("/generate", served, generate, requests))
        results.latency.append(await added_latency("/generate_stream", served, native(1), requests))
        results.latency.append(await added_latency("/v1/chat/completions", served, chat(1, stream=False), requests))
    return results


def show(results: Results) -> None:
    print(", ".join(f"{name} {value}" for name, value in results.machine.items()))
    print(f"\n{'stream':26}{'tokens/core-s':>15}{'us/token':>10}{'tokens/s wall':>15}{'delay p50':>11}{'p99 ms':>8}")
    for run in results.throughput:
        delay = f"{run.delay_p50_ms:11.2f}{run.delay_p99_ms:8.2f}" if run.delay_p50_ms is not None else ""
        print(
            f"{run.name:26}{run.tokens_per_core_s:15,.0f}{run.microseconds_per_token:10.2f}"
            f"{run.tokens_per_s:15,.0f}{delay}"
        )
    print(f"\n{'added latency':26}{'p50 ms':>15}{'p99 ms':>10}{'mean ms':>15}")
    for latency in results.latency:
        print(f"{latency.name:26}{latency.p50_ms:15.3f}{latency.p99_ms:10.3f}{latency.mean_ms:15.3f}")
    print(f"\ntargets: {TARGET_TOKENS_PER_S:,} tokens/core-s, {TARGET_ADDED_MS} ms at the median")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--seconds", type=float, default=5.0, help="per throughput measurement")
    parser.add_argument("--streams", type=int, default=64, help="concurrent streams")
    parser.add_argument("--tokens", type=int, default=500, help="tokens per answer")
    parser.add_argument("--offered", type=int, default=16_000, help="tokens per second of the paced engine")
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--engine", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--socket", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="model folder, of which the tokenizer is used")
    arguments = parser.parse_args()
    if arguments.bare is not None:
        bare_server(arguments.bare)
        return
    if arguments.engine is not None:
        uvloop.run(engine_host(model_info(arguments.model), arguments.engine, arguments.socket))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or demo_model()
        if folder is None:
            folder = Path(scratch)
            train_tokenizer(folder)
        results = uvloop.run(
            bench(
                folder,
                seconds=arguments.seconds,
                streams=arguments.streams,
                tokens=arguments.tokens,
                offered=arguments.offered,
            )
        )
        if folder == Path(scratch):
            results = replace(results, model="tokenizer trained on this repository")
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(results), indent=2) + "\n")


if __name__ == "__main__":
    main()
