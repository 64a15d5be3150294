from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tgi_gateway.api.bodies import ChatBody, CompletionBody, ParametersBody
from tgi_gateway.testing.worker import Worker

PATHS = [
    "/",
    "/generate",
    "/generate_stream",
    "/tokenize",
    "/detokenize",
    "/chat_tokenize",
    "/invocations",
    "/vertex",
    "/v2/models/m/versions/1/infer",
    "/v1/chat/completions",
    "/v1/completions",
]
JSON = {"content-type": "application/json"}


def rejection(path: str, text: str) -> str:
    """What is said about a body that cannot be read: plain text on native routes, OpenAI's object on its own."""
    if not path.startswith("/v1/"):
        return text
    told = json.loads(text)["error"]
    assert told.keys() == {"message", "type", "param", "code"}
    assert told["type"] == "invalid_request_error"
    return str(told["message"])


async def send(worker: Worker, path: str, raw: bytes, **headers: str) -> tuple[int, str]:
    response = await worker.client.post(path, content=raw, headers=JSON | headers)
    return response.status_code, response.text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        b"{",
        b"nonsense",
        b'{"inputs": "a"} trailing',
        b'{"inputs": NaN}',
        b'{"inputs": "\xff\xfe"}',
        b'{"inputs": "\xed\xa0\x80"}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "\\udc00 x"}',
        b'{"inputs": "\\x"}',
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    ],
)
async def test_what_is_no_json_is_400(worker: Worker, path: str, raw: bytes) -> None:
    status, text = await send(worker, path, raw)
    assert status == 400, text
    assert rejection(path, text).startswith("Failed to parse the request body as JSON: ")
    assert len(text) < 400


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("raw", [b"[]", b"null", b"3", b'"text"', b"{}", b'{"inputs": 3, "messages": 3, "prompt": 3}'])
async def test_json_of_the_wrong_shape_is_422(worker: Worker, path: str, raw: bytes) -> None:
    status, text = await send(worker, path, raw)
    assert status == 422
    assert rejection(path, text).startswith("Failed to deserialize the JSON body into the target type: ")


@pytest.mark.parametrize(
    "parameter",
    [
        '"max_new_tokens": -1',
        '"max_new_tokens": 4294967296',
        '"max_new_tokens": 1.5',
        '"max_new_tokens": "3"',
        '"max_new_tokens": true',
        '"seed": -1',
        '"seed": 18446744073709551616',
        f'"seed": {"9" * 400}',
        '"temperature": "hot"',
        '"temperature": 1e400',
        '"top_k": 2147483648',
        '"stop": null',
        '"stop": "text"',
        '"stop": [1]',
        '"do_sample": 1',
        '"do_sample": null',
        '"grammar": {"type": "json"}',
        '"grammar": {"type": "unknown", "value": 1}',
        '"grammar": {"type": "json_schema", "json_schema": {}}',
        '"best_of": -1',
        '"truncate": -1',
        '"truncate": []',
    ],
)
async def test_a_parameter_of_the_wrong_type_is_named(worker: Worker, parameter: str) -> None:
    status, text = await send(worker, "/generate", f'{{"inputs": "a", "parameters": {{{parameter}}}}}'.encode())
    assert status == 422
    assert text.startswith("Failed to deserialize the JSON body into the target type: ")


async def test_parameters_that_are_null_are_rejected(worker: Worker) -> None:
    assert (await send(worker, "/generate", b'{"inputs": "a", "parameters": null}'))[0] == 422


@pytest.mark.parametrize("kind", ["text/plain", "", "application/jsonx", "application/x-www-form-urlencoded"])
async def test_a_body_that_is_not_declared_as_json_is_415(worker: Worker, kind: str) -> None:
    status, text = await send(worker, "/generate", b'{"inputs": "a"}', **{"content-type": kind})
    assert status == 415
    assert text.startswith("Expected request with `Content-Type: application/json`")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/problem+json"])
async def test_every_kind_of_json_is_accepted(worker: Worker, kind: str) -> None:
    raw = b'{"inputs": "a", "parameters": {"max_new_tokens": 1}}'
    assert (await send(worker, "/generate", raw, **{"content-type": kind}))[0] == 200


CHAT_BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "max_tokens": 1,
    "stream_options": {"include_usage": False},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"any": 1}, "strict": True}}],
    "tool_choice": "none",
}


