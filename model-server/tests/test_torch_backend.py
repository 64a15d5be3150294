"""TorchBackend with a real model: the same tokens alone, in a batch, from a warm cache and after preemption."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tgi_gateway.backend import ALL_FEATURES, Capabilities, Capacity, EngineOptions
from tgi_gateway.errors import ModelError, SettingsError, StartError, Unhealthy
from tgi_gateway.types import Failed, Finished, Request, SamplingParams, StopRules
from tgi_model_server import stepped
from tgi_model_server.backend import TorchBackend
from tgi_model_server.device import Device
from tgi_model_server.engine import Engine, load_engine
from tgi_model_server.plan import StepPlan
from tgi_model_server.step import DeviceLost, StepOutput
from tgi_model_server.testing.client import Client
from tgi_model_server.testing.devices import ReferenceDevice, StaticDevice
from tgi_model_server.testing.models import SMALL, HandBatch, save_random_model

CAPABILITIES = Capabilities(features=ALL_FEATURES - {"grammar", "lora"}, prefix_cache=True)
DEVICES = pytest.mark.parametrize("device", [ReferenceDevice, StaticDevice], ids=["depth-1", "static-depth-2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Listener(Client):
    """With its endings told apart."""

    def finished(self, request_id: int) -> Finished:
        end = self.ends[request_id]
        assert isinstance(end, Finished), end
        return end

    def refused(self, request_id: int) -> str:
        end = self.ends[request_id]
        assert isinstance(end, Failed), end
        return f"{end.error_type}: {end.message}"


def serving(folder: Path, device: Callable[[], Device], **options: Any) -> AbstractAsyncContextManager[Listener]:
    return Listener.serving(TorchBackend(device, EngineOptions(folder, "small", **options), CAPABILITIES))


def prompts(count: int, length: int = 40) -> list[tuple[int, ...]]:
    """Two thirds of each prompt are shared with two others."""
    draw = random.Random(count)
    stems = [[draw.randrange(2, 160) for _ in range(2 * length // 3)] for _ in range(count // 3 + 1)]
    return [(*stems[n // 3], *(draw.randrange(2, 160) for _ in range(length - 2 * length // 3))) for n in range(count)]


def greedy(request_id: int, prompt: tuple[int, ...], new: int = 64, **changes: Any) -> Request:
    return replace(Request(request_id, prompt, SamplingParams(), StopRules(new, ignore_eos=True)), **changes)


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[list[int]]:
    """The oracle: `prompts(16)`, each stepped by hand and alone."""
    batch = HandBatch(load_engine(ReferenceDevice(), EngineOptions(folder, "small", max_batch_size=1)))
    found = [batch.generate(greedy(1, prompt), 64) for prompt in prompts(16)]
    assert len({tuple(tokens) for tokens in found}) == 16
    return found


@DEVICES
async def test_greedy_tokens_are_the_same_alone_in_a_batch_and_from_a_warm_cache(
    folder: Path, device: Callable[[], Device], answers: list[list[int]]
) -> None:
    asked = prompts(16)
    async with serving(folder, device, max_batch_size=16, max_batch_total_tokens=16 * 112) as client:
        cold = await client.run(*(greedy(n, prompt) for n, prompt in enumerate(asked)))
        assert cold == answers
        warm = await client.run(*(greedy(100 + n, prompt) for n, prompt in enumerate(asked)))
        assert warm == answers
        assert all(client.finished(100 + n).usage.cached_tokens >= 32 for n in range(16))
        assert [(await client.run(greedy(200 + n, prompt)))[0] for n, prompt in enumerate(asked[:4])] == answers[:4]


@DEVICES
async def test_greedy_tokens_survive_preemption_in_a_tiny_pool(
    folder: Path, device: Callable[[], Device], answers: list[list[int]]
) -> None:
    asked = prompts(16)
    async with serving(
        folder, device, max_batch_size=16, max_total_tokens=128, max_batch_total_tokens=320, max_batch_prefill_tokens=48
    ) as client:
        assert await client.run(*(greedy(n, prompt) for n, prompt in enumerate(asked))) == answers
        capacity = client.backend.capacity()
        assert capacity.preemptions > 0
        assert (capacity.free_sequences, capacity.free_kv_tokens) == (16, capacity.total_kv_tokens)


@DEVICES
async def test_sampled_tokens_do_not_depend_on_batch_cache_or_preemption(
    folder: Path, device: Callable[[], Device]
) -> None:
    sampling = SamplingParams(do_sample=True, temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=11)
    asked = [greedy(n, prompt, 40, sampling=replace(sampling, seed=n)) for n, prompt in enumerate(prompts(12))]
    async with serving(folder, device, max_batch_size=12, max_total_tokens=96, max_batch_total_tokens=240) as client:
        together = await client.run(*asked)
        assert client.backend.capacity().preemptions > 0
        for request, tokens in zip(asked, together, strict=True):
            assert await client.run(replace(request, request_id=request.request_id + 100)) == [tokens]


async def test_prompt_logprobs_survive_chunks_and_a_warm_cache(folder: Path) -> None:
    prompt = prompts(1)[0]
    told, tops = [], []
    async with serving(folder, ReferenceDevice, max_batch_size=2, max_batch_prefill_tokens=16) as client:
        for request_id in (1, 2):
            await client.run(greedy(request_id, prompt, 2, prefill_logprobs=True, prefill_top_n_tokens=3))
            end = client.finished(request_id)
            assert end.usage.cached_tokens == 0
            assert len(end.prefill_logprobs) == len(prompt)
            assert math.isnan(end.prefill_logprobs[0])
            assert end.prefill_top[0] == ()
            assert len(end.prefill_top) == len(prompt)
            told.append(end.prefill_logprobs[1:])
            tops.append([dict(top) for top in end.prefill_top[1:]])
    assert all(value < 0 for value in told[0])
    assert told[1] == pytest.approx(told[0], abs=1e-4)
    for token, logprob, one, other in zip(prompt[1:], told[0], *tops, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert list(one.values()) == sorted(one.values(), reverse=True)
        assert logprob == pytest.approx(one[token], abs=1e-4) if token in one else logprob < min(one.values())


async def test_limits_come_from_the_pool_and_the_model(folder: Path) -> None:
    async with serving(folder, ReferenceDevice, max_batch_size=3, max_batch_total_tokens=1000) as client:
        info = client.info
        assert info.max_total_tokens == SMALL["max_position_embeddings"] == 256
        assert info.max_input_tokens == 255
        assert info.max_batch_total_tokens == 1000
        assert info.max_batch_prefill_tokens == 256
        assert (info.max_sequences, info.vocab_size, info.eos_token_ids) == (3, 160, (1,))
        assert (info.model_id, info.model_type, info.dtype, info.device) == ("small", "llama", "float32", "reference")
        assert client.steps == [], "the warm-up is nobody's business"
        assert client.backend.capacity().free_kv_tokens == 1000
    async with serving(folder, ReferenceDevice, max_batch_total_tokens=100) as client:
        assert (client.info.max_total_tokens, client.info.max_input_tokens) == (100, 99)


async def test_the_longest_request_fills_the_pool_to_its_last_token(folder: Path) -> None:
    async with serving(folder, ReferenceDevice, max_batch_total_tokens=64) as client:
        assert client.info.max_total_tokens == 64
        (tokens,) = await client.run(greedy(1, prompts(1)[0], 24))
        assert len(tokens) == 24


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_batch_total_tokens": 64, "max_total_tokens": 100}, SettingsError, "the KV pool holds 64"),
        ({"max_input_tokens": 50, "max_total_tokens": 50}, SettingsError, "must be less than"),
        ({"max_total_tokens": 1}, SettingsError, "at least 2"),
        ({"max_total_tokens": 5000}, SettingsError, "this model allows 256"),
        ({"quantize": "gptq"}, SettingsError, "--quantize"),
    ],
)
async def test_options_that_cannot_be_kept_are_start_errors(
    folder: Path, options: dict[str, Any], error: type[StartError], says: str
) -> None:
    with pytest.raises(error, match=says):
        async with serving(folder, ReferenceDevice, **options):
            pass


async def test_a_missing_model_is_a_start_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        async with serving(tmp_path, ReferenceDevice):
            pass


async def test_a_device_that_cannot_be_made_is_a_start_error(folder: Path) -> None:
    def no_chip() -> Device:
        raise RuntimeError("no such chip")

    with pytest.raises(StartError, match="no such chip"):
        async with serving(folder, no_chip):
            pass


async def test_what_is_not_declared_or_not_possible_is_refused_by_event(folder: Path) -> None:
    async with serving(folder, ReferenceDevice, max_batch_total_tokens=512) as client:
        prompt = prompts(1)[0]
        await client.run(
            greedy(1, prompt, adapter_id="mine"),
            greedy(2, (*prompt, 160)),
            greedy(3, prompt, 1000),
            greedy(4, (1,) * 256, 1),
            greedy(5, prompt, 2),
        )
        assert client.refused(1) == "validation: this engine does not support `lora`"
        assert "outside 0 .. 159" in client.refused(2)
        assert "at most 256 per request" in client.refused(3)
        assert "takes at most 255" in client.refused(4)
        assert client.finished(5).reason == "length"


@DEVICES
async def test_cancel_frees_everything(folder: Path, device: Callable[[], Device]) -> None:
    async with serving(folder, device, max_batch_size=8, max_batch_total_tokens=2048) as client:
        asked = [greedy(n, prompt, 200) for n, prompt in enumerate(prompts(20))]
        for request in asked:
            client.backend.submit(request)
        await client.until(lambda: len(client.tokens[0]) >= 2)
        assert client.backend.capacity().free_sequences == 0
        for request in asked:
            client.backend.cancel(request.request_id)
        await client.until(lambda: len(client.ends) == 20)
        assert {client.finished(n).reason for n in range(20)} == {"cancelled"}
        # A step that was in flight ends before the next request's does.
        await client.run(greedy(100, prompts(1)[0], 2))
        assert client.backend.capacity() == Capacity(8, 8, 2048, 2048)


async def test_health_is_true_when_idle_and_busy_and_emits_nothing(folder: Path) -> None:
    backend = TorchBackend(ReferenceDevice, EngineOptions(folder, "small"), CAPABILITIES)
    with pytest.raises(Unhealthy):
        await backend.health()
    async with serving(folder, ReferenceDevice) as client:
        await asyncio.gather(client.backend.health(), client.backend.health())
        assert client.steps == []
        client.backend.submit(greedy(1, prompts(1)[0], 200))
        await client.until(lambda: len(client.tokens[1]) > 0)
        await client.backend.health()
        await client.until(lambda: 1 in client.ends)
        assert len(client.tokens[1]) == 200
    with pytest.raises(Unhealthy):
        await client.backend.health()


def engine_of(client: Client) -> Engine:
    assert isinstance(client.backend, TorchBackend)
    assert client.backend._engine is not None
    return client.backend._engine


async def test_a_lost_device_fails_open_requests_and_health(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(folder, ReferenceDevice) as client:
        engine = engine_of(client)

        def lost(_plan: StepPlan) -> StepOutput:
            raise DeviceLost("it fell off the bus")

        client.backend.submit(greedy(1, prompts(1)[0], 200))
        await client.until(lambda: len(client.tokens[1]) > 0)
        monkeypatch.setattr(engine, "run", lost)
        await client.until(lambda: 1 in client.ends)
        assert client.refused(1).startswith("generation: ")
        with pytest.raises(Unhealthy, match="fell off the bus"):
            await client.backend.health()
        await client.run(greedy(2, prompts(1)[0], 2))
        assert client.refused(2).startswith("healthcheck: ")


async def test_a_hanging_device_is_unhealthy_until_it_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepped, "PROBE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(stepped, "STALL_S", 0.05)
    async with serving(folder, ReferenceDevice) as client:
        engine = engine_of(client)
        run, go_on = engine.run, threading.Event()

        def hang(plan: StepPlan) -> StepOutput:
            go_on.wait(30.0)
            return run(plan)

        monkeypatch.setattr(engine, "run", hang)
        with pytest.raises(Unhealthy, match="took more than"):
            await client.backend.health()
        assert client.backend.capacity().free_sequences < client.info.max_sequences
        with pytest.raises(Unhealthy, match="no step was done"):
            await client.backend.health()
        go_on.set()
        await client.run(greedy(1, prompts(1)[0], 2))
        assert client.finished(1).reason == "length"
        assert set(client.ends) == {1}
        monkeypatch.setattr(stepped, "PROBE_TIMEOUT_S", 30.0)
        await client.backend.health()


async def test_stop_drains_and_what_comes_later_fails(folder: Path) -> None:
    async with serving(folder, ReferenceDevice) as client:
        client.backend.submit(greedy(1, prompts(1)[0], 50))
        await client.backend.stop(30.0)
        await client.until(lambda: 1 in client.ends)
        assert len(client.tokens[1]) == 50
        await client.run(greedy(2, prompts(1)[0], 2))
        assert client.refused(2) == "healthcheck: the engine has stopped"
        await client.backend.stop(0.0)
