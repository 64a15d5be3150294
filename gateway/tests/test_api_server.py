from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tgi_gateway.api import bodies
from tgi_gateway.testing.echo import EchoBackend
from tgi_gateway.testing.scripted import Script, ScriptedBackend
from tgi_gateway.testing.worker import FIRST_BYTE, Worker, byte_toy, error_text

HEALTH = ["/", "/health", "/health/ready", "/health/generate", "/ping"]
GETS = [
    *HEALTH,
    "/info",
    "/metrics",
    "/v1/models",
    "/v1/models/echo",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/m/versions/1",
    "/v2/models/m/versions/1/ready",
]
BODIES: dict[str, dict[str, Any]] = {
    "/": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
    "/generate": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
    "/generate_stream": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
    "/tokenize": {"inputs": "a"},
    "/chat_tokenize": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/detokenize": {"tokens": [5]},
    "/invocations": {"inputs": "a", "parameters": {"max_new_tokens": 1}},
    "/vertex": {"instances": [{"inputs": "a", "parameters": {"max_new_tokens": 1}}]},
    "/v2/models/m/versions/1/infer": {
        "id": "x",
        "inputs": [{"name": "i", "shape": [1], "datatype": "BYTES", "data": [97]}],
        "outputs": [{"name": "o"}],
        "parameters": {"max_new_tokens": 1},
    },
}


async def test_info_tells_the_model_and_the_limits(worker: Worker) -> None:
    info = (await worker.client.get("/info")).json()
    assert info["model_id"] == "echo"
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (511, 512)
    assert (info["max_concurrent_requests"], info["max_best_of"], info["max_stop_sequences"]) == (128, 2, 4)
    assert (info["max_client_batch_size"], info["validation_workers"]) == (4, 2)
    assert info["router"] == "text-generation-router"
    assert info["version"]
    assert info["sha"] is info["docker_label"] is info["model_sha"] is None


async def test_models_are_listed_and_found_by_name(start_worker: Callable[..., Any]) -> None:
    engine = ScriptedBackend([Script.of(3)], byte_toy(model_id="some/model"))
    worker: Worker = await start_worker(engine)
    model = {"id": "some/model", "object": "model", "created": 0, "owned_by": "some/model"}
    assert (await worker.client.get("/v1/models")).json() == {"object": "list", "data": [model]}
    assert (await worker.client.get("/v1/models/some/model")).json() == model
    missing = await worker.client.get("/v1/models/other")
    assert missing.status_code == 404
    assert "`other` does not exist" in error_text(missing.json())


async def test_health_has_no_body_and_tells_live_from_able_to_generate(worker: Worker) -> None:
    live = ("/health", "/ping", "/")
    for path in (*live, "/health/ready", "/health/generate"):
        response = await worker.client.get(path)
        assert (response.status_code, response.content) == (200, b"")
    await worker.services.backend.stop(0.0)
    response = await worker.client.get("/health/generate")
    assert response.status_code == 503
    assert response.json()["error_type"] == "healthcheck"
    assert int(response.headers["retry-after"]) > 0
    for path in live:
        assert (await worker.client.get(path)).status_code == 200, "live is not ready"


async def test_closed_doors_are_told_to_probes_and_to_new_requests(worker: Worker) -> None:
    worker.services.doors.close()
    assert (await worker.client.get("/health/ready")).status_code == 503
    assert (await worker.client.get("/health/generate")).status_code == 503
    assert (await worker.client.get("/health")).status_code == 200
    for path, body in BODIES.items():
        response = await worker.post(path, body)
        assert response.status_code == 503, path
        assert "The server is stopping" in response.text
        assert int(response.headers["retry-after"]) > 0
    assert (await worker.client.get("/metrics")).status_code == 200


