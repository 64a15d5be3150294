"""The engine: loading, limits, static shapes, two steps in flight."""

from __future__ import annotations

import json
import logging
import math
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import ModelError, SettingsError
from tgi_gateway.types import SamplingParams
from tgi_model_server.buckets import choose_bucket, pad_plan
from tgi_model_server.device import AttentionShape, Bucket, KVLayout, StepLimits
from tgi_model_server.engine import Engine, load_engine
from tgi_model_server.kv.pool import PagePool, page_bytes
from tgi_model_server.plan import StepPlan
from tgi_model_server.step import StepOutput
from tgi_model_server.testing.devices import MeasuredDevice, ReferenceDevice, StaticDevice
from tgi_model_server.testing.models import SMALL, HandBatch, make_request, save_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"))


def load(folder: Path, device: ReferenceDevice | None = None, **options: Any) -> Engine:
    return load_engine(device or ReferenceDevice(), EngineOptions(folder, "test", **options))


def prompt(seed: int, length: int) -> list[int]:
    return [random.Random(seed).randrange(SMALL["vocab_size"]) for _ in range(length)]


SAMPLING: Sequence[SamplingParams] = [
    SamplingParams(),
    SamplingParams(do_sample=True, temperature=1.5, seed=3),
    SamplingParams(frequency_penalty=1.0, presence_penalty=0.5, repetition_penalty=1.1),
    SamplingParams(do_sample=True, top_p=0.8, top_k=30, presence_penalty=1.0, seed=4),
]


class PipelinedBatch(HandBatch):
    """Starts each step before it waits for the one before, as the step loop does on a device of depth 2."""

    def run_all(self, plans: Sequence[StepPlan]) -> list[list[int]]:
        flying: deque[StepOutput] = deque()
        out: list[list[int]] = []
        for plan in plans:
            flying.append(self._runner.run(plan))
            if len(flying) == 2:
                out.append(flying.popleft().wait().token_ids)
        out.extend(output.wait().token_ids for output in flying)
        return out


@pytest.mark.parametrize("sampling", SAMPLING)
def test_static_shapes_and_two_steps_in_flight_change_no_token(folder: Path, sampling: SamplingParams) -> None:
    requests = [make_request(i, prompt(i, length), sampling=sampling) for i, length in enumerate((30, 5, 19))]
    eager = HandBatch(load(folder, max_batch_size=4))
    expected = [eager.generate(request, 12) for request in requests]

    device = StaticDevice()
    engine = load(folder, device, max_batch_size=4, max_batch_prefill_tokens=40)
    assert engine.pipeline_depth == 2
    batch = PipelinedBatch(engine)
    for request in requests:
        batch.add(request)
    plans = [batch.plan((0, 21)), batch.plan((0, 9), (1, 5)), batch.plan((2, 19), (0, 1), (1, 1))]
    plans += [batch.plan((0, 1), (1, 1), (2, 1)) for _ in range(11)]
    steps = batch.run_all(plans)
    assert device.runs == [
        *(Bucket(5, 32) for _ in range(3)),
        *(Bucket(4, 4) for _ in range(11)),
    ]
    assert steps[0] == []
    found: list[list[int]] = [[steps[1][0], steps[2][1]], [steps[1][1], steps[2][2]], [steps[2][0]]]
    for step in steps[3:]:
        for tokens, token in zip(found, step, strict=True):
            tokens.append(token)
    assert [tokens[:12] for tokens in found] == expected


