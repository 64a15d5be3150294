"""Who may call, under which name, for how long, and how a call is ended."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tgi_gateway.api import decoding
from tgi_gateway.errors import SettingsError
from tgi_gateway.keys import KeyFile, Keys
from tgi_gateway.settings import Settings
from tgi_gateway.testing.echo import EchoBackend
from tgi_gateway.testing.worker import Worker, byte_toy, error_text, parse_events, until

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "temperature": 0}
ENDLESS: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "abc"},
    "/generate_stream": {"inputs": "abc"},
    "/v1/chat/completions": CHAT | {"n": 2},
    "/v1/completions": {"prompt": "abc", "temperature": 0, "stream": True},
    "/vertex": {"instances": [{"inputs": "abc", "parameters": {"do_sample": False}}]},
}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# Keys.


async def test_any_of_several_keys_opens_and_each_is_a_tenant(start_worker: Callable[..., Any], tmp_path: Path) -> None:
    hashed = hashlib.sha256(b"hashed").hexdigest()
    file = tmp_path / "keys"
    file.write_text(f"# the team's\nfiled\n\n  sha256:{hashed}\n", "utf-8")
    worker: Worker = await start_worker(api_key="first", api_keys=("second", "third"), api_keys_file=str(file))
    for key in ("first", "second", "third", "filed", "hashed"):
        assert (await worker.client.get("/info", headers=bearer(key))).status_code == 200, key
        assert (await worker.client.get("/info", headers={"x-api-key": key})).status_code == 200, key
    for key in ("", "fourth", "# the team's", f"sha256:{hashed}", hashed, "First"):
        assert (await worker.client.get("/info", headers=bearer(key))).status_code == 401, key


def test_tenants_are_as_many_as_keys_and_name_none_of_them() -> None:
    keys = Keys(["a", "b", "a"])
    tenants = {keys.tenant(b"a"), keys.tenant(b"b")}
    assert len(keys) == len(tenants) == 2
    assert keys.tenant(b"c") is None
    assert not tenants & {"a", "b", None}


@pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"\xff\xfe", b"fine\nsha256:00aa\n"])
def test_a_key_file_without_keys_is_an_error_at_start(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match="--api-keys-file"):
        Keys.of(Settings(api_keys_file=str(file)))


def test_a_key_file_has_changed_once_it_is_no_longer_being_written(tmp_path: Path) -> None:
    file, other = tmp_path / "keys", tmp_path / "other"
    file.write_text("a\n")
    watched = KeyFile(file)
    assert not watched.changed()
    file.write_text("a\nb")
    assert not watched.changed()
    file.write_text("a\nbcd\n")
    assert [watched.changed() for _ in range(3)] == [False, True, False]
    other.write_text("a\nbce\n")
    other.replace(file)
    assert [watched.changed() for _ in range(3)] == [False, True, False]
    file.unlink()
    assert [watched.changed() for _ in range(3)] == [False, True, False]


def test_hashed_keys_are_the_same_keys_and_tell_none() -> None:
    keys = Keys(["secret", "other"])
    again = Keys(keys.hashed)
    assert again.tenant(b"secret") == keys.tenant(b"secret") is not None
    assert "secret" not in str(keys.hashed)


def test_an_empty_file_setting_means_no_keys() -> None:
    assert Keys.of(Settings()) is None


async def test_prefixes_are_shared_within_a_key_only(start_worker: Callable[..., Any]) -> None:
    for share in (False, True):
        seen: list[str] = []

        class Watching(EchoBackend):
            def submit(self, request: Any) -> None:
                seen.append(request.cache_salt)  # noqa: B023
                super().submit(request)

        worker: Worker = await start_worker(Watching(byte_toy()), api_keys=("a", "b"), share_prefixes_across_keys=share)
        for key in ("a", "b", "a"):
            body = CHAT | {"max_tokens": 1, "cache_salt": "mine"}
            await worker.client.post("/v1/chat/completions", json=body, headers=bearer(key))
        assert len(set(seen)) == (1 if share else 2)
        assert seen[0] == seen[2]
        assert all(salt.endswith("mine") for salt in seen)


# Names.


@pytest.mark.parametrize("path", ["/info", "/v1/nothing", "/generate", "/health"])
async def test_every_response_has_the_requests_id(worker: Worker, path: str) -> None:
    named = await worker.client.get(path, headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    assert named.headers["request-id"] == "mine-1"  # where Anthropic's clients look
    other, third = [(await worker.client.get(path)).headers["x-request-id"] for _ in range(2)]
    assert len(other) == 24
    assert other != third


@pytest.mark.parametrize("unfit", ["", "a b", "x" * 129, "\x7f"])
async def test_an_id_that_is_none_is_replaced(worker: Worker, unfit: str) -> None:
    response = await worker.client.get("/info", headers={b"x-request-id": unfit.encode()})
    assert len(response.headers["x-request-id"]) == 24


async def test_a_refused_key_is_told_the_id_as_well(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(api_key="k")
    assert "x-request-id" in (await worker.client.get("/info")).headers


async def test_an_answers_id_is_made_of_the_requests(worker: Worker) -> None:
    headers = {"x-request-id": "r-7"}
    for path, body, prefix in (
        ("/v1/chat/completions", CHAT, "chatcmpl-"),
        ("/v1/completions", {"prompt": "a", "temperature": 0}, "cmpl-"),
    ):
        whole = await worker.client.post(path, json=body | {"max_tokens": 1}, headers=headers)
        assert whole.json()["id"] == f"{prefix}r-7"
        streamed = await worker.client.post(path, json=body | {"max_tokens": 1, "stream": True}, headers=headers)
        assert parse_events(streamed.text)[0]["id"] == f"{prefix}r-7"


# Cancelling.


@pytest.mark.parametrize("path", ENDLESS)
async def test_a_request_is_cancelled_by_its_id(start_worker: Callable[..., Any], slow: EchoBackend, path: str) -> None:
    worker: Worker = await start_worker(slow)
    asking = asyncio.create_task(worker.client.post(path, json=ENDLESS[path], headers={"x-request-id": "r"}))
    bystander = asyncio.create_task(worker.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 60}}))
    expected = 3 if path == "/v1/chat/completions" else 2
    await until(lambda: len(worker.services.generations) == expected)
    await asyncio.sleep(0.05)
    cancelled = await worker.client.delete("/v1/requests/r")
    assert cancelled.json() == {"id": "r", "object": "request.cancelled", "cancelled": expected - 1}
    answer = await asyncio.wait_for(asking, 10)
    if answer.headers["content-type"] == "text/event-stream":
        events = [event for event in parse_events(answer.text) if event != "[DONE]"]
        assert error_text(events[-1]) == "The request was cancelled"
    else:
        assert (answer.status_code, error_text(answer.json())) == (499, "The request was cancelled")
    assert (await bystander).status_code == 200
    assert worker.services.permits.taken == 0
    assert (await worker.client.delete("/v1/requests/r")).status_code == 404


async def test_the_id_of_an_answer_cancels_it_too(start_worker: Callable[..., Any], slow: EchoBackend) -> None:
    worker: Worker = await start_worker(slow)
    asking = asyncio.create_task(worker.client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "r"}))
    await until(lambda: len(worker.services.generations) == 1)
    assert (await worker.client.delete("/v1/requests/chatcmpl-r")).status_code == 200
    assert (await asking).status_code == 499


async def test_nobody_cancels_with_another_key(start_worker: Callable[..., Any], slow: EchoBackend) -> None:
    worker: Worker = await start_worker(slow, api_keys=("a", "b"))
    named = bearer("a") | {"x-request-id": "r"}
    asking = asyncio.create_task(worker.client.post("/v1/chat/completions", json=CHAT, headers=named))
    await until(lambda: len(worker.services.generations) == 1)
    refused = await worker.client.delete("/v1/requests/r", headers=bearer("b"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "request_not_found")
    assert (await worker.client.delete("/v1/requests/r")).status_code == 401
    assert (await worker.client.delete("/v1/requests/r", headers=bearer("a"))).status_code == 200
    assert (await asking).status_code == 499


# Time.


@pytest.mark.parametrize("path", ENDLESS)
async def test_a_request_that_takes_too_long_is_ended(
    start_worker: Callable[..., Any], slow: EchoBackend, path: str
) -> None:
    worker: Worker = await start_worker(slow, request_timeout=0.2)
    answer = await asyncio.wait_for(worker.post(path, ENDLESS[path]), 10)
    message = "The request took longer than this server allows"
    if answer.headers["content-type"] == "text/event-stream":
        events = [event for event in parse_events(answer.text) if event != "[DONE]"]
        assert len(events) > 3
        assert error_text(events[-1]) == message
    else:
        assert (answer.status_code, answer.json()["error_type"]) == (504, "timeout")
        assert error_text(answer.json()) == message
    assert worker.services.permits.taken == len(worker.services.generations) == 0


async def test_a_request_that_is_quick_enough_knows_no_limit(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(request_timeout=30.0)
    await worker.answer("/v1/chat/completions", CHAT | {"max_tokens": 2})
    assert len(await worker.events("/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": 2}})) == 2


async def test_a_body_that_does_not_come_is_given_up(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "READ_TIMEOUT_S", 0.05)

    async def dripping() -> AsyncIterator[bytes]:
        yield b'{"inputs": '
        await asyncio.sleep(30)
        yield b'"a"}'

    for path in ("/generate", "/v1/chat/completions"):
        request: httpx.Response = await worker.client.post(
            path, content=dripping(), headers={"content-type": "application/json"}
        )
        assert request.status_code == 408
        assert "did not come within" in request.text


async def test_a_client_may_ask_for_less_time_and_for_a_worse_place(start_worker: Callable[..., Any]) -> None:
    engine = EchoBackend(byte_toy(), step_s=0.05)
    worker: Worker = await start_worker(engine, request_timeout=30.0)
    body = {"inputs": "a", "parameters": {"max_new_tokens": 400}}
    late = await worker.client.post("/generate", json=body, headers={"x-request-timeout": "0.2"})
    assert (late.status_code, late.json()["error_type"]) == (504, "timeout")
    for odd in ("-1", "soon", "nan", "1e9"):
        ask = worker.client.post("/tokenize", json=body, headers={"x-request-timeout": odd, "x-request-priority": odd})
        assert (await ask).status_code == 200
    ask = worker.client.post("/generate", json=body, headers={"x-request-priority": "7"})
    waiting = asyncio.create_task(ask)
    while not len(worker.services.generations):  # noqa: ASYNC110 - it is made by a request
        await asyncio.sleep(0.01)
    (open_now,) = worker.services.generations._open.values()
    assert open_now.request.priority == 7
    waiting.cancel()