async def test_who_is_inside_finishes_after_the_doors_have_closed(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(EchoBackend(byte_toy(), step_s=0.02))
    doors = worker.services.doors
    body = {"inputs": "abc", "parameters": {"max_new_tokens": 20}}
    answers = [asyncio.create_task(worker.post(path, body)) for path in ("/generate", "/generate_stream")]
    while len(worker.services.generations) < 2:  # noqa: ASYNC110 - they are made by requests
        await asyncio.sleep(0.01)
    doors.close()
    assert not await doors.empty(0.01)
    assert await doors.empty(20)
    assert [answer.status_code for answer in await asyncio.gather(*answers)] == [200, 200]


@pytest.mark.parametrize("path", GETS)
async def test_head_is_answered_like_get(worker: Worker, path: str) -> None:
    response = await worker.client.head(path)
    assert response.status_code == 200


async def test_unknown_routes_and_wrong_methods_have_no_body(worker: Worker) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/generate/", 404),
        ("GET", "/generate", 405),
        ("POST", "/info", 405),
        ("DELETE", "/", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("GET", "/v1/nothing", 404),
    ):
        response = await worker.client.request(method, path)
        assert response.status_code == status, (method, path)
        if path.startswith("/v1/"):
            assert error_text(response.json()).startswith(f"There is no {method} {path} here")
        else:
            assert response.content == b""


async def test_metrics_count_requests_tokens_and_failures(worker: Worker) -> None:
    await worker.answer("/generate", {"inputs": "abc", "parameters": {"max_new_tokens": 4}})
    await worker.events("/generate_stream", {"inputs": "abc", "parameters": {"max_new_tokens": 4}})
    await worker.error("/generate", {"inputs": ""})
    await worker.error("/v1/completions", {"prompt": "a", "suffix": "b"})
    await worker.post("/generate", "no generation")
    response = await worker.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    assert "tgi_request_count 4.0" in lines
    assert "tgi_request_success 2.0" in lines
    assert 'tgi_request_failure{err="validation"} 2.0' in lines
    assert "tgi_request_generated_tokens_sum 8.0" in lines
    assert "tgi_request_inter_token_duration_count 6.0" in lines
    assert "tgi_request_first_token_duration_count 2.0" in lines


async def test_every_kind_of_failure_is_counted_under_its_name(start_worker: Callable[..., Any]) -> None:
    engine = ScriptedBackend([Script.of(FIRST_BYTE, then="fail")], byte_toy())
    worker: Worker = await start_worker(engine, max_concurrent_requests=1)
    await worker.post("/generate", {"inputs": "a"})
    await worker.events("/generate_stream", {"inputs": "a"})
    with worker.services.permits.hold(1):
        await worker.post("/generate", {"inputs": "a"})
    worker.services.chat_template = None
    await worker.post("/v1/chat/completions", BODIES["/v1/chat/completions"])
    text = (await worker.client.get("/metrics")).text
    for label, count in (("generation", 2), ("overloaded", 1), ("template", 1)):
        assert f'tgi_request_failure{{err="{label}"}} {count}.0' in text


async def test_each_finished_request_logs_one_line_without_its_prompt(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wanted = {"inputs": "secret", "parameters": {"max_new_tokens": 3, "do_sample": True, "seed": 11}}
    await worker.answer("/generate", wanted)
    await asyncio.sleep(0)  # the line is written after the answer
    records = [record for record in caplog.records if record.name == "tgi_gateway.request"]
    assert [record.getMessage() for record in records] == ["Success"]
    told = records[0].__dict__["tgi_span"]
    assert told["name"] == "generate"
    assert told["seed"] == 11
    for name in ("total_time", "validation_time", "queue_time", "inference_time", "time_per_token"):
        assert told[name].endswith("s")
    caplog.clear()
    await worker.events("/generate_stream", wanted)
    await worker.error("/generate", {"inputs": "secret", "parameters": {"top_k": 0}})
    assert [record.levelname for record in caplog.records if record.name == "tgi_gateway.request"] == ["INFO", "INFO"]
    assert not any("secret" in str(record.__dict__) for record in caplog.records if record.name.startswith("tgi_"))


# The API key.


@pytest.fixture
async def locked(start_worker: Callable[..., Any]) -> Worker:
    worker: Worker = await start_worker(api_key="Sesame-ü")
    return worker


def bearer(key: str, scheme: str = "Bearer") -> dict[bytes, bytes]:
    return {b"authorization": f"{scheme} {key}".encode()}


async def test_without_the_key_only_liveness_answers(locked: Worker) -> None:
    for path in [*GETS, "/docs", "/api-doc/openapi.json", "/unknown"]:
        response = await locked.client.get(path)
        if path in ("/health", "/health/ready", "/ping", "/v2/health/live", "/v2/health/ready"):
            assert response.status_code == 200
        else:
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key" if "/v1/" in path else not response.content
            assert response.headers["www-authenticate"] == "Bearer"
    for path, body in BODIES.items():
        assert (await locked.post(path, body)).status_code == 401, path
    assert "tgi_request_count 0.0" in (await locked.client.get("/metrics", headers=bearer("Sesame-ü"))).text


async def test_with_the_key_every_route_answers(locked: Worker) -> None:
    for path, body in BODIES.items():
        response = await locked.client.post(path, json=body, headers=bearer("Sesame-ü", "bearer"))
        assert response.status_code == 200, path


@pytest.mark.parametrize(
    "headers",
    [
        bearer("sesame-ü"),
        bearer("SESAME-Ü"),
        bearer("Sesame-"),
        bearer("Sesame-üü"),
        bearer(""),
        bearer("Sesame-ü", "Basic"),
        {b"authorization": b"Bearer"},
        {b"authorization": b"Bearer Sesame-\xfc"},
        {b"authorization": b"Sesame-\xc3\xbc"},
    ],
)
async def test_a_wrong_key_is_refused(locked: Worker, headers: dict[bytes, bytes]) -> None:
    assert (await locked.client.get("/info", headers=headers)).status_code == 401


async def test_the_operator_may_open_further_routes(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(api_key="k", public_routes=("/metrics",))
    assert (await worker.client.get("/metrics")).status_code == 200
    assert (await worker.client.get("/health")).status_code == 401


# Browsers.


async def test_a_browser_may_send_the_key_and_read_the_headers(locked: Worker) -> None:
    preflight = await locked.client.options(
        "/generate",
        headers={
            "origin": "https://page.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    refused = await locked.client.get("/info", headers={"origin": "https://page.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "*"
    assert "x-compute-time" in refused.headers["access-control-expose-headers"]


async def test_only_named_origins_are_allowed_where_there_are_any(start_worker: Callable[..., Any]) -> None:
    worker: Worker = await start_worker(cors_allow_origin=("https://mine.example",))
    mine = await worker.client.get("/info", headers={"origin": "https://mine.example"})
    assert mine.headers["access-control-allow-origin"] == "https://mine.example"
    other = await worker.client.get("/info", headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


# The description.


async def test_the_description_tells_every_field_of_every_body(worker: Worker) -> None:
    document = (await worker.client.get("/api-doc/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for name, kind in (
        ("GenerateRequest", bodies.GenerateBody),
        ("CompatGenerateRequest", bodies.CompatGenerateBody),
        ("GenerateParameters", bodies.ParametersBody),
        ("ChatRequest", bodies.ChatBody),
        ("CompletionRequest", bodies.CompletionBody),
    ):
        assert set(schemas[name]["properties"]) == {field.encode_name for field in msgspec.structs.fields(kind)}
    described = schemas["GenerateParameters"]["properties"]
    assert all(field.get("description") for field in described.values())
    for path in BODIES:
        path = path.replace("/m/", "/{model_name}/").replace("/1/", "/{model_version}/")
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference.removeprefix("#/components/schemas/") in schemas


async def test_every_reference_of_the_description_leads_somewhere(worker: Worker) -> None:
    document = (await worker.client.get("/api-doc/openapi.json")).json()
    schemas = document["components"]["schemas"]

    def check(value: object) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                assert value["$ref"].removeprefix("#/components/schemas/") in schemas
            for inner in value.values():
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)

    check(document)
    identifiers = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(identifiers)) == len(identifiers)


async def test_the_documentation_page_is_served(worker: Worker) -> None:
    response = await worker.client.get("/docs")
    assert response.status_code == 200
    assert "/api-doc/openapi.json" in response.text


@pytest.mark.parametrize("asked", [False, True])
async def test_prompts_and_answers_are_logged_only_when_asked(
    start_worker: Callable[..., Any], caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    worker: Worker = await start_worker(log_prompts=asked)
    with caplog.at_level(logging.DEBUG):
        await worker.answer("/generate", {"inputs": "open sesame " * 30, "parameters": {"max_new_tokens": 12}})
        await asyncio.sleep(0)
    (told,) = [record.tgi_span for record in caplog.records if record.getMessage() == "Success"]  # type: ignore[attr-defined]
    assert told.get("answer") == ("open sesame " if asked else None)
    assert told.get("prompt") == ("open sesame " * 30 if asked else None)
    assert asked or not any("sesame" in str(vars(record)) for record in caplog.records if record.name[:4] == "tgi_")
