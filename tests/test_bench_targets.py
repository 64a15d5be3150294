"""The benchmark of the targets: a small run against a real server, and what it must not let pass."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import model_folder
import pytest
import simulated
import soak
import targets
from report import Measured
from served import Served
from tokenizers import Tokenizer
from workload import Ask, PromptMaker

from tgi_gateway.backend import EngineOptions
from tgi_gateway.types import Request, SamplingParams, StepEvents, StopRules

BENCH = Path(targets.__file__)


def test_a_quick_run_starts_a_server_and_gets_exactly_what_it_asked_for(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    log = tmp_path / "server.log"
    done = subprocess.run(
        [sys.executable, str(BENCH), "--quick", "--rows", "1,prefix", "--json", str(report), "--log", str(log)],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = {result["row"]: result for result in json.loads(report.read_text())["results"]}
    assert set(results) == {"1", "prefix"}
    assert all(not result["wrong"] and result["figures"] for result in results.values())
    # Two counted requests of 24 tokens; five of 410 tokens, each with the shared ones.
    assert results["1"]["details"]["output_tokens"] == 48
    assert results["prefix"]["details"]["input_tokens"] == 5 * 410
    assert results["1"]["cores"]["engine all"] > 0
    assert "Ready at" in log.read_text()


def test_an_unknown_row_is_told_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        targets.main(["--rows", "1,17"])
    assert "no 17; there are start, 1, 32" in capsys.readouterr().err


def test_a_token_too_few_makes_a_row_wrong() -> None:
    asked = [Ask("x", 7, 10), Ask("y", 7, 10)]
    measured = Measured("", "", "tgi", answers=2, input_tokens=14, output_tokens=20)
    assert targets.exactness(measured, asked) == []
    measured.output_tokens = 19
    assert targets.exactness(measured, asked) == ["19 output tokens instead of 20"]
    measured.output_tokens, measured.input_tokens, measured.answers = 20, 15, 1
    assert len(targets.exactness(measured, asked)) == 2


def test_the_written_folder_has_the_whole_vocabulary_and_words_of_one_token(tmp_path: Path) -> None:
    config = {**model_folder.LLAMA_8B, "vocab_size": 8192}
    model_folder.write_model_folder(tmp_path, config)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 8192
    words = (tmp_path / model_folder.WORDS).read_text().split()
    assert len(words) > 4096
    assert all(len(tokenizer.encode(f" {word}").ids) == 1 for word in words[::50])
    maker = PromptMaker(3, 40, tmp_path, tmp_path / model_folder.WORDS)
    prompts = [maker.make(100) for _ in range(5)]
    assert {tokens for _, tokens in prompts} == {100}
    ids = [tokenizer.encode(prompt).ids for prompt, _ in prompts]
    assert len({tuple(each[:40]) for each in ids}) == 1
    assert len({each[40] for each in ids}) > 1


def judged(kv_used: list[float], resident: list[int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the soak says of these samples of 1,000 KV tokens and one process."""
    info = {"max_batch_total_tokens": 1000, "max_concurrent_requests": 8, "max_total_tokens": 100}
    monkeypatch.setattr(soak, "server_info", lambda _url: info)
    maker = PromptMaker(0, 0, None, None)
    found = soak.Soak(Served("http://127.0.0.1:1"), "tgi", maker, seed=0)
    found.found.answers = 1
    for at, (used, size) in enumerate(zip(kv_used, resident, strict=True)):
        found.samples.append(soak.Sample(float(at), used, {"engine 1": size}, []))
    found.judge()
    return found.found.wrong


def test_a_soak_finds_memory_that_grows_and_a_cache_that_was_never_full(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, growing = [1 << 30] * 40, [(1 << 30) + at * (8 << 20) for at in range(40)]
    assert judged([960.0] * 40, flat, monkeypatch) == []
    assert "grew" in judged([960.0] * 40, growing, monkeypatch)[0]
    assert "proves nothing" in judged([500.0] * 40, flat, monkeypatch)[0]


async def test_the_simulated_device_answers_in_full_and_tells_how_busy_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environ = simulated.install(tmp_path)
    assert (tmp_path / "simulated-1.dist-info" / "entry_points.txt").read_text().endswith("simulated = simulated\n")
    assert str(BENCH.parent) in environ["PYTHONPATH"]
    fast = {"device_step_ms": 0.2, "device_row_ms": 0.01, "device_token_ms": 0.001, "device_launch_ms": 0.0}
    backend = simulated.create(EngineOptions(tmp_path, "nothing", max_batch_size=4, extra=fast))
    seen: list[StepEvents] = []
    info = await backend.start(seen.append)
    assert info.max_sequences == 4
    for number in range(6):
        backend.submit(Request(number, tuple(range(40)), SamplingParams(), StopRules(20, ignore_eos=True)))
    async with asyncio.timeout(60):
        while sum(len(events.finished) for events in seen) < 6:  # noqa: ASYNC110 - its thread knows of no event loop
            await asyncio.sleep(0.01)
    assert sum(len(events.token_ids) for events in seen) == 6 * 20
    with caplog.at_level("INFO"):
        await backend.stop(5.0)
    assert "device busy" in caplog.text
