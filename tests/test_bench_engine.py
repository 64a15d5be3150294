"""The benchmark of the engine alone: a small run on the CPU, and how it reads a trace."""

from __future__ import annotations

import json
from pathlib import Path

import engine
import host
import pytest
from steps import busy_share

from tgi_gateway.wire import engine_pb2 as pb
from tgi_gateway.wire.codec import encode_step


def test_a_quick_run_measures_steps_prefill_and_the_hosts_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    assert (
        engine.main(["--backend", "cpu", "--quick", "--decode", "2x20,9x20", "--steps", "4", "--json", str(found)]) == 0
    )
    document = json.loads(found.read_text())
    (row,) = document["decode"]
    assert (row["rows"], row["context"]) == (2, 20)
    assert row["step_ms"] * 1e3 >= sum(row["host_us"].values()) > row["host_us"]["launch"] > 0
    assert document["left_out"] == ["decode 9x20: at most 8 rows"]
    assert [(chunk["chunk"], chunk["context"]) for chunk in document["prefill"]] == [(64, 0), (64, 64)]
    assert "limits measured here" in capsys.readouterr().out


def test_a_backend_that_is_missing_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.main(["--backend", "nosuch", "--quick"]) == 1
    assert "nosuch" in capsys.readouterr().err


async def test_the_hosts_stages_are_measured_on_steps_that_lose_no_row() -> None:
    stages, asked = host.Stages(), host.requests(6, 8, 2)
    steps = host.batcher_steps(stages, asked, 8)
    assert len(steps) == host.STEPS
    assert all(sorted(step.request_ids) == sorted(each.request_id for each in asked) for step in steps)
    await host.host_steps(stages, asked, steps)
    assert {len(times) for stage, times in stages.times.items() if stage.startswith("wire")} == {host.STEPS}
    parts = host.decode_all([pb.FromHost(step=encode_step(steps[0], None)).SerializeToString()])
    assert parts[0].token_ids == steps[0].token_ids


def test_busy_time_counts_overlapping_kernels_once(tmp_path: Path) -> None:
    def event(category: str, begin: float, duration: float) -> dict[str, object]:
        return {"ph": "X", "cat": category, "ts": begin, "dur": duration}

    trace = tmp_path / "trace.json"
    events = [event("kernel", 0, 40), event("gpu_memcpy", 30, 20), event("cpu_op", 50, 50), event("kernel", 90, 10)]
    trace.write_text(json.dumps({"traceEvents": events}))
    assert busy_share(trace) == pytest.approx(0.6)
    trace.write_text(json.dumps({"traceEvents": events[2:3]}))
    assert busy_share(trace) is None
