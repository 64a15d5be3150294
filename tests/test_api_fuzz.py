"""Schemathesis over the whole description: nothing is a server error, whatever it sends, and answers are as told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from servers import Server, run_server

from tgi_gateway.testing.worker import write_byte_model

EXAMPLES = 4
"""Of valid and of invalid requests each, for every operation."""
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def echo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("echo")
    write_byte_model(folder)
    arguments = ["--backend", "echo", "--model-id", str(folder), "--max-total-tokens", "64"]
    with run_server(Path(tmp_path_factory.mktemp("log")), *arguments) as server:
        yield server


def failures_of(operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode) -> Iterator[str]:
    """What is wrong with the answers to some requests."""
    found: list[str] = []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case[Any]) -> None:
        response = case.call(timeout=30)
        # Events are checked as such elsewhere: a description has no word for a stream of them.
        streams = "event-stream" in response.headers.get("content-type", [""])[0]
        try:
            case.validate_response(
                response, checks=[check for check in CHECKS if check is not CHECKS[-1] or not streams]
            )
        except FailureGroup as group:
            found.extend(f"{operation.label}: {response.status_code}: {failure}" for failure in group.exceptions)

    send()
    yield from found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
def test_no_request_is_a_server_error_and_every_answer_is_as_described(echo_server: Server) -> None:
    description = schemathesis.openapi.from_url(f"{echo_server.url}/api-doc/openapi.json")
    operations = [result.ok() for result in description.get_all_operations() if isinstance(result, Ok)]
    assert len(operations) > 20
    failures: list[str] = []
    for operation in operations:
        failures += failures_of(operation, GenerationMode.POSITIVE)
        if operation.body:  # nothing else of a request can be invalid: a path's variables may be any text
            failures += failures_of(operation, GenerationMode.NEGATIVE)
    assert not failures, "\n\n".join(failures)
