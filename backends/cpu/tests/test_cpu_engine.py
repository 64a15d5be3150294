"""The engine on the CPU device: same request, same tokens, whatever happens around it."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tgi_backend_cpu.device import CpuDevice
from tgi_gateway.backend import EngineOptions
from tgi_gateway.hub import demo_model
from tgi_gateway.types import SamplingParams
from tgi_model_server import machine
from tgi_model_server.engine import Engine, load_engine
from tgi_model_server.plan import StepResult
from tgi_model_server.testing.models import SMALL, HandBatch, make_request, save_random_model

VOCABULARY = SMALL["vocab_size"]
WINDOWED = {**SMALL, "model_type": "mistral", "sliding_window": 50, "head_dim": 16}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(folder: Path, dtype: str = "float32") -> Engine:
    options = EngineOptions(folder, "test", dtype=dtype, max_batch_size=33, max_batch_total_tokens=20000)
    return load_engine(CpuDevice(threads=1), options)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "windowed"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    raw = WINDOWED if request.param == "windowed" else SMALL
    folder = save_random_model(tmp_path_factory.mktemp("model"), raw)
    return load(folder, "float32" if request.param == "windowed" else request.param)


def prompt(seed: int, length: int) -> list[int]:
    return [random.Random(seed).randrange(VOCABULARY) for _ in range(length)]


SAMPLING = [
    SamplingParams(),
    SamplingParams(do_sample=True, temperature=0.8, seed=7),
    SamplingParams(do_sample=True, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=1 << 63),
    SamplingParams(frequency_penalty=0.5, presence_penalty=0.3, logit_bias=((3, 2.0),)),
]


def kept(results: list[tuple[StepResult, int]]) -> list[tuple[int, float]]:
    return [(result.token_ids[row], float(result.logprobs[row])) for result, row in results]


@pytest.mark.skipif(not machine.rounds_alike(), reason="on this processor MKL rounds by the number of rows")
@pytest.mark.parametrize("sampling", SAMPLING)
def test_tokens_and_logprobs_are_equal_alone_and_among_thirty_others(engine: Engine, sampling: SamplingParams) -> None:
    count = 24
    mine = make_request(1, prompt(0, 70), sampling=sampling, logprobs=True)
    alone = HandBatch(engine, seed=0)
    alone.add(mine)
    expected = kept([(alone.step((1, 70)), 0)])
    while len(expected) < count:
        expected += kept([(alone.step((1, 1)), 0)])
    alone.remove(1)

    crowd = HandBatch(engine, seed=1)
    rng = random.Random(2)
    others = list(range(2, 32))
    for other in others:
        length = rng.randrange(1, 130)
        crowd.add(make_request(other, prompt(other, length), sampling=rng.choice(SAMPLING), logprobs=other % 2 == 0))
        crowd.step((other, length))
    crowd.add(mine)
    crowd.step((1, 33), *((other, 1) for other in others))
    found = kept([(crowd.step(*((other, 1) for other in others[:9]), (1, 37)), 9)])
    for _ in range(count - 1):
        beside = rng.sample(others, rng.randrange(31))
        at = rng.randrange(len(beside) + 1)
        parts = [(other, 1) for other in beside]
        found += kept([(crowd.step(*parts[:at], (1, 1), *parts[at:]), at)])
    for request_id in (1, *others):
        crowd.remove(request_id)
    assert found == expected


@pytest.mark.parametrize("sampling", SAMPLING)
def test_preemption_and_recomputation_do_not_change_what_follows(engine: Engine, sampling: SamplingParams) -> None:
    mine = make_request(1, prompt(5, 40), sampling=sampling)
    batch = HandBatch(engine)
    expected = batch.generate(mine, 20)
    for generated in (1, 7, 19):
        batch.add(mine, expected[:generated])
        found = batch.step((1, 40 + generated)).token_ids
        while generated + len(found) < 20:
            found += batch.step((1, 1)).token_ids
        batch.remove(1)
        assert expected[:generated] + found == expected


def test_prompt_logprobs_are_those_of_the_model_in_any_chunks(engine: Engine) -> None:
    tokens = prompt(9, 140)
    batch = HandBatch(engine)
    batch.add(make_request(1, tokens))
    whole = batch.step((1, 140), targets={0: tokens[1:]}).prompt_logprobs[0]
    batch.remove(1)
    batch.add(make_request(1, tokens))
    parts: list[float] = []
    for first, last in ((0, 1), (1, 50), (50, 139), (139, 140)):
        step = batch.step((1, last - first), targets={0: tokens[first + 1 : last + 1]})
        parts += step.prompt_logprobs[0]
    batch.remove(1)
    assert parts == whole
    assert len(whole) == 139
    assert all(value < 0 for value in whole)


def test_top_tokens_are_sorted_and_agree_with_the_chosen_tokens_logprob(engine: Engine) -> None:
    batch = HandBatch(engine)
    batch.add(make_request(1, prompt(1, 30), top_n_tokens=5))
    batch.add(make_request(2, prompt(2, 8)))
    batch.add(make_request(3, prompt(3, 8), logprobs=True))
    result = batch.step((2, 8), (1, 30), (3, 8))
    assert list(result.top) == [1]
    top = result.top[1]
    assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
    assert top[0] == (result.token_ids[1], result.logprobs[1])
    assert math.isnan(result.logprobs[0])
    assert float(result.logprobs[2]) < 0
    for request_id in (1, 2, 3):
        batch.remove(request_id)


def test_the_demo_model_generates_what_transformers_generates() -> None:
    folder = demo_model()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    engine = load(folder)
    rng = random.Random(0)
    prompts = [[rng.randrange(engine.vocab_size) for _ in range(rng.randrange(3, 90))] for _ in range(16)]
    theirs = []
    for each in prompts:
        ids = torch.tensor([each])
        # Without a mask, transformers takes the padding token for padding wherever it stands.
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0
        )
        theirs.append(out[0, len(each) :].tolist())
    batch = HandBatch(engine)
    assert [batch.generate(make_request(1, each), 64) for each in prompts[:4]] == theirs[:4]
    for request_id, each in enumerate(prompts):
        batch.add(make_request(request_id, each))
    together = [batch.step((request_id, len(each))).token_ids for request_id, each in enumerate(prompts)]
    for _ in range(63):
        result = batch.step(*((request_id, 1) for request_id in range(16)))
        for tokens, token in zip(together, result.token_ids, strict=True):
            tokens.append(token)
    assert together == theirs


def test_small_models_compute_in_float32_and_large_ones_in_bfloat16() -> None:
    device = CpuDevice(threads=1)
    assert device.default_dtype(torch.bfloat16, 5_000_000) is torch.float32
    assert device.default_dtype(torch.float32, 70_000_000_000) is torch.bfloat16


def test_memory_offers_less_than_the_machine_has() -> None:
    figures = CpuDevice(threads=1).memory()
    assert 0 < figures.free < figures.total


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_steps_in_another_thread_use_no_more_threads_than_the_device_was_given() -> None:
    code = """