async def test_unknown_fields_of_native_routes_are_ignored_unless_the_server_is_strict(
    worker: Worker, start_worker: Callable[..., Any]
) -> None:
    known: dict[str, dict[str, Any]] = {
        "/generate": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
        "/chat_tokenize": CHAT_BODY,
        "/invocations": CHAT_BODY,
    }
    strict: Worker = await start_worker(strict=True)
    for path, body in known.items():
        assert (await strict.post(path, body)).status_code == 200, path
        assert (await worker.post(path, body | {"surprise": 1})).status_code == 200
        refused = await strict.post(path, body | {"surprise": 1})
        assert refused.status_code == 422
        assert "unknown field `surprise` at `$`" in refused.text
    inner = await strict.post("/generate", {"inputs": "a", "parameters": {"max_tokens": 1}})
    assert "unknown field `max_tokens` at `$.parameters`" in inner.text


@pytest.mark.parametrize("strict", [False, True])
async def test_unknown_fields_of_openai_routes_are_refused_by_name(
    start_worker: Callable[..., Any], strict: bool
) -> None:
    worker: Worker = await start_worker(strict=strict)
    known = {"/v1/chat/completions": CHAT_BODY, "/v1/completions": {"prompt": ["a"], "max_tokens": 1}}
    for path, body in known.items():
        assert (await worker.post(path, body)).status_code == 200
        for stream in (False, True):
            refused = await worker.post(path, body | {"max_toknes": 1, "stream": stream})
            assert refused.status_code == 400
            assert refused.json() == {
                "error": {
                    "message": "Unknown parameter: `max_toknes`; did you mean `max_tokens`?",
                    "type": "invalid_request_error",
                    "param": "max_toknes",
                    "code": "unknown_parameter",
                },
                "error_type": "validation",
            }
    inner = CHAT_BODY | {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}
    refused = await worker.post("/v1/chat/completions", inner)
    assert refused.json()["error"]["param"] == "messages[0].content[0].x"


@pytest.mark.parametrize("path", PATHS)
async def test_an_announced_body_over_the_limit_is_413_unread(start_worker: Callable[..., Any], path: str) -> None:
    worker: Worker = await start_worker(payload_limit=100)
    status, text = await send(worker, path, b'{"inputs": "' + b"a" * 100 + b'"}')
    assert status == 413
    assert rejection(path, text).startswith("Failed to buffer the request body: length limit exceeded")


async def test_an_unannounced_body_is_given_up_at_the_limit(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(payload_limit=1000)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 100
            yield b"a" * 100

    response = await worker.client.post("/generate", content=endless(), headers=JSON)
    assert response.status_code == 413
    assert sent <= 1200


async def test_a_body_as_long_as_the_limit_is_read(start_worker: Callable[..., Any]) -> None:
    raw = json.dumps({"inputs": "a" * 50, "parameters": {"max_new_tokens": 1}}).encode()
    worker: Worker = await start_worker(payload_limit=len(raw))
    assert (await send(worker, "/generate", raw))[0] == 200


async def test_an_over_long_prompt_is_refused_by_its_tokens(worker: Worker) -> None:
    for path, body in (
        ("/generate", {"inputs": "a" * 100_000, "parameters": {"max_new_tokens": 1}}),
        ("/generate_stream", {"inputs": "a" * 100_000, "parameters": {"max_new_tokens": 1}}),
        ("/v1/completions", {"prompt": "a" * 100_000, "max_tokens": 1}),
    ):
        assert await worker.error(path, body) == (
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 512. "
            "Given: 100000 `inputs` tokens and 1 `max_new_tokens`"
        )


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["</s>", "user", "json", "regex", "text", "tgi", "auto", "none"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = [field.encode_name for field in msgspec.structs.fields(ParametersBody)]
OPENAI_NAMES = [field.encode_name for kind in (ChatBody, CompletionBody) for field in msgspec.structs.fields(kind)]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(NAMES), values, max_size=4),
    st.dictionaries(st.sampled_from(OPENAI_NAMES), values, max_size=4),
    st.text(max_size=20),
)
async def test_no_body_whatever_is_in_it_is_a_server_error(
    worker: Worker, native: dict[str, Any], openai: dict[str, Any], text: str
) -> None:
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 3} | openai
    completion = {"prompt": text, "max_tokens": 3} | openai
    bodies = {
        "/generate": {"inputs": text, "parameters": {"max_new_tokens": 3} | native},
        "/generate_stream": {"inputs": text, "parameters": {"max_new_tokens": 3} | native},
        "/": {"inputs": text, "parameters": {"max_new_tokens": 3} | native, "stream": bool(len(text) % 2)},
        "/v1/chat/completions": chat,
        "/chat_tokenize": chat,
        "/v1/completions": completion,
    }
    for path, body in bodies.items():
        response = await worker.post(path, body)
        assert response.status_code in (200, 400, 422), (path, body, response.text)
    assert worker.services.permits.taken == 0
    assert len(worker.services.generations) == 0
