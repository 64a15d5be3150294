"""What the echo engine answers. That it is a correct Backend is tested by the contract."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from inbox import Inbox, running

from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import ModelError, Unhealthy
from tgi_gateway.testing import EchoBackend, distribution, plugin_echo, toy_model
from tgi_gateway.testing.echo import toy_model_from
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StepEvents, StopRules, Usage


def request(request_id: int, *prompt: int, max_new_tokens: int = 8, sampling: SamplingParams | None = None) -> Request:
    return Request(request_id, prompt, sampling or SamplingParams(), StopRules(max_new_tokens), logprobs=True)


async def test_the_answer_is_the_prompt_round_and_round() -> None:
    backend = EchoBackend()
    async with running(backend) as inbox:
        backend.submit(request(1, 5, 6, 7))
        ending = await inbox.ending(1)
        assert isinstance(ending, Finished)
        assert (ending.reason, ending.usage) == ("length", Usage(3, 8))
        assert inbox.tokens(1) == [5, 6, 7, 5, 6, 7, 5, 6]


async def test_one_step_gives_one_token_to_each_running_sequence() -> None:
    backend = EchoBackend(toy_model(max_sequences=2))
    async with running(backend) as inbox:
        for request_id in (1, 2, 3):
            backend.submit(request(request_id, request_id, max_new_tokens=2))
        for request_id in (1, 2, 3):
            await inbox.ending(request_id)
        assert [step.request_ids for step in inbox.steps] == [[1, 2], [1, 2], [3], [3]]


async def test_a_prompt_with_the_end_token_ends_the_answer_there() -> None:
    backend = EchoBackend(toy_model(eos_token_ids=(2,)))
    async with running(backend) as inbox:
        backend.submit(request(1, 5, 2, 7))
        ending = await inbox.ending(1)
        assert isinstance(ending, Finished)
        assert (ending.reason, inbox.tokens(1)) == ("eos_token", [5, 2])


async def test_sampling_follows_the_seed_and_the_penalties() -> None:
    backend = EchoBackend()
    async with running(backend) as inbox:
        for request_id, seed in ((1, 11), (2, 11), (3, 12)):
            sampling = SamplingParams(do_sample=True, temperature=2.0, seed=seed)
            backend.submit(request(request_id, 5, max_new_tokens=32, sampling=sampling))
        backend.submit(request(4, 5, sampling=SamplingParams(frequency_penalty=1.5)))
        for request_id in (1, 2, 3, 4):
            await inbox.ending(request_id)
        assert inbox.tokens(1) == inbox.tokens(2) != inbox.tokens(3)
        assert inbox.tokens(4) == [5, 6, 5, 7, 6, 5, 8, 7]  # dearer by 1.5 each time, cheaper by 1 per place


async def test_a_running_engine_at_full_speed_lets_a_cancel_through_within_two_steps() -> None:
    backend = EchoBackend(toy_model(max_total_tokens=1_000_000))
    async with running(backend) as inbox:
        backend.submit(request(1, 5, max_new_tokens=900_000))
        await asyncio.sleep(0.01)
        seen = len(inbox.tokens(1))
        backend.cancel(1)
        ending = await inbox.ending(1)
        assert isinstance(ending, Finished)
        assert ending.reason == "cancelled"
        assert 0 < seen <= len(inbox.tokens(1)) <= seen + 2
        assert backend.capacity().free_kv_tokens == backend.model.max_batch_total_tokens


async def test_a_slow_engine_is_cancelled_between_its_steps() -> None:
    backend = EchoBackend(step_s=3600.0)
    async with running(backend) as inbox:
        backend.submit(request(1, 5))
        await asyncio.sleep(0.01)
        backend.cancel(1)
        await inbox.ending(1)
        assert inbox.tokens(1) == [5]


async def test_stop_lets_open_requests_finish_and_fails_the_rest() -> None:
    backend, inbox = EchoBackend(toy_model(max_total_tokens=1 << 40, max_sequences=1)), Inbox()
    await backend.start(inbox.emit)
    backend.submit(request(1, 5, max_new_tokens=20))
    backend.submit(request(2, 5, max_new_tokens=1 << 39))
    await backend.stop(0.2)
    assert isinstance(await inbox.ending(1), Finished)
    failed = await inbox.ending(2)
    assert isinstance(failed, Failed)
    assert failed.error_type == "incomplete_generation"
    with pytest.raises(Unhealthy):
        await backend.health()
    backend.submit(request(3, 5))
    assert isinstance(await inbox.ending(3), Failed)


async def test_an_emit_that_raises_kills_the_engine_and_health_says_so() -> None:
    died = asyncio.Event()

    def emit(step: StepEvents) -> None:
        if step.failed:
            died.set()
        else:
            raise RuntimeError("the gateway has a bug")

    backend = EchoBackend()
    await backend.start(emit)
    backend.submit(request(1, 5))
    async with asyncio.timeout(10):
        await died.wait()
    with pytest.raises(Unhealthy):
        await backend.health()
    await backend.stop(0.0)


def test_a_prompt_that_goes_round_is_expected_to() -> None:
    assert distribution.expected_in_prompt((5, 6, 7, 5, 6, 9)) == [5, 5, 5, 6, 7]
    assert distribution.expected_in_prompt((5, 5, 6, 5, 5, 5)) == [5, 5, 5, 5, 6]
    assert distribution.expected_in_prompt((5,)) == []


def test_options_and_the_model_folder_size_the_engine(tmp_path: Path) -> None:
    config = {"vocab_size": 99, "eos_token_id": [3, 4], "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = EngineOptions(tmp_path, "m", max_batch_size=3, max_batch_total_tokens=100, extra={"echo_step_ms": 5.0})
    model = toy_model_from(options)
    assert (model.vocab_size, model.eos_token_ids, model.max_total_tokens, model.max_input_tokens) == (
        99,
        (3, 4),
        64,
        63,
    )
    assert (model.max_sequences, model.max_batch_total_tokens) == (3, 100)
    assert isinstance(plugin_echo.create(options), EchoBackend)


def test_a_folder_with_a_broken_config_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        toy_model_from(EngineOptions(tmp_path, "m"))
