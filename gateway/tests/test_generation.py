"""Generations against a model that thinks of one token at a time."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgi_gateway.api.generation import Generation, Generations, Piece
from tgi_gateway.backend import Capabilities
from tgi_gateway.errors import BackendFailed, GatewayError, IncompleteGeneration, Unsupported
from tgi_gateway.prompt import stops
from tgi_gateway.testing.manual import ManualBackend
from tgi_gateway.types import (
    NO_LOGPROB,
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    StepEvents,
    StopRules,
    Token,
    Usage,
)

EOS = 99
SPECIAL = {EOS: "</s>"}
LETTERS = "abcdefgh"


class Letters:
    """Decoder of a toy vocabulary: ids 0 to 7 are letters; 8 is the first half of "é", 9 its second half."""

    def __init__(self) -> None:
        self._half = False

    def push(self, token_id: int) -> str:
        if token_id == 8:
            lost, self._half = "\ufffd" if self._half else "", True
            return lost
        half, self._half = self._half, False
        if token_id == 9:
            return "é" if half else "\ufffd"
        return ("\ufffd" if half else "") + LETTERS[token_id]

    def flush(self) -> str:
        half, self._half = self._half, False
        return "\ufffd" if half else ""


class Worker:
    def __init__(self) -> None:
        self.engine = ManualBackend()
        self.generations = Generations(self.engine)
        self.generations.bind(asyncio.get_running_loop())
        self.engine.emit = self.generations.emit

    def open(self, *, max_new_tokens: int = 100, stop: tuple[str, ...] = (), keep_stop: bool = True) -> Generation:
        request_id = self.generations.next_id()
        request = Request(request_id, (1, 2, 3), SamplingParams(), StopRules(max_new_tokens, stop_strings=stop))
        matcher = stops.matcher(stop, keep_stop)
        return self.generations.open(request, Letters(), matcher, SPECIAL, frozenset({EOS}))


@pytest.fixture
async def worker() -> Worker:
    return Worker()


def texts(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces]


async def test_a_batch_holds_every_token_that_is_there(worker: Worker) -> None:
    async with worker.open() as generation:
        request_id = generation.request.request_id
        worker.engine.step(Token(request_id, 0, -0.5, ((0, -0.5), (1, -0.9))), Token(request_id, 1))
        worker.engine.token(request_id, 2)
        assert texts(await anext(generation)) == ["a", "b", "c"]
        worker.engine.step(Token(request_id, 3, -0.7))
        assert await anext(generation) == [Piece(3, "d", -0.7, False, ())]
        assert generation.reason is None
        assert len(generation.gaps_s) == 3


async def test_waiting_ends_with_the_first_token(worker: Worker) -> None:
    async with worker.open() as generation:
        waiting = asyncio.ensure_future(anext(generation))
        await asyncio.sleep(0)
        assert not waiting.done()
        worker.engine.token(generation.request.request_id, 0)
        assert texts(await waiting) == ["a"]


async def test_the_last_batch_knows_that_it_is_the_last(worker: Worker) -> None:
    async with worker.open() as generation:
        request_id = generation.request.request_id
        worker.engine.step(Token(request_id, 0), Finished(request_id, "length", Usage(3, 1, cached_tokens=2)))
        batches = [(texts(pieces), generation.reason) async for pieces in generation]
        assert batches == [(["a"], "length")]
        assert generation.usage == Usage(3, 1, 2)
        assert await generation.next() == []
    assert worker.engine.cancelled == []


@pytest.mark.parametrize(("max_new_tokens", "last"), [(2, 1), (100, EOS)])
async def test_a_token_that_may_be_the_last_waits_for_the_ending(
    worker: Worker, max_new_tokens: int, last: int
) -> None:
    async with worker.open(max_new_tokens=max_new_tokens) as generation:
        request_id = generation.request.request_id
        worker.engine.token(request_id, 0)
        assert texts(await anext(generation)) == ["a"]
        waiting = asyncio.ensure_future(anext(generation))
        worker.engine.token(request_id, last)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        worker.engine.finish(request_id)
        [piece] = await waiting
        assert piece.token_id == last
        assert generation.reason == "length"


async def test_an_ending_without_a_token_is_an_empty_last_batch(worker: Worker) -> None:
    async with worker.open() as generation:
        worker.engine.finish(generation.request.request_id, "cancelled")
        assert [pieces async for pieces in generation] == [[]]
        assert generation.reason == "cancelled"


async def test_half_a_character_at_the_end_joins_the_last_piece(worker: Worker) -> None:
    async with worker.open() as generation:
        request_id = generation.request.request_id
        worker.engine.step(Token(request_id, 0), Token(request_id, 8), Finished(request_id, "length", Usage(3, 2)))
        assert texts(await anext(generation)) == ["a", "\ufffd"]
        assert generation.text == "a\ufffd"
        assert generation.rest == ""


async def test_text_that_no_piece_can_carry_is_the_rest(worker: Worker) -> None:
    async with worker.open() as generation:
        request_id = generation.request.request_id
        worker.engine.token(request_id, 8)
        assert texts(await anext(generation)) == [""]
        worker.engine.step(Token(request_id, EOS), Finished(request_id, "eos_token", Usage(3, 2)))
        [piece] = await anext(generation)
        assert (piece.text, piece.special) == ("</s>", True)
        assert (generation.text, generation.rest) == ("\ufffd", "\ufffd")


async def test_a_stop_string_cancels_at_once_and_its_last_batch_waits_for_the_engines_ending(worker: Worker) -> None:
    async with worker.open(stop=("cd",), keep_stop=False) as generation:
        request_id = generation.request.request_id
        worker.engine.step(*(Token(request_id, token_id) for token_id in (0, 2, 3, 4)))
        assert generation.reason == "stop_sequence"
        assert generation.text == "a"
        assert generation.generated_tokens == 3
        assert worker.engine.cancelled == [request_id]
        batch = asyncio.ensure_future(anext(generation))
        for _ in range(2):
            await asyncio.sleep(0)
            assert not batch.done()
            worker.engine.token(request_id, 5)
        worker.engine.finish(request_id, "cancelled")
        assert texts(await batch) == ["a", "", ""]
        assert generation.reason == "stop_sequence"
        assert generation.finished is not None
    assert worker.engine.cancelled == [request_id]


async def test_an_engine_that_fails_after_a_stop_string_takes_nothing_away(worker: Worker) -> None:
    async with worker.open(stop=("c",)) as generation:
        request_id = generation.request.request_id
        worker.engine.step(*(Token(request_id, token_id) for token_id in (0, 2)))
        batch = asyncio.ensure_future(anext(generation))
        await asyncio.sleep(0)
        worker.generations.close(IncompleteGeneration("gone"))
        assert texts(await batch) == ["a", "c"]
        assert generation.reason == "stop_sequence"


async def test_leaving_early_cancels_in_the_engine_and_forgets(worker: Worker) -> None:
    async with worker.open() as generation:
        worker.engine.token(generation.request.request_id, 0)
    assert worker.engine.cancelled == [generation.request.request_id]
    assert len(worker.generations) == 0
    worker.engine.token(generation.request.request_id, 0)


async def test_a_cancelled_waiter_does_not_keep_later_tokens_from_the_next(worker: Worker) -> None:
    async with worker.open() as generation:
        waiting = asyncio.ensure_future(anext(generation))
        await asyncio.sleep(0)
        waiting.cancel()
        worker.engine.token(generation.request.request_id, 0)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert texts(await anext(generation)) == ["a"]


async def test_a_failure_comes_after_the_tokens_before_it(worker: Worker) -> None:
    async with worker.open() as generation:
        request_id = generation.request.request_id
        worker.engine.step(Token(request_id, 0), Token(request_id, EOS), Failed(request_id, "generation", "broken"))
        assert texts(await anext(generation)) == ["a", "</s>"]
        with pytest.raises(BackendFailed, match="broken"):
            await anext(generation)
    assert worker.engine.cancelled == []


async def test_a_decoder_that_raises_fails_its_own_request_alone(worker: Worker) -> None:
    broken, sound = worker.open(), worker.open()
    engine, request_id = worker.engine, broken.request.request_id
    engine.step(Token(request_id, 77), Token(sound.request.request_id, 0))  # 77 is in no vocabulary
    engine.step(Token(request_id, 0), Finished(request_id, "cancelled", Usage(3, 1)))
    assert engine.cancelled == [request_id]
    with pytest.raises(BackendFailed, match="could not be decoded"):
        await anext(broken)
    assert texts(await anext(sound)) == ["a"]


async def test_an_ending_that_cannot_be_decoded_is_a_failure(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_decoder: Letters) -> str:
        raise RuntimeError("no text")

    monkeypatch.setattr(Letters, "flush", broken)
    async with worker.open() as generation:
        request_id = generation.request.request_id
        worker.engine.step(Token(request_id, 0), Finished(request_id, "length", Usage(3, 1)))
        assert texts(await anext(generation)) == ["a"]
        with pytest.raises(BackendFailed, match="could not be decoded"):
            await anext(generation)


async def test_a_lost_engine_fails_everything_that_is_open(worker: Worker) -> None:
    one, two = worker.open(), worker.open()
    waiting = asyncio.ensure_future(anext(one))
    await asyncio.sleep(0)
    worker.generations.close(IncompleteGeneration("gone"))
    for failing in (waiting, anext(two)):
        with pytest.raises(IncompleteGeneration, match="gone"):
            await failing


async def test_events_of_another_thread_arrive(worker: Worker) -> None:
    async with worker.open() as generation:
        request_id = generation.request.request_id
        thread = threading.Thread(target=lambda: worker.engine.token(request_id, 5))
        thread.start()
        assert texts(await anext(generation)) == ["f"]
        thread.join()


async def test_what_the_engine_lacks_is_refused_before_it_is_submitted() -> None:
    class Poor(ManualBackend):
        @property
        def capabilities(self) -> Capabilities:
            return Capabilities()

    engine = Poor()
    generations = Generations(engine)
    request = Request(generations.next_id(), (1,), SamplingParams(do_sample=True), StopRules(1))
    with pytest.raises(Unsupported):
        generations.open(request, Letters(), None, SPECIAL)
    assert engine.submitted == {}
    assert len(generations) == 0


def test_ids_carry_the_worker_and_do_not_come_again_when_it_restarts() -> None:
    before = Generations(ManualBackend(), worker=3)
    ids = {before.next_id() for _ in range(50)}
    after = Generations(ManualBackend(), worker=3, restarts=1)
    ids |= {after.next_id() for _ in range(50)}
    assert len(ids) == 100
    assert all(request_id >> 48 == 3 for request_id in ids)


@dataclass
class Expected:
    """The dumb model: text and ending of one request, from its whole history at once."""

    stop: tuple[str, ...]
    tokens: list[int] = field(default_factory=list)
    ending: FinishReason | GatewayError | None = None

    def outcome(self) -> tuple[int, str, object]:
        """(tokens, text, reason or type of error)."""
        text, decoder = "", Letters()
        for count, token_id in enumerate(self.tokens, 1):
            if token_id != EOS:
                text += decoder.push(token_id)
            found = self._stop_end(text)
            if found is not None:
                return count, text[:found], "stop_sequence"
        if isinstance(self.ending, GatewayError):
            return len(self.tokens), text, type(self.ending)
        text += decoder.flush()
        found = self._stop_end(text)
        if found is not None:
            return len(self.tokens), text[:found], "stop_sequence"
        return len(self.tokens), text, self.ending

    def _stop_end(self, text: str) -> int | None:
        ends = [text.index(string) + len(string) for string in self.stop if string in text]
        return min(ends, default=None)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 25))
def test_any_interleaving_gives_each_request_its_own_text_and_ending(seed: int, requests: int, steps: int) -> None:
    async def read(generation: Generation) -> tuple[list[Piece], object]:
        pieces: list[Piece] = []
        last_batches = 0
        try:
            async with generation:
                async for batch in generation:
                    assert last_batches == 0
                    pieces += batch
                    last_batches += generation.reason is not None
        except GatewayError as error:
            return pieces, type(error)
        assert last_batches == 1
        return pieces, generation.reason

    async def scenario() -> None:
        choose = random.Random(seed)
        worker = Worker()
        expected: dict[int, Expected] = {}
        reading: dict[int, asyncio.Task[tuple[list[Piece], object]]] = {}
        opened: dict[int, Generation] = {}
        for _ in range(requests):
            stop = tuple("".join(choose.choices("abc", k=choose.randint(1, 3))) for _ in range(choose.randint(0, 2)))
            generation = worker.open(stop=stop, max_new_tokens=choose.choice([3, 100]))
            request_id = generation.request.request_id
            opened[request_id] = generation
            expected[request_id] = Expected(stop)
            reading[request_id] = asyncio.create_task(read(generation))
        for step in range(steps + 1):
            events: list[Event] = []
            for request_id, model in expected.items():
                if model.ending is not None:
                    continue
                for _ in range(choose.randint(0, 2)):
                    model.tokens.append(choose.choice([0, 1, 2, 8, 9, EOS]))
                    events.append(Token(request_id, model.tokens[-1], NO_LOGPROB))
                if step == steps or choose.random() < 0.1:
                    if choose.random() < 0.3:
                        model.ending = BackendFailed("broken")
                        events.append(Failed(request_id, "generation", "broken"))
                    else:
                        reasons: list[FinishReason] = ["length", "eos_token", "cancelled"]
                        reason = choose.choice(reasons)
                        model.ending = reason
                        events.append(Finished(request_id, reason, Usage(3, len(model.tokens))))
            worker.engine.emit(StepEvents.pack(events))
            for _ in range(choose.randint(0, 3)):
                await asyncio.sleep(0)
        for request_id, model in expected.items():
            pieces, ending = await asyncio.wait_for(reading[request_id], 5)
            count, text, outcome = model.outcome()
            generation = opened[request_id]
            assert (len(pieces), generation.generated_tokens, ending) == (count, count, outcome)
            assert [piece.token_id for piece in pieces] == model.tokens[:count]
            assert generation.text == text
            shown = "".join(piece.text for piece in pieces if not piece.special) + generation.rest
            assert shown == text
        assert len(worker.generations) == 0

    asyncio.run(scenario())
