"""`--num-shard 2` through HTTP: the same answers as one process, and a clear end when a rank dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
from servers import Server, run_server

PROMPTS = ("The capital of France is", "Count from 1 to 12.", "Once upon a time")


def generate(server: Server, prompt: str) -> httpx.Response:
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 24, "details": True}}
    return httpx.post(f"{server.url}/generate", json=body, timeout=60)


def ranks() -> set[int]:
    """Pids of all processes that are ranks of an engine, but for the first."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"tgi_model_server.rank" in (folder / "cmdline").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def test_two_ranks_answer_as_one_and_end_together(demo_server: Server, tmp_path: Path) -> None:
    before = ranks()
    flags = "--backend cpu --num-shard 2 --dtype float32 --max-batch-total-tokens 4096 --restart-engine false"
    with run_server(tmp_path, *flags.split()) as server:
        (rank,) = ranks() - before
        for prompt in PROMPTS:
            split, whole = generate(server, prompt), generate(demo_server, prompt)
            assert split.status_code == 200, split.text
            assert split.json()["generated_text"] == whole.json()["generated_text"]
        body = {"model": "demo", "prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data:")
            os.kill(rank, signal.SIGKILL)
            assert any("the engine has stopped" in line for line in lines)
        assert server.process.wait(30) == 1
        assert "rank 1 of 2 was ended by SIGKILL" in server.log.read_text()
    assert ranks() <= before
