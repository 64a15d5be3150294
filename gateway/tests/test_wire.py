"""The wire between HTTP workers and engine host, over real sockets."""

# Tests look at files and start processes as tests do, also inside coroutines.
# ruff: noqa: ASYNC220, ASYNC240

from __future__ import annotations

import asyncio
import math
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgi_gateway.backend import API_VERSION, Capacity
from tgi_gateway.errors import StartError, Unhealthy
from tgi_gateway.testing import EchoBackend, toy_model
from tgi_gateway.testing.manual import ManualBackend
from tgi_gateway.types import (
    NO_LOGPROB,
    Event,
    Failed,
    Finished,
    FinishReason,
    Grammar,
    GrammarKind,
    Request,
    SamplingParams,
    StepEvents,
    StopRules,
    Token,
    TokenIds,
    Usage,
)
from tgi_gateway.wire import engine_pb2 as pb
from tgi_gateway.wire.channel import ATTACH, OPTIONS, SERVICE
from tgi_gateway.wire.client import RemoteBackend
from tgi_gateway.wire.codec import decode_capacity, decode_request, decode_step, encode_request, encode_step
from tgi_gateway.wire.server import MAX_PENDING_ROWS, WireServer, serve

WORKER_1 = 1 << 48
MODEL = toy_model(vocab_size=100, max_total_tokens=2_000_000, max_sequences=4)


def request(request_id: int, *, prompt_tokens: int = 3) -> Request:
    return Request(request_id, (1,) * prompt_tokens, SamplingParams(), StopRules(10))


