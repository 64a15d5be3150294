"""The dispatcher around an engine driven by hand."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgi_gateway.backend import Capacity
from tgi_gateway.errors import Unhealthy
from tgi_gateway.host import scheduler
from tgi_gateway.host.dispatch import Dispatch, HostStats, StepReport
from tgi_gateway.host.pace import UNKNOWN_S
from tgi_gateway.testing import toy_model
from tgi_gateway.testing.manual import ManualBackend
from tgi_gateway.types import Event, Failed, Finished, Request, SamplingParams, StepEvents, StopRules, Token, Usage

MODEL = toy_model(vocab_size=100, max_total_tokens=1000, max_sequences=4)


def request(request_id: int, *, prompt_tokens: int = 10, max_new_tokens: int = 10, priority: int = 0) -> Request:
    prompt = (1,) * prompt_tokens
    return Request(request_id, prompt, SamplingParams(), StopRules(max_new_tokens), priority=priority)


class Host:
    """A dispatcher, the engine below it and the events above it."""

    def __init__(self, engine: ManualBackend, dispatch: Dispatch) -> None:
        self.engine, self.dispatch = engine, dispatch
        self.events: list[Event] = []

    def emit(self, events: StepEvents) -> None:
        self.events += events.events()

    def ending(self, request_id: int) -> Finished | Failed | None:
        endings = [e for e in self.events if not isinstance(e, Token) and e.request_id == request_id]
        assert len(endings) <= 1
        return endings[0] if endings else None


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    engine = ManualBackend(MODEL)
    started = Host(engine, Dispatch(engine, max_concurrent_requests=8))
    await started.dispatch.start(started.emit)
    yield started
    await started.dispatch.stop(0.0)


async def test_a_request_with_room_enters_at_once_and_its_events_come_out(host: Host) -> None:
    host.dispatch.submit(request(1))
    assert list(host.engine.submitted) == [1]
    host.engine.step(Token(1, 7, -0.5))
    host.engine.finish(1)
    assert host.events[0] == Token(1, 7, -0.5)
    assert isinstance(host.ending(1), Finished)
    assert host.dispatch.stats() == HostStats(0, 0, 0)


async def test_no_more_enter_than_there_are_sequences_although_capacity_lags(host: Host) -> None:
    for request_id in range(1, 8):
        host.dispatch.submit(request(request_id))  # the engine's capacity says "4 free" all the time
    assert list(host.engine.submitted) == [1, 2, 3, 4]
    assert host.dispatch.stats() == HostStats(3, 4, batch_tokens=40, batch_max_tokens=80, queue_tokens=30)


async def test_prompts_not_yet_visible_in_capacity_count_against_the_free_tokens(host: Host) -> None:
    host.engine.free = Capacity(4, 4, 100, 100)
    host.dispatch.submit(request(1, prompt_tokens=50))
    host.dispatch.submit(request(2, prompt_tokens=50))
    assert list(host.engine.submitted) == [1]
    host.engine.free = Capacity(4, 3, 100, 50)
    host.engine.token(1)
    assert list(host.engine.submitted) == [1]
    host.engine.free = Capacity(4, 3, 100, 60)
    host.engine.token(1)
    assert list(host.engine.submitted) == [1, 2]


async def test_an_ending_lets_the_next_in_by_priority(host: Host) -> None:
    for request_id in range(1, 5):
        host.dispatch.submit(request(request_id))
    host.dispatch.submit(request(5, priority=1))
    host.dispatch.submit(request(6, priority=-1))
    host.engine.finish(2)
    assert list(host.engine.submitted)[-1] == 6
    host.engine.finish(3)
    assert list(host.engine.submitted)[-1] == 5


async def test_short_prompts_pass_a_long_one_that_finds_no_room(host: Host) -> None:
    host.engine.free = Capacity(4, 4, 1000, 100)
    host.dispatch.submit(request(1))
    host.engine.free = Capacity(4, 3, 1000, 90)
    host.dispatch.submit(request(2, prompt_tokens=500))
    host.dispatch.submit(request(3, prompt_tokens=1))
    assert list(host.engine.submitted) == [1, 3]
    host.dispatch.submit(request(4, prompt_tokens=1, priority=1))
    assert list(host.engine.submitted) == [1, 3], "a later one of lower priority does not"
    host.engine.free = Capacity(4, 4, 1000, 1000)
    host.engine.finish(1)
    assert list(host.engine.submitted) == [1, 3, 2, 4]


async def test_a_long_prompt_is_not_passed_for_ever(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.engine.free = Capacity(4, 4, 1000, 100)
    host.dispatch.submit(request(1))
    host.engine.free = Capacity(4, 3, 1000, 90)
    host.dispatch.submit(request(2, prompt_tokens=500))
    monkeypatch.setattr(scheduler, "PATIENCE_S", 0.0)
    await asyncio.sleep(0.01)
    host.dispatch.submit(request(3, prompt_tokens=1))
    assert list(host.engine.submitted) == [1]
    host.engine.free = Capacity(4, 4, 1000, 1000)
    host.engine.finish(1)
    assert list(host.engine.submitted) == [1, 2, 3]


async def test_prompt_tokens_that_wait_are_bounded_too() -> None:
    engine = ManualBackend(MODEL)
    host = Host(engine, Dispatch(engine, max_concurrent_requests=100, max_queued_tokens=250))
    await host.dispatch.start(host.emit)
    for request_id in range(1, 8):
        host.dispatch.submit(request(request_id, prompt_tokens=100))
    await asyncio.sleep(0)
    assert [host.ending(request_id) is None for request_id in range(1, 8)] == [True] * 6 + [False]
    refused = host.ending(7)
    assert isinstance(refused, Failed)
    assert (refused.error_type, refused.retry_after_s) == ("overloaded", UNKNOWN_S)


async def test_who_is_refused_is_told_when_to_come_again(host: Host) -> None:
    for request_id in range(1, 9):
        host.dispatch.submit(request(request_id))
    for request_id in range(1, 5):
        host.engine.finish(request_id)
    for request_id in range(9, 14):
        host.dispatch.submit(request(request_id))
    await asyncio.sleep(0)
    refused = host.ending(13)
    assert isinstance(refused, Failed)
    assert 1.0 <= refused.retry_after_s < UNKNOWN_S


async def test_a_tenant_with_many_requests_does_not_keep_out_one_with_few(host: Host) -> None:
    for request_id in range(1, 8):
        host.dispatch.submit(replace(request(request_id), tenant="many"))
    host.dispatch.submit(replace(request(8), tenant="few"))
    host.engine.finish(1)
    host.engine.finish(2)
    assert list(host.engine.submitted) == [1, 2, 3, 4, 5, 8]


async def test_memory_that_is_freed_without_an_event_is_found(host: Host) -> None:
    host.engine.free = Capacity(4, 4, 100, 20)
    host.dispatch.submit(request(1))
    host.dispatch.submit(request(2))
    assert list(host.engine.submitted) == [1]
    host.engine.token(1)
    host.engine.free = Capacity(4, 3, 100, 80)
    await asyncio.to_thread(host.engine.wait_for, 2)


async def test_beyond_max_concurrent_requests_a_request_is_overloaded_at_once(host: Host) -> None:
    for request_id in range(1, 10):
        host.dispatch.submit(request(request_id))
    await asyncio.sleep(0)
    assert host.ending(8) is None
    assert host.ending(9) == Failed(9, "overloaded", "Model is overloaded", UNKNOWN_S)
    host.engine.finish(1)
    host.dispatch.submit(request(10))
    assert host.ending(10) is None


async def test_one_tenant_has_no_more_open_than_a_key_may() -> None:
    engine = ManualBackend(MODEL)
    host = Host(engine, Dispatch(engine, max_concurrent_requests=20, max_concurrent_requests_per_key=5))
    await host.dispatch.start(host.emit)
    for request_id in range(1, 7):
        host.dispatch.submit(replace(request(request_id), tenant="a"))
    host.dispatch.submit(replace(request(7), tenant="b"))
    await asyncio.sleep(0)
    refused = host.ending(6)
    assert isinstance(refused, Failed)
    assert refused.error_type == "rate_limited"
    assert "This API key has 5 requests open" in refused.message
    assert host.ending(5) is host.ending(7) is None  # one of a's waits, which counts as well
    engine.finish(1)
    host.dispatch.submit(replace(request(8), tenant="a"))
    await asyncio.sleep(0)
    assert host.ending(8) is None
    await host.dispatch.stop(0.0)


async def test_a_cancel_in_the_queue_ends_at_once_and_never_reaches_the_engine(host: Host) -> None:
    for request_id in range(1, 6):
        host.dispatch.submit(request(request_id))
    host.dispatch.cancel(5)
    await asyncio.sleep(0)
    ending = host.ending(5)
    assert isinstance(ending, Finished)
    assert (ending.reason, ending.usage) == ("cancelled", Usage(10, 0))
    host.engine.finish(1)
    assert 5 not in host.engine.submitted
    assert host.engine.cancelled == []


async def test_cancelling_the_first_in_line_lets_the_next_in(host: Host) -> None:
    host.engine.free = Capacity(4, 4, 1000, 100)
    host.dispatch.submit(request(1))
    host.dispatch.submit(request(2, prompt_tokens=500))
    host.dispatch.submit(request(3, priority=1))
    assert list(host.engine.submitted) == [1]
    host.dispatch.cancel(2)
    assert list(host.engine.submitted) == [1, 3]


async def test_a_running_request_is_cancelled_in_the_engine_which_ends_it(host: Host) -> None:
    host.dispatch.submit(request(1))
    host.dispatch.cancel(1)
    host.dispatch.cancel(77)
    assert host.engine.cancelled == [1]
    assert host.ending(1) is None
    host.engine.finish(1, "cancelled")
    assert isinstance(host.ending(1), Finished)


async def test_a_cancel_during_submit_reaches_the_engine_after_it() -> None:
    class CancelledMeanwhile(ManualBackend):
        def submit(self, request: Request) -> None:
            dispatch.cancel(request.request_id)
            assert self.cancelled == []
            super().submit(request)

    engine = CancelledMeanwhile(MODEL)
    dispatch = Dispatch(engine, max_concurrent_requests=8)
    await dispatch.start(lambda _events: None)
    dispatch.submit(request(1))
    assert engine.cancelled == [1]
    await dispatch.stop(0.0)


async def test_waiting_time_is_added_to_the_engines_own(host: Host) -> None:
    for request_id in range(1, 6):
        host.dispatch.submit(request(request_id))
    time.sleep(0.02)  # noqa: ASYNC251
    host.engine.finish(1)
    host.engine.step(Finished(5, "length", Usage(10, 1), queue_s=1.0))
    ending = host.ending(5)
    assert isinstance(ending, Finished)
    assert ending.queue_s >= 1.02


@pytest.mark.parametrize(
    ("wrong", "error_type"),
    [
        (request(2, prompt_tokens=1000), "validation"),
        (request(2, max_new_tokens=991), "validation"),
        (replace(request(2), stop=StopRules(5, stop_token_ids=(100,))), "validation"),
        (replace(request(2), top_n_tokens=21), "validation"),
        (request(1), "validation"),
    ],
)
async def test_what_breaks_a_rule_fails_and_never_reaches_the_engine(
    host: Host, wrong: Request, error_type: str
) -> None:
    host.dispatch.submit(request(1))
    host.dispatch.submit(wrong)
    await asyncio.sleep(0)
    assert [event.error_type for event in host.events if isinstance(event, Failed)] == [error_type]
    assert list(host.engine.submitted) == [1]


async def test_an_engine_that_raises_in_submit_fails_that_request_alone() -> None:
    class Moody(ManualBackend):
        def submit(self, request: Request) -> None:
            if request.request_id == 2:
                raise RuntimeError("out of sorts, in /secret/path")
            super().submit(request)

    moody = Host(engine := Moody(MODEL), Dispatch(engine, max_concurrent_requests=8))
    await moody.dispatch.start(moody.emit)
    for request_id in (1, 2, 3):
        moody.dispatch.submit(request(request_id))
    await asyncio.sleep(0)
    assert moody.ending(2) == Failed(2, "generation", "The engine did not take the request")
    engine.finish(1)
    engine.finish(3)
    assert isinstance(moody.ending(1), Finished)
    assert isinstance(moody.ending(3), Finished)
    assert moody.dispatch.stats() == HostStats(0, 0, 0)
    await moody.dispatch.stop(0.0)


async def test_an_engine_that_fails_within_submit_neither_recurses_nor_hangs() -> None:
    class Refusing(ManualBackend):
        def submit(self, request: Request) -> None:
            self.fail(request.request_id)

    refusing = Host(engine := Refusing(MODEL), Dispatch(engine, max_concurrent_requests=10_000))
    await refusing.dispatch.start(refusing.emit)
    engine.free = Capacity(0, 0, 0, 0)
    for request_id in range(1, 3000):
        refusing.dispatch.submit(request(request_id))
    assert sorted(event.request_id for event in refusing.events) == list(range(1, 3000))
    await refusing.dispatch.stop(0.0)


async def test_an_engine_that_cannot_tell_its_capacity_still_serves_one_after_the_other() -> None:
    class Secretive(ManualBackend):
        def capacity(self) -> Capacity:
            raise RuntimeError("no comment")

    secretive = Host(engine := Secretive(MODEL), Dispatch(engine, max_concurrent_requests=8))
    await secretive.dispatch.start(secretive.emit)
    secretive.dispatch.submit(request(1))
    secretive.dispatch.submit(request(2))
    assert list(engine.submitted) == [1]
    engine.finish(1)
    assert list(engine.submitted) == [1, 2]
    await secretive.dispatch.stop(0.0)


async def test_second_endings_and_tokens_after_the_end_are_dropped(host: Host) -> None:
    host.dispatch.submit(request(1))
    host.dispatch.submit(request(2))
    host.engine.finish(1)
    host.engine.fail(1)
    host.engine.step(Token(1, 5), Token(2, 6, -0.1, ((6, -0.1),)), Token(99, 7), Finished(1, "length", Usage(1, 1)))
    assert [(event.request_id, type(event)) for event in host.events] == [(1, Finished), (2, Token)]
    assert host.events[1] == Token(2, 6, -0.1, ((6, -0.1),))
    assert host.dispatch.stats().batch_tokens == 11


async def test_idle_health_generates_one_token_that_nobody_else_sees(host: Host) -> None:
    check = asyncio.create_task(host.dispatch.health())
    again = asyncio.create_task(host.dispatch.health())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    [probe] = host.engine.submitted.values()
    assert probe.stop.max_new_tokens == 1
    host.engine.token(probe.request_id)
    host.engine.finish(probe.request_id)
    await asyncio.gather(check, again)
    assert host.events == []


async def test_health_is_cheap_while_tokens_come(host: Host) -> None:
    host.dispatch.submit(request(1))
    host.engine.token(1)
    host.engine.healthy = False
    await host.dispatch.health()
    assert list(host.engine.submitted) == [1]


@pytest.mark.parametrize("answer", ["none", "failed", "raises"])
async def test_idle_health_fails_when_no_token_comes(answer: str) -> None:
    class Broken(ManualBackend):
        def submit(self, request: Request) -> None:
            super().submit(request)
            if answer == "failed":
                self.fail(request.request_id)
            if answer == "raises":
                raise RuntimeError("no")

    engine = Broken(MODEL)
    dispatch = Dispatch(engine, max_concurrent_requests=8, probe_timeout_s=0.05)
    await dispatch.start(lambda _events: None)
    with pytest.raises(Unhealthy):
        await dispatch.health()
    assert engine.cancelled == (list(engine.submitted) if answer == "none" else [])
    await dispatch.stop(0.0)


async def test_a_busy_engine_without_progress_is_asked_itself() -> None:
    engine = ManualBackend(MODEL)
    dispatch = Dispatch(engine, max_concurrent_requests=8, stall_s=0.0)
    await dispatch.start(lambda _events: None)
    dispatch.submit(request(1))
    await dispatch.health()
    engine.healthy = False
    with pytest.raises(Unhealthy):
        await dispatch.health()
    await dispatch.stop(0.0)


async def test_stop_lets_open_requests_finish_and_refuses_new_ones(host: Host) -> None:
    for request_id in range(1, 6):
        host.dispatch.submit(request(request_id))
    stopping = asyncio.create_task(host.dispatch.stop(30.0))
    await asyncio.sleep(0)
    host.dispatch.submit(request(6))
    await asyncio.sleep(0)
    assert host.ending(6) == Failed(6, "healthcheck", "The server is stopping; another one will answer")
    with pytest.raises(Unhealthy):
        await host.dispatch.health()
    for request_id in range(1, 6):
        host.engine.finish(request_id)
    await stopping
    assert isinstance(host.ending(5), Finished)
    assert host.engine.stopped_with is not None
    assert host.engine.stopped_with > 0


async def test_stop_without_patience_fails_what_waits_and_what_the_engine_forgot(host: Host) -> None:
    for request_id in range(1, 6):
        host.dispatch.submit(request(request_id))
    await host.dispatch.stop(0.0)
    for request_id in range(1, 6):
        ending = host.ending(request_id)
        assert isinstance(ending, Failed)
        assert ending.error_type == "incomplete_generation"
    await host.dispatch.stop(0.0)


async def test_the_observer_sees_queue_admissions_and_steps() -> None:
    class Notes:
        def __init__(self) -> None:
            self.queue_sizes: list[int] = []
            self.admissions: list[int] = []
            self.steps: list[StepReport] = []

        def queued(self, stats: HostStats) -> None:
            self.queue_sizes.append(stats.queue_size)

        def admitted(self, requests: int, stats: HostStats, took_s: float) -> None:
            self.admissions.append(requests)
            assert took_s >= 0
            assert stats.running >= requests

        def stepped(self, report: StepReport) -> None:
            self.steps.append(report)

    notes = Notes()
    engine = ManualBackend(MODEL)
    dispatch = Dispatch(engine, max_concurrent_requests=8, observer=notes)
    await dispatch.start(lambda _events: None)
    for request_id in range(1, 7):
        dispatch.submit(request(request_id))
    engine.step(Token(1, 1), Token(2, 1))
    engine.step(Token(1, 1), Token(3, 1), Finished(1, "length", Usage(10, 2)), Finished(2, "length", Usage(10, 1)))
    assert notes.queue_sizes == [1, 1, 1, 1, 1, 2]
    assert notes.admissions == [1, 1, 1, 1, 2]
    assert [(step.prefills, step.decodes) for step in notes.steps] == [(2, 0), (1, 1)]
    assert notes.steps[0].stats == HostStats(2, 4, batch_tokens=42, batch_max_tokens=80, queue_tokens=20)
    assert notes.steps[1].stats == HostStats(2, 2, batch_tokens=21, batch_max_tokens=40, queue_tokens=20)
    assert all(step.duration_s >= 0 for step in notes.steps)
    await dispatch.stop(0.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_every_submit_ends_exactly_once_whatever_happens(seed: int, actions: int) -> None:
    async def scenario() -> None:
        choose = random.Random(seed)
        engine = ManualBackend(replace(MODEL, max_sequences=3))
        tried = Host(engine, Dispatch(engine, max_concurrent_requests=6))
        await tried.dispatch.start(tried.emit)
        submits = Counter[int]()
        for _ in range(actions):
            request_id = choose.randrange(1, 12)
            match choose.randrange(6):
                case 0 | 1:
                    submits[request_id] += 1
                    tried.dispatch.submit(request(request_id, priority=choose.randrange(3)))
                case 2:
                    tried.dispatch.cancel(request_id)
                case 3:
                    engine.token(request_id)
                case 4:
                    engine.fail(request_id)
                case 5 if request_id in engine.submitted:
                    engine.finish(request_id)
                case _:
                    pass
        await tried.dispatch.stop(0.0)
        endings = Counter(event.request_id for event in tried.events if not isinstance(event, Token))
        assert endings == submits
        assert tried.dispatch.stats() == HostStats(0, 0, 0)

    asyncio.run(scenario())


async def test_threads_that_submit_and_cancel_while_the_engine_steps_lose_nothing() -> None:
    engine = ManualBackend(replace(MODEL, max_sequences=8))
    endings: list[int] = []

    def emit(events: StepEvents) -> None:
        for ending in events.events():
            if not isinstance(ending, Token):
                endings.append(ending.request_id)

    dispatch = Dispatch(engine, max_concurrent_requests=10_000)
    await dispatch.start(emit)
    per_thread, threads = 200, 4

    def client(number: int) -> None:
        choose = random.Random(number)
        for index in range(per_thread):
            request_id = number * per_thread + index + 1
            dispatch.submit(request(request_id))
            if choose.random() < 0.3:
                dispatch.cancel(request_id)

    def steps() -> None:
        done = 0
        while True:
            last = not any(worker.is_alive() for worker in workers)
            with engine.changed:
                fresh = list(engine.submitted)[done:]
            for request_id in fresh:
                engine.step(Token(request_id, 1), Finished(request_id, "length", Usage(10, 1)))
            done += len(fresh)
            if last and not fresh:
                return

    workers = [threading.Thread(target=client, args=(number,)) for number in range(threads)]
    stepper = threading.Thread(target=steps)
    for thread in (*workers, stepper):
        thread.start()
    for thread in (*workers, stepper):
        await asyncio.to_thread(thread.join)
    await dispatch.stop(5.0)
    assert sorted(endings) == list(range(1, per_thread * threads + 1))