def test_a_start_tells_what_it_is_busy_with(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load(folder, StaticDevice(), max_batch_size=2, max_batch_prefill_tokens=32)
    phases = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert phases == ["Measuring the largest steps", "Recording steps"]


def test_a_step_that_fits_no_bucket_runs_as_it_is(folder: Path) -> None:
    device = StaticDevice()
    engine = load(folder, device, max_batch_size=2, max_batch_prefill_tokens=32)
    expected = HandBatch(load(folder)).generate(make_request(1, prompt(1, 100)), 3)
    device.runs.clear()
    assert HandBatch(engine).generate(make_request(1, prompt(1, 100)), 3) == expected
    assert device.runs == [Bucket(1, 1), Bucket(1, 1)]


def test_prompt_logprobs_survive_padding(folder: Path) -> None:
    tokens = prompt(2, 20)
    wanted = []
    for device in (ReferenceDevice(), StaticDevice()):
        batch = HandBatch(load(folder, device, max_batch_size=4, max_batch_prefill_tokens=64))
        batch.add(make_request(1, tokens))
        batch.add(make_request(2, tokens[:5]))
        result = batch.step((2, 5), (1, 20), targets={1: tokens[1:]})
        wanted.append(result.prompt_logprobs[1])
        assert all(math.isnan(value) for value in result.logprobs)
    assert wanted[0] == pytest.approx(wanted[1], abs=1e-5)
    assert len(wanted[0]) == 19


def test_a_step_without_sampled_rows_has_an_empty_result(folder: Path) -> None:
    batch = HandBatch(load(folder))
    batch.add(make_request(1, prompt(1, 30)))
    result = batch.step((1, 10))
    assert (result.token_ids, result.logprobs) == ([], [])


def test_buckets_hold_the_padding_rows_and_the_smallest_is_chosen() -> None:
    plan = StepPlan(slots=[0, 1], query_lens=[3, 1], kv_lens=[3, 9], pages=[[1], [2, 3]], token_ids=[1, 2, 3, 4])
    buckets = [Bucket(2, 8), Bucket(16, 16), Bucket(3, 8), Bucket(8, 8)]
    assert choose_bucket(plan, buckets) == Bucket(3, 8), "two rows of eight tokens leave nobody to own the spare four"
    assert choose_bucket(plan, [Bucket(2, 4), *buckets]) == Bucket(2, 4)
    assert choose_bucket(plan, [Bucket(1, 8), Bucket(8, 8)]) is None
    assert choose_bucket(plan, [Bucket(4, 4)]) is None, "a bucket for decoding only has a token for each row"
    assert choose_bucket(plan, [Bucket(6, 7)]) == Bucket(6, 7)
    assert pad_plan(plan, Bucket(6, 7), 8).query_lens == [3, 1, 1, 1, 1, 0], "other buckets have rows without any"
    padded = pad_plan(plan, Bucket(4, 16), 8)
    assert padded.query_lens == [3, 1, 6, 6]
    assert padded.kv_lens == [3, 9, 6, 6]
    assert padded.num_tokens == sum(padded.query_lens) == 16
    assert padded.pages == [[1], [2, 3], [0], [0]]
    assert set(padded.cache_slots(8)[4:]) <= set(range(8)), "padding writes to page 0"


def test_pages_fill_the_memory_that_is_free_but_no_more_than_all_sequences_need(folder: Path) -> None:
    engine = load(folder, max_batch_size=2)
    assert engine.num_pages == 1 + 2 * 256 // 4
    small = load(folder, ReferenceDevice(memory_bytes=3 << 20), max_batch_size=32, max_batch_prefill_tokens=32)
    assert 256 // 4 < small.num_pages < 32 * 256 // 4
    half = load(
        folder,
        ReferenceDevice(memory_bytes=3 << 20),
        max_batch_size=32,
        max_batch_prefill_tokens=32,
        memory_fraction=0.6,
    )
    assert half.num_pages < small.num_pages


def test_the_pool_takes_what_the_largest_steps_leave(folder: Path) -> None:
    device = MeasuredDevice(memory_bytes=4 << 20, step_bytes=1 << 20)
    engine = load(folder, device, max_batch_size=32, max_batch_prefill_tokens=300)
    mixed, decode, alike, *beside = device.measured
    assert (len(mixed.slots), mixed.num_tokens, max(mixed.kv_lens)) == (32, 332, 256)
    assert (len(decode.slots), decode.num_tokens, decode.is_decode) == (32, 32, True)
    assert (alike.query_lens, alike.kv_lens) == ([16] * 8, [256] * 8)
    assert [plan.query_lens for plan in beside] == [[*[1] * rows, 16] for rows in (1, 4, 31)]
    assert {length for plan in beside for length in plan.kv_lens} == {256}
    for plan in device.measured:
        assert plan.sample_rows == plan.slots == list(range(len(plan.kv_lens)))
        assert [len(pages) for pages in plan.pages] == [-(-length // 4) for length in plan.kv_lens]
    each = page_bytes(3, device.layout, engine._shape)
    assert engine.num_pages == (int((4 << 20) * 0.99) - (1 << 20)) // each
    assert len(HandBatch(engine).generate(make_request(1, prompt(1, 20)), 3)) == 3


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e4m3fn", torch.float8_e4m3fn), ("auto", torch.bfloat16)],
)
def test_pages_of_8_bits_hold_more_tokens(folder: Path, name: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"max_batch_size": 64, "dtype": "bfloat16"}
    plain = load(folder, MeasuredDevice(memory_bytes=2 << 20), **options)
    engine = load(folder, MeasuredDevice(memory_bytes=2 << 20), kv_cache_dtype=name, **options)
    assert {pool.dtype for pool in (*engine._kv.keys, *engine._kv.values)} == {dtype}
    assert engine.num_pages // plain.num_pages == 2 // dtype.itemsize
    tokens = HandBatch(engine).generate(make_request(1, prompt(1, 30)), 8, chunk=7)
    assert tokens == HandBatch(engine).generate(make_request(2, prompt(1, 30)), 8), "whatever the chunks"


class Capturing(MeasuredDevice):
    """Keeps the memory of captured steps apart."""

    def buckets(self, limits: StepLimits) -> Sequence[Bucket]:
        return [Bucket(min(4, limits.max_rows), 4)]


def test_what_captured_steps_keep_is_counted_besides(folder: Path) -> None:
    device = Capturing(memory_bytes=4 << 20, step_bytes=1 << 20)
    engine = load(folder, device, max_batch_size=32, max_batch_prefill_tokens=300)
    sizes = [(len(plan.slots), plan.num_tokens) for plan in device.measured]
    assert sizes == [(32, 332), (32, 32), (8, 128), (2, 17), (5, 20), (32, 47), (4, 4), (4, 4), (1, 4)]
    assert engine.num_pages == (int((4 << 20) * 0.99) - (2 << 20)) // page_bytes(3, device.layout, engine._shape)


def test_a_fraction_of_the_memory_is_counted_from_all_of_it(folder: Path) -> None:
    half = MeasuredDevice(memory_bytes=8 << 20, step_bytes=1 << 20)
    engine = load(folder, half, max_batch_size=64, memory_fraction=0.5)
    each = page_bytes(3, half.layout, engine._shape)
    assert engine.num_pages == ((4 << 20) - (1 << 20) - int((8 << 20) * 0.01)) // each


def test_more_tokens_than_fit_beside_the_largest_step_are_refused_with_what_does(folder: Path) -> None:
    options: dict[str, Any] = {"max_batch_size": 8, "max_batch_prefill_tokens": 64}
    with pytest.raises(SettingsError, match=r"1 MiB for the largest step, enough for (\d+) tokens") as refused:
        load(folder, MeasuredDevice(memory_bytes=4 << 20), max_batch_total_tokens=100_000, **options)
    most = int(str(refused.value).split("enough for ")[1].split()[0])
    engine = load(folder, MeasuredDevice(memory_bytes=4 << 20), max_batch_total_tokens=most, **options)
    assert engine.num_pages == 1 + most // 4
    with pytest.raises(SettingsError, match=f"enough for {most} tokens"):
        load(folder, MeasuredDevice(memory_bytes=4 << 20), max_batch_total_tokens=most + 1, **options)


def test_max_batch_total_tokens_is_kept_exactly_in_whole_pages(folder: Path) -> None:
    assert load(folder, max_batch_total_tokens=101).num_pages == 1 + 26


def test_memory_for_less_than_one_sequence_is_refused(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"max_total_tokens 256 needs .* Lower --max-total-tokens"):
        load(folder, ReferenceDevice(memory_bytes=1 << 16))
    tight = MeasuredDevice(memory_bytes=600 << 10, step_bytes=512 << 10)
    with pytest.raises(SettingsError, match=r"max_total_tokens 256 needs"):
        load(folder, tight, max_total_tokens=256, max_batch_size=2)
    # Nobody asked for 256.
    assert 1 < load(folder, tight, max_batch_size=2).num_pages <= 256 // 4
    with pytest.raises(SettingsError, match=r"max_batch_total_tokens is 1000000000, which needs"):
        load(folder, max_batch_total_tokens=10**9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_total_tokens": 300}, "max_total_tokens is 300; this model allows 256"),
        ({"dtype": "int4"}, "--dtype is 'int4'; allowed are float32, float16, bfloat16"),
        ({"quantize": "awq"}, "this engine does not support --quantize awq"),
        (
            {"kv_cache_dtype": "int8"},
            "--kv-cache-dtype is 'int8'; reference can keep .* in auto, fp8_e4m3, fp8_e4m3fn, fp8_e5m2",
        ),
        ({"lora_adapters": ("a", "b")}, "does not support --lora-adapters a,b"),
        ({"speculate": 3}, "does not support --speculate 3"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(folder, **options)


def test_rope_scaling_option_extends_what_the_model_allows(folder: Path) -> None:
    engine = load(folder, max_total_tokens=500, rope_scaling="dynamic", rope_factor=2.0)
    assert engine.limits.max_kv_len == 500
    assert len(HandBatch(engine).generate(make_request(1, prompt(1, 300)), 5)) == 5


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(ModelError, match=r"holds no \*.safetensors file"):
        load(tmp_path)


def test_what_the_engine_tells_about_itself(folder: Path) -> None:
    engine = load(folder, dtype="bfloat16", max_batch_size=7, max_total_tokens=99, max_batch_prefill_tokens=64)
    assert (engine.dtype, engine.vocab_size, engine.eos_token_ids, engine.device_name) == (
        "bfloat16",
        160,
        (1,),
        "reference",
    )
    assert (engine.max_sequences, engine.page_size, engine.pipeline_depth) == (7, 4, 1)
    assert (engine.limits.max_tokens, engine.limits.max_kv_len) == (71, 99)


@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_pool_has_zeroed_pages_of_the_size_it_was_said_to_have(order: Any) -> None:
    shape = AttentionShape(4, 2, 8, torch.float32, torch.bfloat16)
    layout = KVLayout(16, order)
    pool = PagePool(5, 3, layout, shape, ReferenceDevice().zeros)
    tensors = [*pool.keys, *pool.values]
    assert len(tensors) == 6
    assert {tuple(tensor.shape) for tensor in tensors} == {(5, 16, 2, 8) if order == "NHD" else (5, 2, 16, 8)}
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 5 * page_bytes(3, layout, shape)
    assert not any(tensor.any() for tensor in tensors)
