"""What the dashboard and the alert rules ask for exists, and every metric of TGI does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from launched import Gateway, serving

DOCKER = Path(__file__).parent.parent / "docker"
TGI = """
request_count counter
request_success counter
request_failure counter
request_duration histogram
request_validation_duration histogram
request_queue_duration histogram
request_inference_duration histogram
request_mean_time_per_token_duration histogram
request_generated_tokens histogram
request_input_length histogram
request_max_new_tokens histogram
request_skipped_tokens histogram
queue_size gauge
batch_current_size gauge
batch_current_max_tokens gauge
batch_next_size histogram
batch_max_total_tokens gauge
batch_total_tokens gauge
batch_inference_count counter
batch_inference_success counter
batch_inference_failure counter
batch_inference_duration histogram
batch_forward_duration histogram
batch_decode_duration histogram
batch_filter_duration histogram
batch_concat_duration histogram
batch_concat counter
"""


@pytest.fixture(scope="module")
def exposition(byte_model: Path) -> Iterator[str]:
    """/metrics of a server with a key, two workers, and a few requests behind it."""
    with serving(byte_model, "--http-workers", "2", API_KEY="k") as gateway:
        yield _used(gateway)


def _used(gateway: Gateway) -> str:
    headers = {"authorization": "Bearer k"}
    body = {"inputs": "abc", "parameters": {"max_new_tokens": 5}}
    for _ in range(8):
        assert httpx.post(f"{gateway.url}/generate", json=body, headers=headers).status_code == 200
    refused = httpx.post(f"{gateway.url}/generate", json={"inputs": ""}, headers=headers)
    assert refused.status_code == 422
    time.sleep(0.6)  # counters of the other worker reach the shared folder twice a second
    return httpx.get(f"{gateway.url}/metrics", headers=headers).text


def samples(exposition: str) -> set[str]:
    return {re.split(r"[{ ]", line, maxsplit=1)[0] for line in exposition.splitlines() if not line.startswith("#")}


def asked_for(expression: str) -> set[str]:
    return set(re.findall(r"\btgi_[a-z_]+", expression))


@pytest.mark.parametrize("line", TGI.split("\n")[1:-1])
def test_every_metric_of_tgi_is_there(exposition: str, line: str) -> None:
    name, kind = line.split()
    assert f"# TYPE tgi_{name} {kind}\n" in exposition
    assert f"tgi_{name}{'_bucket' if kind == 'histogram' else ''}" in samples(exposition)


def test_values_add_up_over_the_workers(exposition: str) -> None:
    for line in (
        "tgi_request_count 9.0",
        "tgi_request_success 8.0",
        'tgi_request_failure{err="validation"} 1.0',
        'tgi_request_failure{err="overloaded"} 0.0',
        "tgi_generated_tokens 40.0",
        "tgi_request_first_token_duration_count 8.0",
        "tgi_engine_up 1.0",
    ):
        assert f"\n{line}\n" in exposition
    assert re.search(r'\ntgi_key_requests\{key="[0-9a-f]{16}"\} 8\.0\n', exposition)


def test_promtool_finds_nothing_wrong_but_the_names_that_are_tgis(exposition: str) -> None:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not on this machine")
    checked = subprocess.run([found, "check", "metrics"], input=exposition, capture_output=True, text=True, check=False)
    names = re.compile(r'tgi_\w+ (counter metrics should have "_total" suffix|.* should not have "_count" suffix)')
    assert [line for line in checked.stderr.splitlines() if not names.fullmatch(line)] == []
    assert not checked.stdout


def test_the_dashboard_asks_only_for_what_exists(exposition: str) -> None:
    dashboard = json.loads((DOCKER / "grafana" / "tgi-gateway.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 40
    wanted = set().union(*map(asked_for, expressions))
    # The failures of a key are told from its first on.
    assert wanted - samples(exposition) == set()
    places = [tuple(panel["gridPos"][side] for side in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_the_alert_rules_ask_only_for_what_exists(exposition: str) -> None:
    rules = [
        rule
        for group in yaml.safe_load((DOCKER / "prometheus" / "alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
    ]
    assert len(rules) >= 8
    for rule in rules:
        assert asked_for(rule["expr"]) - samples(exposition) == set(), rule["alert"]
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"].keys() == {"summary", "action"}
