"""What SteppingBackend does with engines that break its rules, and that a hanging one keeps no process from ending."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from inbox import Inbox, running

from tgi_gateway.backend import Capabilities, ModelInfo
from tgi_gateway.errors import GatewayError, StartError, Unhealthy
from tgi_gateway.stepping import Row, SteppingBackend
from tgi_gateway.testing import toy_model
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StopRules, Token

Step = Callable[[Sequence[Row]], Sequence[Token | GatewayError]]
ABLE = Capabilities(features=frozenset({"min_new_tokens", "stop_token_ids", "prefill_logprobs"}))


def counted(rows: Sequence[Row]) -> Sequence[Token | GatewayError]:
    return [Token(row.request.request_id, row.token_ids[-1] + 1) for row in rows]


class Engine(SteppingBackend):
    """Counts, or does what `step` says; remembers of each row what it needs for the prompt's log-probabilities."""

    def __init__(self, step: Step = counted) -> None:
        super().__init__(ABLE, health_timeout_s=1.0)
        self._told = step
        self.kept: dict[int, tuple[float, ...]] = {}

    def load(self) -> ModelInfo:
        return toy_model(vocab_size=100, eos_token_ids=(2,), max_total_tokens=64, max_sequences=4)

    def step(self, rows: Sequence[Row]) -> Sequence[Token | GatewayError]:
        for row in rows:
            self.kept[row.request.request_id] = (0.5,) * len(row.request.input_ids)
        return self._told(rows)

    def release(self, row: Row) -> None:
        self.kept.pop(row.request.request_id, None)

    def prompt_logprobs(self, row: Row) -> tuple[float, ...]:
        return self.kept[row.request.request_id]


def request(request_id: int, *prompt: int, prefill_logprobs: bool = False) -> Request:
    return Request(request_id, prompt, SamplingParams(), StopRules(4), prefill_logprobs=prefill_logprobs)


async def test_a_step_with_too_few_tokens_is_told_with_both_numbers() -> None:
    engine = Engine(lambda rows: counted(rows)[:-1])
    async with running(engine) as inbox:
        engine.submit(request(1, 5))
        engine.submit(request(2, 6))
        await inbox.ending(1)
        engine.submit(request(3, 6))
        endings = [await inbox.ending(each) for each in (1, 2, 3)]
    told = "the engine has stopped: step returned 1 tokens for 2 rows"
    assert endings == [Failed(each, "incomplete_generation", told) for each in (1, 2, 3)]


async def test_tokens_in_another_order_than_the_rows_are_noticed() -> None:
    engine = Engine(lambda rows: counted(rows)[::-1])
    async with running(engine) as inbox:
        engine.submit(request(1, 5))
        engine.submit(request(2, 6))
        ending = await inbox.ending(1)
    assert isinstance(ending, Failed)
    assert "a token of request 2 in the place of request 1" in ending.message


async def test_an_idle_engine_whose_step_returns_nothing_is_unhealthy() -> None:
    engine = Engine(lambda _: [])
    async with running(engine):
        with pytest.raises(Unhealthy):
            await engine.health()


@pytest.mark.parametrize("token_id", [100, -1])
async def test_a_token_outside_the_vocabulary_fails_its_own_request(token_id: int) -> None:
    def step(rows: Sequence[Row]) -> Sequence[Token]:
        ids = [token_id if row.request.request_id == 1 else 7 for row in rows]
        return [Token(row.request.request_id, each) for row, each in zip(rows, ids, strict=True)]

    engine = Engine(step)
    async with running(engine) as inbox:
        engine.submit(request(1, 5))
        engine.submit(request(2, 6))
        endings = [await inbox.ending(each) for each in (1, 2)]
    told = f"the engine chose token {token_id}, which is not in its vocabulary of 100"
    assert endings[0] == Failed(1, "generation", told)
    assert isinstance(endings[1], Finished)
    assert inbox.tokens(1) == []


async def test_a_row_is_released_after_it_was_asked_for_its_prompt() -> None:
    """What a model remembers of a row may go in `release`, whether the row ended or was cancelled."""
    engine = Engine()
    async with running(engine) as inbox:
        engine.submit(request(1, 5, 6, prefill_logprobs=True))
        ending = await inbox.ending(1)
    assert isinstance(ending, Finished)
    assert ending.prefill_logprobs == (0.5, 0.5)
    assert engine.kept == {}


def test_what_would_end_an_answer_too_early_is_held_back() -> None:
    engine = Engine()
    engine.model = engine.load()
    stop = StopRules(8, min_new_tokens=2, stop_token_ids=(7,))
    row = Row(Request(1, (5,), SamplingParams(), stop), output=[3])
    assert engine.held_back(row) == (2, 7)
    row.output.append(4)
    assert engine.held_back(row) == ()


async def test_an_engine_that_cannot_load_leaves_no_thread() -> None:
    class Unloadable(Engine):
        def load(self) -> ModelInfo:
            raise StartError("no such device")

    engine = Unloadable()
    with pytest.raises(StartError, match="no such device"):
        await engine.start(Inbox().emit)
    engine._thread._thread.join(10)
    assert not engine._thread._thread.is_alive()


HANGING = """
import asyncio, threading
from test_stepping import Engine, Inbox, request

async def main():
    engine = Engine(lambda _: threading.Event().wait())
    await engine.start(Inbox().emit)
    engine.submit(request(1, 5))
    await asyncio.sleep(0.05)
    await engine.stop(0.0)

asyncio.run(main())
"""


def test_a_step_that_hangs_does_not_keep_its_process_from_ending() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", HANGING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, check=False)
    assert done.returncode == 0, done.stderr
