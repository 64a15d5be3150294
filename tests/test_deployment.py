"""What docker/ holds: linters pass, and every file, flag, route and metric that it names exists."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tgi_gateway.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
IMAGES = sorted(DOCKER.glob("*.Dockerfile"))
MANIFEST = DOCKER / "kubernetes" / "tgi-gateway.yaml"
FLAGS = {field.name for field in fields(Settings)}
OTHERS_VARIABLES = {"PATH", "HUGGINGFACE_HUB_CACHE", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "XDG_CACHE_HOME"}


def command(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not on this machine")
    return found


def promtool(*arguments: str) -> None:
    """Run it in the folder of the rules; it is part of Debian's package `prometheus`."""
    ran = subprocess.run(
        [command("promtool"), *arguments], cwd=DOCKER / "prometheus", capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.stem)
def test_hadolint_passes_the_image(image: Path) -> None:
    linted = subprocess.run(
        [command("hadolint"), "--config", str(DOCKER / ".hadolint.yaml"), "--no-color", str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert not linted.stdout


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.stem)
def test_an_image_copies_and_installs_what_is_there_and_runs_unprivileged(image: Path) -> None:
    text = image.read_text().replace("\\\n", " ")
    copies = [shlex.split(line)[1:] for line in re.findall(r"^COPY .*$", text, re.MULTILINE)]
    sources = [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]
    for source in sources:
        assert source.startswith("--") or (ROOT / source).exists(), source
    for target in re.findall(r"[\"' ]\./([a-z/-]+)", text):
        assert (ROOT / target / "pyproject.toml").is_file(), target
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["1000:1000"]
    for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE):
        names = {word.partition("=")[0] for word in shlex.split(line)}
        assert {name.lower() for name in names - OTHERS_VARIABLES} <= FLAGS