import os, threading
import torch
from tgi_backend_cpu.device import CpuDevice
from tgi_model_server.device import AttentionShape, KVLayout
from tgi_model_server.plan import StepPlan
device = CpuDevice(threads=1)
weight = device.ops.pack_linear(torch.randn(2048, 2048))
x, tasks = torch.randn(64, 2048), []
def step():
    before = len(os.listdir("/proc/self/task"))
    device.plan_attention(StepPlan(), AttentionShape(1, 1, 8, torch.float32, torch.float32), KVLayout(32))
    device.ops.linear(x, weight, None)
    tasks.append(len(os.listdir("/proc/self/task")) - before)
thread = threading.Thread(target=step)
thread.start()
thread.join()
assert tasks == [0], tasks
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_threads_follow_the_environment_and_never_exceed_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = os.cpu_count() or 1
    assert 1 <= machine.usable_cores() <= max(1, cores - 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine.usable_cores() == 3


def test_cpu_quota_of_a_control_group_limits_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert machine.usable_cores() == 1


def test_memory_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert machine.total_bytes() == 1_000_000
    assert machine.available_bytes() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.total_bytes() > 1_000_000


def test_the_plugin_describes_itself_without_importing_torch() -> None:
    code = (
        "import sys, tgi_backend_cpu.plugin as p; b = p.tgi_backend(); assert b.name == 'cpu'; "
        "assert b.missing() is None; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