class Worker:
    """An HTTP worker's end: the remote backend and what it emitted."""

    def __init__(self, path: Path, index: int = 0, on_lost: Callable[[str], None] | None = None) -> None:
        self.backend = RemoteBackend(path, worker=index, connect_timeout_s=10.0, on_lost=on_lost)
        self.messages: list[StepEvents] = []
        self._arrived = asyncio.Event()

    def emit(self, events: StepEvents) -> None:
        self.messages.append(events)
        self._arrived.set()

    def events(self) -> list[Event]:
        return [event for message in self.messages for event in message.events()]

    async def until(self, ready: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not ready():
                self._arrived.clear()
                await self._arrived.wait()

    async def ended(self, request_id: int) -> Finished | Failed:
        def ending() -> Finished | Failed | None:
            for event in self.events():
                if event.request_id == request_id and not isinstance(event, Token):
                    return event
            return None

        await self.until(lambda: ending() is not None)
        found = ending()
        assert found is not None
        return found


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "engine.sock"


@pytest.fixture
def engine() -> ManualBackend:
    return ManualBackend(MODEL)


@pytest.fixture
async def server(engine: ManualBackend, socket_path: Path) -> AsyncIterator[WireServer]:
    started = await serve(engine, socket_path)
    yield started
    await started.stop(0.0)


@pytest.fixture
async def worker(server: WireServer, socket_path: Path) -> AsyncIterator[Worker]:  # noqa: ARG001
    attached = Worker(socket_path)
    await attached.backend.start(attached.emit)
    yield attached
    await attached.backend.stop(0.0)


async def in_engine(engine: ManualBackend, request_id: int) -> Request:
    return await asyncio.to_thread(engine.wait_for, request_id)


# What crosses.

token_ids = st.integers(0, 2**32 - 1)
request_ids = st.integers(0, 2**64 - 1)
numbers = st.floats(allow_nan=False)
counts = st.integers(0, 2**32 - 1)
grammars = st.none() | st.builds(
    Grammar, st.sampled_from(["json", "regex", "json_schema", "choice", "lark"]), st.text()
)
requests = st.builds(
    Request,
    request_id=request_ids,
    input_ids=st.lists(st.integers(0, 2**31 - 1)).map(tuple),
    sampling=st.builds(
        SamplingParams,
        do_sample=st.booleans(),
        temperature=numbers,
        top_k=counts,
        top_p=numbers,
        min_p=numbers,
        typical_p=numbers,
        seed=request_ids,
        repetition_penalty=numbers,
        frequency_penalty=numbers,
        presence_penalty=numbers,
        logit_bias=st.lists(st.tuples(token_ids, numbers)).map(tuple),
        watermark=st.booleans(),
        grammar=grammars,
    ),
    stop=st.builds(
        StopRules,
        max_new_tokens=counts,
        min_new_tokens=counts,
        ignore_eos=st.booleans(),
        stop_token_ids=st.lists(token_ids).map(tuple),
        stop_strings=st.lists(st.text()).map(tuple),
    ),
    logprobs=st.booleans(),
    top_n_tokens=counts,
    prefill_logprobs=st.booleans(),
    prefill_top_n_tokens=counts,
    adapter_id=st.none() | st.text(),
    cache_salt=st.text(),
    name=st.text(),
    tenant=st.text(),
    priority=st.integers(-(2**31), 2**31 - 1),
)
tops = st.lists(st.tuples(token_ids, numbers), max_size=3).map(tuple)
reasons: st.SearchStrategy[FinishReason] = st.sampled_from(["length", "eos_token", "stop_sequence", "cancelled"])
usages = st.builds(Usage, counts, counts, counts)
steps = st.builds(
    lambda tokens, finished, failed: StepEvents.pack([*tokens, *finished, *failed]),
    st.lists(st.builds(Token, request_ids, token_ids, numbers, tops)),
    st.lists(
        st.builds(
            Finished,
            request_ids,
            reasons,
            usages,
            numbers,
            st.lists(numbers).map(tuple),
            st.lists(tops, max_size=3).map(tuple),
        )
    ),
    st.lists(st.builds(Failed, request_ids, st.text(), st.text())),
)


@settings(deadline=None)
@given(requests)
def test_a_request_crosses_unchanged(sent: Request) -> None:
    message = pb.Request.FromString(encode_request(sent).SerializeToString())
    assert decode_request(message) == sent


def test_ids_cross_from_any_sequence_and_the_32nd_bit_makes_them_nobodys() -> None:
    for sent, got in (((7, 2**31 - 1), (7, 2**31 - 1)), (TokenIds((5, 6)), (5, 6)), ((2**32 - 1,), (-1,))):
        message = pb.Request.FromString(encode_request(replace(request(1), input_ids=sent)).SerializeToString())
        ids = decode_request(message).input_ids
        assert (ids, hash(ids), ids[1:]) == (got, hash(got), got[1:])
        assert ids != (*got, 1)
        assert ids == TokenIds(got)


@given(steps, st.none() | st.builds(Capacity, counts, counts, counts, counts, counts))
def test_a_step_crosses_unchanged(sent: StepEvents, capacity: Capacity | None) -> None:
    message = pb.StepEvents.FromString(encode_step(sent, capacity).SerializeToString())
    assert decode_step(message) == sent
    assert (decode_capacity(message.capacity) if message.HasField("capacity") else None) == capacity


def test_a_missing_logprob_stays_missing() -> None:
    message = encode_step(
        StepEvents.pack([Token(1, 2), Finished(1, "length", Usage(1, 1), 0.0, (NO_LOGPROB, -1.0))]), None
    )
    received = decode_step(message)
    assert math.isnan(received.logprobs[0])
    assert math.isnan(received.finished[0].prefill_logprobs[0])
    assert received.finished[0].prefill_logprobs[1] == -1.0


def test_a_lone_surrogate_in_an_error_message_does_not_stop_the_step() -> None:
    message = encode_step(StepEvents(failed=[Failed(1, "generation", "bad \ud800 text")]), None)
    assert decode_step(message).failed[0].message == "bad ? text"


# The socket.


async def test_socket_and_folder_are_for_this_user_alone(server: WireServer, socket_path: Path) -> None:
    assert server.info == MODEL
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(socket_path.parent.stat().st_mode) == 0o700


async def test_a_folder_that_others_may_enter_is_refused(engine: ManualBackend, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(StartError, match="mode 0755"):
        await serve(engine, folder / "engine.sock")


async def test_a_folder_that_cannot_be_made_is_refused(engine: ManualBackend, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="cannot be made"):
        await serve(engine, tmp_path / "file" / "engine.sock")


async def test_a_path_that_is_too_long_for_a_socket_is_refused(engine: ManualBackend, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="Unix sockets allow 107"):
        await serve(engine, tmp_path / ("x" * 100) / "engine.sock")


async def test_a_file_in_the_sockets_place_is_left_alone(engine: ManualBackend, socket_path: Path) -> None:
    socket_path.parent.mkdir(mode=0o700)
    socket_path.write_text("precious")
    with pytest.raises(StartError, match="is not a socket"):
        await serve(engine, socket_path)
    assert socket_path.read_text() == "precious"


async def test_the_socket_of_a_killed_host_is_replaced(engine: ManualBackend, socket_path: Path) -> None:
    socket_path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(socket_path))
    started = await serve(engine, socket_path)
    await started.stop(0.0)
    assert not socket_path.exists()


async def test_the_socket_of_a_living_host_is_not_taken_over(server: WireServer, socket_path: Path) -> None:
    assert server.info == MODEL
    with pytest.raises(StartError, match="already listens"):
        await serve(ManualBackend(MODEL), socket_path)


# Requests and steps.


async def test_a_request_reaches_the_engine_and_its_step_comes_back_as_one_message(
    engine: ManualBackend, worker: Worker
) -> None:
    sent = replace(request(1), sampling=SamplingParams(do_sample=True, seed=2**64 - 1), logprobs=True)
    worker.backend.submit(sent)
    worker.backend.submit(request(2))
    assert await in_engine(engine, 1) == sent
    await in_engine(engine, 2)
    step: list[Event] = [
        Token(1, 5, -0.5, ((5, -0.5),)),
        Token(2, 6, -1.0),
        Finished(1, "eos_token", Usage(3, 1, 2), 0.25),
    ]
    engine.step(*step)
    await worker.ended(1)
    assert [list(message.events()) for message in worker.messages] == [step]


async def test_capabilities_model_and_capacity_arrive_with_the_welcome(
    engine: ManualBackend, server: WireServer, socket_path: Path
) -> None:
    worker = Worker(socket_path)
    with pytest.raises(RuntimeError, match="after start"):
        _ = worker.backend.capabilities
    assert await worker.backend.start(worker.emit) == server.info
    assert worker.backend.capabilities == engine.capabilities
    assert worker.backend.capacity() == engine.free
    await worker.backend.stop(0.0)


async def test_capacity_that_changes_without_an_event_is_told(engine: ManualBackend, worker: Worker) -> None:
    engine.free = Capacity(4, 1, 100, 7, 3, 20, 11)
    async with asyncio.timeout(10):
        while worker.backend.capacity() != engine.free:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert worker.messages == []


async def test_a_cancel_reaches_the_engine(engine: ManualBackend, worker: Worker) -> None:
    worker.backend.submit(request(1))
    worker.backend.cancel(99)
    worker.backend.cancel(1)
    await asyncio.to_thread(engine.wait_for_cancel, 1)
    assert engine.cancelled == [1]
    engine.finish(1, "cancelled")
    await worker.ended(1)
    worker.backend.cancel(1)
    worker.backend.submit(request(2))
    await in_engine(engine, 2)
    assert engine.cancelled == [1]


async def test_submit_and_cancel_may_come_from_any_thread(engine: ManualBackend, worker: Worker) -> None:
    def client(number: int) -> None:
        for index in range(1, 51):
            worker.backend.submit(request(number * 50 + index))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    for request_id in range(1, 201):
        await in_engine(engine, request_id)
    assert len(engine.submitted) == 200


async def test_each_worker_gets_its_own_requests_only(engine: ManualBackend, worker: Worker, socket_path: Path) -> None:
    other = Worker(socket_path, 1)
    await other.backend.start(other.emit)
    mine, theirs = 5, WORKER_1 + 5
    worker.backend.submit(request(mine))
    other.backend.submit(request(theirs))
    await in_engine(engine, mine)
    await in_engine(engine, theirs)
    engine.step(
        Token(theirs, 1, -1.0, ((1, -1.0),)),
        Token(mine, 2, -2.0),
        Token(theirs, 3, -3.0, ((3, -3.0),)),
        Finished(mine, "length", Usage(3, 1)),
        Failed(theirs, "generation", "broken"),
    )
    await worker.ended(mine)
    await other.ended(theirs)
    assert worker.events() == [Token(mine, 2, -2.0), Finished(mine, "length", Usage(3, 1))]
    assert other.events() == [
        Token(theirs, 1, -1.0, ((1, -1.0),)),
        Token(theirs, 3, -3.0, ((3, -3.0),)),
        Failed(theirs, "generation", "broken"),
    ]
    await other.backend.stop(0.0)


async def test_a_prompt_of_a_million_tokens_passes(engine: ManualBackend, worker: Worker) -> None:
    long = replace(request(1), input_ids=tuple(range(2**30, 2**30 + 1_000_000)), prefill_logprobs=True)
    worker.backend.submit(long)
    assert await in_engine(engine, 1) == long
    logprobs = (0.5,) * 1_000_000
    engine.step(Finished(1, "length", Usage(1_000_000, 1), 0.0, logprobs))
    ending = await worker.ended(1)
    assert isinstance(ending, Finished)
    assert ending.prefill_logprobs == logprobs


@pytest.mark.parametrize(
    "impossible",
    [
        replace(request(1), input_ids=(-1,)),
        replace(request(1), stop=StopRules(2**40)),
        replace(request(1), cache_salt="\ud800"),
    ],
)
async def test_what_no_message_can_hold_fails_without_reaching_the_engine(
    engine: ManualBackend, worker: Worker, impossible: Request
) -> None:
    worker.backend.submit(impossible)
    ending = await worker.ended(1)
    assert isinstance(ending, Failed)
    assert ending.error_type == "validation"
    assert engine.submitted == {}


async def test_an_id_that_is_open_cannot_be_submitted_again(engine: ManualBackend, worker: Worker) -> None:
    worker.backend.submit(request(1))
    worker.backend.submit(request(1))
    assert isinstance(await worker.ended(1), Failed)
    await in_engine(engine, 1)
    engine.finish(1)
    await worker.until(lambda: any(isinstance(event, Finished) for event in worker.events()))
    assert list(engine.submitted) == [1]


# Slow and broken peers.


async def test_steps_that_a_busy_worker_has_not_fetched_are_merged(engine: ManualBackend, worker: Worker) -> None:
    worker.backend.submit(request(1))
    await in_engine(engine, 1)
    for token_id in range(1000):  # the event loop, and with it the stream, gets no turn in between
        engine.step(Token(1, token_id % 100, -float(token_id), ((token_id % 100, -1.0),)))
    engine.finish(1)
    await worker.ended(1)
    assert len(worker.messages) < 10
    tokens = [event for event in worker.events() if isinstance(event, Token)]
    assert [token.logprob for token in tokens] == [-float(token_id) for token_id in range(1000)]
    assert all(token.top == ((token.token_id, -1.0),) for token in tokens)


async def test_a_worker_that_is_always_late_gets_steps_merged_instead_of_a_growing_backlog(socket_path: Path) -> None:
    program = f"""
import asyncio
from pathlib import Path
from tgi_gateway.testing import EchoBackend
from tgi_gateway.wire.server import serve

async def main():
    await (await serve(EchoBackend(step_s=0.001), Path({str(socket_path)!r}))).wait()

asyncio.run(main())
"""
    host = subprocess.Popen([sys.executable, "-c", program])
    try:
        worker = Worker(socket_path)

        def slow(events: StepEvents) -> None:
            time.sleep(0.02)  # twenty steps of the engine
            worker.emit(events)

        await worker.backend.start(slow)
        ids = range(1, 65)
        for request_id in ids:
            worker.backend.submit(replace(request(request_id), stop=StopRules(300)))
        await worker.until(lambda: sum(len(message.finished) for message in worker.messages) == len(ids))
        await worker.backend.stop(0.0)
    finally:
        host.kill()
        host.wait()
    assert sum(len(message.request_ids) for message in worker.messages) == 300 * len(ids)
    assert len(worker.messages) < 150


async def test_a_worker_that_reads_nothing_is_cut_off_and_its_requests_are_cancelled(
    engine: ManualBackend, server: WireServer, worker: Worker
) -> None:
    worker.backend.submit(request(1))
    await in_engine(engine, 1)
    rows = 1 << 16
    step = StepEvents([1] * rows, [1] * rows, [0.0] * rows)
    for _ in range(MAX_PENDING_ROWS // rows + 1):
        server.emit(step)
    ending = await worker.ended(1)
    assert isinstance(ending, Failed)
    assert ending.error_type == "incomplete_generation"
    await asyncio.to_thread(engine.wait_for_cancel, 1)


async def test_a_worker_that_leaves_gives_its_requests_back(engine: ManualBackend, worker: Worker) -> None:
    worker.backend.submit(request(1))
    worker.backend.submit(request(2))
    await in_engine(engine, 2)
    engine.finish(1)
    await worker.ended(1)
    await worker.backend.stop(0.0)
    await asyncio.to_thread(engine.wait_for_cancel, 2)
    assert engine.cancelled == [2]
    assert isinstance(await worker.ended(2), Failed)


async def test_a_worker_that_is_killed_gives_its_requests_back(
    engine: ManualBackend, server: WireServer, socket_path: Path
) -> None:
    assert server.info == MODEL
    program = f"""
import asyncio
from pathlib import Path
from tgi_gateway.types import Request, SamplingParams, StopRules
from tgi_gateway.wire.client import RemoteBackend

async def main():
    backend = RemoteBackend(Path({str(socket_path)!r}))
    await backend.start(print)
    backend.submit(Request(1, (1,), SamplingParams(), StopRules(10)))
    await asyncio.sleep(60)

asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        await in_engine(engine, 1)
    finally:
        process.kill()
        process.wait()
    await asyncio.to_thread(engine.wait_for_cancel, 1)


async def test_a_worker_that_comes_back_takes_its_place_and_frees_what_it_held(
    engine: ManualBackend, worker: Worker, socket_path: Path
) -> None:
    worker.backend.submit(request(1))
    await in_engine(engine, 1)
    again = Worker(socket_path)
    await again.backend.start(again.emit)
    await asyncio.to_thread(engine.wait_for_cancel, 1)
    again.backend.submit(request(2))
    await in_engine(engine, 2)
    await again.backend.stop(0.0)


async def test_a_host_that_goes_away_fails_every_open_request_and_a_new_one_is_found(socket_path: Path) -> None:
    host = await serve(ManualBackend(MODEL), socket_path)
    reasons: list[str] = []
    worker = Worker(socket_path, on_lost=reasons.append)
    await worker.backend.start(worker.emit)
    worker.backend.submit(request(1))
    worker.backend.submit(request(2))
    await host.stop(0.0)
    for request_id in (1, 2):
        ending = await worker.ended(request_id)
        assert isinstance(ending, Failed)
        assert ending.error_type == "incomplete_generation"
    assert len(reasons) == 1
    with pytest.raises(Unhealthy):
        await worker.backend.health()
    worker.backend.submit(request(3))
    refused = await worker.ended(3)
    assert isinstance(refused, Failed)
    assert refused.error_type == "healthcheck"

    engine = ManualBackend(replace(MODEL, max_sequences=3))
    host = await serve(engine, socket_path)
    async with asyncio.timeout(10):
        while worker.backend.capacity() != engine.free:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    worker.backend.submit(request(4))
    await in_engine(engine, 4)
    engine.finish(4)
    assert isinstance(await worker.ended(4), Finished)
    await worker.backend.stop(0.0)
    await host.stop(0.0)


async def test_health_is_the_engines(engine: ManualBackend, worker: Worker) -> None:
    await worker.backend.health()
    engine.healthy = False
    with pytest.raises(Unhealthy, match="unhealthy"):
        await worker.backend.health()


async def test_starting_without_a_host_ends_with_a_clear_error(socket_path: Path) -> None:
    backend = RemoteBackend(socket_path, connect_timeout_s=0.2)
    with pytest.raises(StartError, match="no answer in 0"):
        await backend.start(lambda _events: None)
    with pytest.raises(Unhealthy):
        await backend.health()


async def test_stop_waits_for_open_requests(engine: ManualBackend, worker: Worker) -> None:
    worker.backend.submit(request(1))
    await in_engine(engine, 1)
    stopping = asyncio.create_task(worker.backend.stop(30.0))
    await asyncio.sleep(0)
    worker.backend.submit(request(2))
    assert isinstance(await worker.ended(2), Failed)
    engine.finish(1)
    await stopping
    assert isinstance(await worker.ended(1), Finished)
    await worker.backend.stop(30.0)


async def raw_stream(socket_path: Path, *messages: pb.FromWorker) -> grpc.StatusCode:
    """What becomes of a worker that sends these messages."""
    async with grpc.aio.insecure_channel(f"unix:{socket_path}", options=OPTIONS) as channel:
        call: Any = channel.stream_stream(
            f"/{SERVICE}/{ATTACH}",
            request_serializer=pb.FromWorker.SerializeToString,
            response_deserializer=pb.FromHost.FromString,
        )(iter(messages))
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


HELLO = pb.FromWorker(hello=pb.Hello(worker=3, api_version=API_VERSION))


@pytest.mark.parametrize(
    ("messages", "status"),
    [
        ([], grpc.StatusCode.INVALID_ARGUMENT),
        ([pb.FromWorker(cancels=[1])], grpc.StatusCode.INVALID_ARGUMENT),
        ([pb.FromWorker(hello=pb.Hello(worker=3, api_version=API_VERSION + 2))], grpc.StatusCode.FAILED_PRECONDITION),
        ([pb.FromWorker(hello=pb.Hello(worker=3, api_version=API_VERSION + 1))], grpc.StatusCode.OK),
        ([HELLO, pb.FromWorker(submits=[pb.Request(request_id=7)])], grpc.StatusCode.ABORTED),
        ([HELLO, pb.FromWorker(submits=[pb.Request(request_id=(3 << 48) + 7)] * 2)], grpc.StatusCode.ABORTED),
    ],
)
async def test_a_worker_that_breaks_the_rules_is_cut_off_and_a_neighbouring_version_is_not(
    server: WireServer, socket_path: Path, messages: list[pb.FromWorker], status: grpc.StatusCode
) -> None:
    assert server.info == MODEL
    async with asyncio.timeout(10):
        assert await raw_stream(socket_path, *messages) is status


async def test_an_unknown_grammar_kind_fails_that_request_alone(engine: ManualBackend, worker: Worker) -> None:
    newer = replace(request(1), sampling=SamplingParams(grammar=Grammar(cast(GrammarKind, "sonnet"), "")))
    worker.backend.submit(newer)
    worker.backend.submit(request(2))
    ending = await worker.ended(1)
    assert isinstance(ending, Failed)
    assert "sonnet" in ending.message
    await in_engine(engine, 2)


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60))
def test_an_echo_engine_behind_the_wire_answers_as_one_in_process(requests: int, tokens: int) -> None:
    async def answers(through_wire: bool, path: Path) -> list[tuple[int, list[int]]]:
        engine = EchoBackend(toy_model(vocab_size=100))
        received: dict[int, list[int]] = {}
        left, done = requests, asyncio.Event()

        def emit(events: StepEvents) -> None:
            nonlocal left
            for request_id, token_id in zip(events.request_ids, events.token_ids, strict=True):
                received.setdefault(request_id, []).append(token_id)
            left -= len(events.finished)
            if not left:
                done.set()

        host = await serve(engine, path) if through_wire else None
        backend = RemoteBackend(path) if through_wire else engine
        await backend.start(emit)
        for request_id in range(1, requests + 1):
            prompt = (request_id % 100, 1, 2)
            backend.submit(Request(request_id, prompt, SamplingParams(), StopRules(tokens)))
        await asyncio.wait_for(done.wait(), 20)
        await backend.stop(0.0)
        if host is not None:
            await host.stop(0.0)
        return sorted(received.items())

    folder = Path(f"/tmp/tgi-wire-test-{os.getpid()}")
    path = folder / "engine.sock"
    assert asyncio.run(answers(True, path)) == asyncio.run(answers(False, path))
    folder.rmdir()


async def test_a_name_cancels_its_tenants_requests_of_every_worker(
    worker: Worker, engine: ManualBackend, socket_path: Path
) -> None:
    other = Worker(socket_path, index=1)
    await other.backend.start(other.emit)
    named = [
        (worker, replace(request(1), tenant="t", name="n")),
        (other, replace(request(WORKER_1 + 1), tenant="t", name="n")),
        (other, replace(request(WORKER_1 + 2), tenant="u", name="n")),
        (worker, replace(request(2), tenant="t", name="m")),
    ]
    for through, each in named:
        through.backend.submit(each)
        await in_engine(engine, each.request_id)
    assert await worker.backend.cancel_named("t", "n") == 2
    assert sorted(engine.cancelled) == [1, WORKER_1 + 1]
    for through, each in named[:2]:
        engine.finish(each.request_id, "cancelled")
        await through.ended(each.request_id)
    assert await other.backend.cancel_named("t", "n") == 0
    await other.backend.stop(0.0)
    with pytest.raises(Unhealthy):
        await other.backend.cancel_named("t", "m")
