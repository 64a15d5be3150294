"""What scripts can say, and what is wrong with a script file."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest

from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import StartError, Unhealthy
from tgi_gateway.testing import Script, ScriptedBackend, ScriptedToken, plugin_scripted, script_file, toy_model
from tgi_gateway.types import Event, Failed, Finished, Request, SamplingParams, StepEvents, StopRules, Token


def request(request_id: int, *prompt: int, top_n_tokens: int = 0) -> Request:
    return Request(request_id, prompt, SamplingParams(), StopRules(8), logprobs=True, top_n_tokens=top_n_tokens)


async def answers(backend: ScriptedBackend, *requests: Request) -> dict[int, list[Event]]:
    """Every request's events, up to its end."""
    got: dict[int, list[Event]] = {each.request_id: [] for each in requests}
    changed = asyncio.Event()

    def emit(step: StepEvents) -> None:
        for event in step.events():
            got[event.request_id].append(event)
        changed.set()

    await backend.start(emit)
    for each in requests:
        backend.submit(each)
    async with asyncio.timeout(10):
        while not all(events and not isinstance(events[-1], Token) for events in got.values()):
            changed.clear()
            await changed.wait()
    await backend.stop(0.0)
    return got


def ids(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


async def test_each_request_gets_the_first_script_whose_prompt_it_contains() -> None:
    backend = ScriptedBackend([Script.of(7, 8, prompt=(5, 6)), Script.of(9, then="repeat")])
    got = await answers(backend, request(1, 4, 5, 6), request(2, 5, 4, 6))
    assert ids(got[1]) == [7, 8, 0]  # 0 ends the sequence
    assert ids(got[2]) == [9] * 8


async def test_log_probabilities_and_alternatives_come_from_the_script_where_it_gives_them() -> None:
    token = ScriptedToken(7, -0.25, ((7, -0.25), (3, -2.0), (4, -3.0)))
    got = await answers(ScriptedBackend([Script((token, ScriptedToken(8)))]), request(1, 5, top_n_tokens=2))
    first, second, *_ = got[1]
    assert first == Token(1, 7, -0.25, ((7, -0.25), (3, -2.0)))
    assert isinstance(second, Token)
    assert second.top[0] == (8, second.logprob)
    assert math.exp(second.logprob) < 1


async def test_a_failing_script_leaves_its_neighbour_alone() -> None:
    backend = ScriptedBackend([Script.of(7, prompt=(5,), then="fail"), Script.of(9)])
    got = await answers(backend, request(1, 5), request(2, 6))
    assert isinstance(got[1][-1], Failed)
    assert ids(got[1]) == [7]
    assert isinstance(got[2][-1], Finished)


async def test_a_delayed_token_lets_the_others_go_first() -> None:
    slow = Script((ScriptedToken(7, delay_s=0.05), ScriptedToken(7)), prompt=(5,))
    backend = ScriptedBackend([slow, Script.of(9, then="repeat")])
    order: list[int] = []
    done = asyncio.Event()

    def emit(step: StepEvents) -> None:
        order.extend(finished.request_id for finished in step.finished)
        if len(order) == 2:
            done.set()

    await backend.start(emit)
    backend.submit(request(1, 5))
    backend.submit(request(2, 6))
    async with asyncio.timeout(10):
        await done.wait()
    await backend.stop(0.0)
    assert order == [2, 1]


async def test_a_crash_fails_every_open_request() -> None:
    backend = ScriptedBackend([Script.of(7, prompt=(5,), then="crash"), Script.of(9, then="repeat")])
    got = await answers(backend, request(1, 5), request(2, 6))
    assert [type(events[-1]) for events in got.values()] == [Failed, Failed]
    with pytest.raises(Unhealthy):
        await backend.health()


async def test_a_hanging_engine_is_unhealthy_and_can_be_stopped() -> None:
    backend = ScriptedBackend([Script.of(7, then="hang")], health_timeout_s=0.05)
    events: list[Event] = []
    changed = asyncio.Event()

    def emit(step: StepEvents) -> None:
        events.extend(step.events())
        changed.set()

    await backend.start(emit)
    await backend.health()
    backend.submit(request(1, 5))
    async with asyncio.timeout(10):
        await changed.wait()
    with pytest.raises(Unhealthy):
        await backend.health()
    await backend.stop(0.01)
    assert [type(event) for event in events] == [Token, Failed]


async def test_a_prompt_without_script_is_refused() -> None:
    got = await answers(ScriptedBackend([Script.of(7, prompt=(5,))]), request(1, 6))
    assert isinstance(got[1][0], Failed)
    assert got[1][0].error_type == "validation"


async def test_the_plugin_reads_scripts_features_and_end_tokens_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    tokens = [7, {"id": 8, "logprob": -0.5, "top": [[8, -0.5]], "delay_s": 0.001}]
    path.write_text(json.dumps({"eos_token_ids": [3], "features": ["sampling"], "scripts": [{"tokens": tokens}]}))
    backend = plugin_scripted.create(EngineOptions(tmp_path, "m", extra={"script": str(path)}))
    assert isinstance(backend, ScriptedBackend)
    assert "sampling" in backend.capabilities.features
    assert ids((await answers(backend, request(1, 5)))[1]) == [7, 8, 3]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "script file"),
        ("[]", "the file is list; it must be an object"),
        ("{}", "`scripts` is missing"),
        ('{"scripts": []}', "`scripts` is empty"),
        ('{"scripts": [{"tokens": [1], "them": "end"}]}', r"script 0 has unknown fields \['them'\]"),
        ('{"scripts": [{"tokens": [1], "then": "die"}]}', "script 0: `then` is 'die'; allowed are end, repeat"),
        ('{"scripts": [{"tokens": [], "then": "repeat"}]}', "script 0: there is no token to repeat"),
        ('{"scripts": [{"tokens": [{"id": 1, "prob": 2}]}]}', r"script 0, token 0 has unknown fields \['prob'\]"),
        ('{"scripts": [{"tokens": [1]}], "features": ["magic"]}', r"unknown features \['magic'\]"),
    ],
)
def test_a_broken_script_file_is_named_with_its_place(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "script.json"
    path.write_text(text)
    with pytest.raises(StartError, match=problem):
        script_file.read(path)


def test_a_missing_script_file_or_flag_is_a_start_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot be read"):
        script_file.read(tmp_path / "nothing.json")
    with pytest.raises(StartError, match="--script FILE"):
        plugin_scripted.create(EngineOptions(tmp_path, "m"))


def test_the_default_model_ends_with_token_0() -> None:
    assert ScriptedBackend([Script.of(1)]).model.eos_token_ids == (0,)
    assert ScriptedBackend([Script.of(1)], toy_model()).model.eos_token_ids == ()
