"""The routes that hosting platforms call: SageMaker, Vertex AI, KServe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tgi_gateway.testing.manual import ManualBackend
from tgi_gateway.testing.scripted import Script, ScriptedBackend
from tgi_gateway.testing.worker import FIRST_BYTE, Worker, byte_toy, error_text, parse_events

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}


def tensor(data: list[Any], name: str = "in") -> dict[str, Any]:
    return {"name": name, "shape": [1, len(data)], "datatype": "BYTES", "data": data}


# SageMaker.


async def test_invocations_answer_as_the_route_whose_body_it_is(worker: Worker) -> None:
    for path, body in (
        ("/", {"inputs": "ab", "parameters": GREEDY | {"details": True}}),
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "ab", "max_tokens": 4, "temperature": 0}),
    ):
        there, here = await worker.post(path, body), await worker.post("/invocations", body)
        assert here.status_code == 200, here.text
        known, got = there.json(), here.json()
        for changing in ("id", "created"):
            if isinstance(known, dict):
                known.pop(changing), got.pop(changing)
        assert got == known
        assert here.headers["x-generated-tokens"] == there.headers["x-generated-tokens"] == "4"


async def test_invocations_stream(worker: Worker) -> None:
    for body in ({"inputs": "ab", "parameters": GREEDY, "stream": True}, CHAT | {"stream": True}):
        response = await worker.post("/invocations", body)
        assert response.headers["content-type"] == "text/event-stream"
        assert len(parse_events(response.text)) == (4 if "inputs" in body else 5)


async def test_invocations_tell_errors_as_the_route_does(worker: Worker) -> None:
    native = await worker.post("/invocations", {"inputs": "", "parameters": GREEDY})
    assert (native.status_code, native.json()["error"]) == (422, "Input validation error: `inputs` cannot be empty")
    chat = await worker.post("/invocations", CHAT | {"messages": []})
    assert chat.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [{}, {"text": "a"}, {"inputs": 3}, {"messages": "a"}, {"prompt": []}])
async def test_a_body_of_no_route_is_rejected_in_tgis_words(worker: Worker, body: dict[str, Any]) -> None:
    response = await worker.post("/invocations", body)
    assert response.status_code == 422
    assert "data did not match any variant of untagged enum SagemakerRequest" in response.text


# Vertex AI.


async def test_vertex_answers_every_instance_in_order(worker: Worker) -> None:
    instances = [{"inputs": "ab", "parameters": GREEDY}, CHAT, {"inputs": "xyz", "parameters": GREEDY}]
    answer = await worker.answer("/vertex", {"instances": instances})
    assert answer == {"predictions": ["abab", "<use", "xyzx"]}


async def test_vertex_draws_tokens_unless_told_otherwise(worker: Worker) -> None:
    def ask(**parameters: Any) -> dict[str, Any]:
        return {
            "instances": [{"inputs": "abcdef", "parameters": {"max_new_tokens": 40, "temperature": 9.0} | parameters}]
        }

    first = await worker.answer("/vertex", ask(seed=1))
    assert first == await worker.answer("/vertex", ask(seed=1))
    assert first != await worker.answer("/vertex", ask(seed=2))


async def test_vertex_needs_instances_and_tells_true_errors(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(ScriptedBackend([Script.of(FIRST_BYTE, then="fail")], byte_toy()))
    empty = await worker.post("/vertex", {"instances": []})
    assert (empty.status_code, empty.json()["error_type"]) == (422, "Input validation error")
    invalid = await worker.error("/vertex", {"instances": [{"inputs": ""}]}, 422)
    assert invalid == "Input validation error: `inputs` cannot be empty"
    failing = {"instances": [{"inputs": "a", "parameters": {"do_sample": False}}] * 3}
    assert (await worker.error("/vertex", failing, 424)).startswith("Request failed during generation")
    assert worker.services.permits.taken == 0


async def test_vertex_is_found_under_the_paths_that_the_platform_names(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(aip_predict_route="/v1/predict", aip_health_route="/alive", api_key="k")
    body = {"instances": [{"inputs": "ab", "parameters": GREEDY}]}
    assert (await worker.post("/v1/predict", body)).status_code == 401
    answered = await worker.client.post("/v1/predict", json=body, headers={"authorization": "Bearer k"})
    assert answered.json() == {"predictions": ["abab"]}
    assert (await worker.client.get("/alive")).status_code == 200


# KServe.

INFER = "/v2/models/any/versions/7/infer"


async def test_kserve_tells_what_it_is(worker: Worker) -> None:
    server = (await worker.client.get("/v2")).json()
    assert server["name"] == "text-generation-inference"
    assert server["extensions"] == ["health", "models", "metrics"]
    model = (await worker.client.get("/v2/models/any/versions/7")).json()
    assert model == {"name": "any", "version": "7", "extensions": ["infer", "ready"]}


async def test_kserve_is_live_but_not_ready_when_requests_are_not_taken(worker: Worker) -> None:
    live, *ready = ("/v2/health/live", "/v2/health/ready", "/v2/models/any/versions/7/ready")
    for path in (live, *ready):
        response = await worker.client.get(path)
        assert (response.status_code, response.json()) == (200, {"live": True})
    worker.services.reachable = lambda: False
    assert (await worker.client.get(live)).status_code == 200
    for path in ready:
        response = await worker.client.get(path)
        assert (response.status_code, response.json()["error_type"]) == (503, "healthcheck")


async def test_kserves_probe_of_readiness_asks_nothing_of_the_engine(start_worker: Callable[..., Any]) -> None:
    """A token would have to wait behind those of others, and a busy server is ready."""
    engine = ManualBackend()
    engine.healthy = False
    worker: Worker = await start_worker(engine)
    assert (await worker.client.get("/health/generate")).status_code == 503
    for path in ("/v2/health/ready", "/v2/models/any/versions/7/ready"):
        assert (await worker.client.get(path)).status_code == 200


async def test_kserve_infers_from_bytes_and_from_texts_in_the_order_of_the_inputs(worker: Worker) -> None:
    body = {
        "id": "mine",
        "parameters": GREEDY,
        "inputs": [tensor(list(b"ab")), tensor(["xyz"])],
        "outputs": [{"name": "one"}, {"name": "two"}],
    }
    assert await worker.answer(INFER, body) == {
        "id": "mine",
        "outputs": [
            {"name": "one", "shape": [1, 4], "datatype": "BYTES", "data": list(b"abab")},
            {"name": "two", "shape": [1], "datatype": "BYTES", "data": ["xyzx"]},
        ],
    }


@pytest.mark.parametrize(
    ("data", "outputs", "kind"),
    [
        ([0xFF, 0xFE], 1, "utf8"),
        (["a", "b"], 1, "utf8"),
        ([97, "b"], 1, "utf8"),
        ([97], 2, "length mismatch"),
        ([97], 0, "length mismatch"),
        ([], 1, "validation"),
    ],
)
async def test_kserve_refuses_what_is_no_text(worker: Worker, data: list[Any], outputs: int, kind: str) -> None:
    body = {"id": "x", "inputs": [tensor(data)], "outputs": [{"name": "o"}] * outputs}
    response = await worker.post(INFER, body)
    assert (response.status_code, response.json()["error_type"]) == (422, kind)
    assert error_text(response.json())


async def test_bytes_beyond_a_byte_are_rejected(worker: Worker) -> None:
    body = {"id": "x", "inputs": [tensor([256])], "outputs": [{"name": "o"}]}
    assert (await worker.post(INFER, body)).status_code == 422