@pytest.mark.parametrize(
    ("constraints", "distributions"),
    [
        ("cpu", ("gateway", "model-server", "backends/cpu")),
        ("cuda", ("gateway", "model-server", "backends/cuda")),
        ("llamacpp", ("backends/llamacpp",)),
    ],
)
def test_pinned_versions_are_within_the_ranges_that_the_distributions_allow(
    constraints: str, distributions: tuple[str, ...]
) -> None:
    import tomllib

    lines = (DOCKER / "constraints" / f"{constraints}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    checked = set()
    for distribution in distributions:
        project = tomllib.loads((ROOT / distribution / "pyproject.toml").read_text())["project"]
        extras = project.get("optional-dependencies", {})
        for text in [*project["dependencies"], *(text for group in extras.values() for text in group)]:
            wanted = Requirement(text)
            name = re.sub(r"[-_.]+", "-", wanted.name).lower()
            if name in pins:
                assert wanted.specifier.contains(pins[name]), f"{text} in {distribution} against {pins[name]}"
                checked.add(name)
    assert checked


def test_kubernetes_takes_the_manifests() -> None:
    for version in ("1.31", "1.34"):
        checked = subprocess.run(
            [command("kubernetes-validate"), "--strict", "-k", version, str(MANIFEST)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_probes_flags_and_metrics_of_the_manifests_exist() -> None:
    documents = {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {entry["name"].lower() for entry in container["env"]} <= FLAGS
    named = {word[2:].replace("-", "_") for word in container["args"] if word.startswith("--")}
    assert named <= FLAGS
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/health/ready", "liveness": "/health", "readiness": "/health/ready"}
    public = next(entry["value"] for entry in container["env"] if entry["name"] == "PUBLIC_ROUTES").split(",")
    assert set(probes.values()) <= set(public)
    drained_s = int(container["args"][container["args"].index("--shutdown-timeout") + 1])
    waited_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= drained_s + waited_s + 5
    known = (ROOT / "gateway/src/tgi_gateway/telemetry/metrics.py").read_text()
    for metric in documents["HorizontalPodAutoscaler"]["spec"]["metrics"]:
        assert f'"{metric["pods"]["metric"]["name"]}"' in known


def test_the_composed_services_find_their_files() -> None:
    composed: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for service in composed["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in composed["volumes"] or (DOCKER / source).exists(), source
    gateway = composed["services"]["gateway"]
    assert (ROOT / gateway["build"]["dockerfile"]).is_file()
    assert {name.lower() for name in gateway["environment"]} <= FLAGS
    targets = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
    assert targets[0]["static_configs"][0]["targets"] == ["gateway:80"]


def test_prometheus_takes_its_configuration_and_the_alert_rules() -> None:
    promtool("check", "config", "prometheus.yaml")


def test_every_alert_fires_and_clears() -> None:
    tested = yaml.safe_load((DOCKER / "prometheus" / "alerts_test.yaml").read_text())["tests"]
    rules = yaml.safe_load((DOCKER / "prometheus" / "alerts.yaml").read_text())["groups"][0]["rules"]
    outcomes = {(case["alertname"], bool(case["exp_alerts"])) for each in tested for case in each["alert_rule_test"]}
    for rule in rules:
        assert (rule["alert"], True) in outcomes, rule["alert"]
    promtool("test", "rules", "alerts_test.yaml")


def test_prometheus_can_read_every_query_of_the_dashboard(tmp_path: Path) -> None:
    dashboard = json.loads((DOCKER / "grafana" / "tgi-gateway.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for variable, value in (("$__rate_interval", "1m"), ("$instance", ".*")):
        queries = [query.replace(variable, value) for query in queries]
    assert queries
    assert not [query for query in queries if "$" in query]
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(file))


def test_the_units_time_to_stop_is_longer_than_the_drain() -> None:
    unit = (DOCKER / "systemd" / "tgi-gateway.service").read_text()
    stop = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert stop is not None
    drain = next(field.default for field in fields(Settings) if field.name == "shutdown_timeout")
    assert isinstance(drain, int)
    assert int(stop[1]) > drain
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "DynamicUser=yes", "CapabilityBoundingSet="):
        assert f"\n{line}\n" in unit


def test_sagemakers_names_become_the_gateways(tmp_path: Path) -> None:
    """The real script, with a program in the gateway's place that writes what it was given."""
    program = tmp_path / "tgi-gateway"
    program.write_text('#!/bin/sh\necho "$@"\nenv\n')
    program.chmod(0o755)
    given = {
        "HF_MODEL_ID": "org/model",
        "HF_MODEL_REVISION": "main",
        "SM_NUM_GPUS": "2",
        "HF_MODEL_TRUST_REMOTE_CODE": "false",
    }

    def run(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(DOCKER / "sagemaker-entrypoint.sh"), "--max-input-tokens", "99"],
            env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run(given)
    lines = done.stdout.splitlines()
    assert lines[0] == "--port 8080 --max-input-tokens 99"
    assert {"MODEL_ID=org/model", "REVISION=main", "NUM_SHARD=2", "TRUST_REMOTE_CODE=false"} <= set(lines)
    assert not any(line.startswith("QUANTIZE=") for line in lines)
    assert "HF_MODEL_ID must be set" in run({}).stderr


@pytest.fixture
def answering() -> Iterator[tuple[int, list[int]]]:
    """A port, and the status that its /health answers with."""
    status = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1], status
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_health_check_tells_an_alive_server_from_others(answering: tuple[int, list[int]]) -> None:
    port, status = answering

    def check(port: int) -> int:
        environment = {**os.environ, "PORT": str(port)}
        return subprocess.run(
            [sys.executable, str(DOCKER / "health.py")], env=environment, stderr=subprocess.DEVNULL, check=False
        ).returncode

    assert check(port) == 0
    status[0] = 503
    assert check(port) == 1
    assert check(1) == 1


def test_the_installed_gateway_has_the_extras_that_the_images_install() -> None:
    extras = metadata.metadata("tgi-gateway").get_all("Provides-Extra") or []
    assert {"cpu", "cuda", "llamacpp"} <= set(extras)
