"""Architectures against transformers, on small random models."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tgi_gateway.backend import EngineOptions
from tgi_model_server.device import AttentionShape, Device
from tgi_model_server.engine import load_engine
from tgi_model_server.kv.pool import PagePool
from tgi_model_server.models.config import load_config
from tgi_model_server.models.registry import build_model
from tgi_model_server.parallel import Shard
from tgi_model_server.plan import StepPlan
from tgi_model_server.step import StepInput
from tgi_model_server.testing.devices import ReferenceDevice, StaticDevice
from tgi_model_server.testing.models import SMALL, HandBatch, make_request, save_random_model
from tgi_model_server.weights.loader import CheckpointWeights

QWEN = {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 50000.0}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "llama-tied-mha": {"tie_word_embeddings": True, "num_key_value_heads": 6},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-head-dim": {"head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 11, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **QWEN},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
        **QWEN,
    },
    "qwen2-window-off": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 7, **QWEN},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, **QWEN},
    "qwen3-layer-types": {
        "model_type": "qwen3",
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 9,
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **QWEN,
    },
    "rope-linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "rope-linear-old-spelling": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "rope-dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "rope-llama3": {
        "max_position_embeddings": 2048,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "rope-yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "rope-yarn-mscale": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
}
LENGTHS = (61, 40, 9)


def transformers_logits(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """float32 [tokens, vocabulary] of each prompt."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]


def our_logits(device: Device, folder: Path, prompts: list[list[int]], seed: int) -> list[torch.Tensor]:
    """The same, in steps that mix chunks and single tokens of all prompts, on shuffled pages."""
    config = load_config(folder)
    shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, torch.float32, torch.float32)
    layout = device.kv_layout(shape)
    weights = CheckpointWeights(folder, dtype=torch.float32, device=device.torch_device, shard=Shard())
    model = build_model(config, shape, weights, device.ops, device=device.torch_device, max_positions=256)
    per_prompt = -(-max(LENGTHS) // layout.page_size)
    rng = random.Random(seed)
    ids = rng.sample(range(1, per_prompt * len(prompts) + 1), per_prompt * len(prompts))
    pages = [ids[i * per_prompt : (i + 1) * per_prompt] for i in range(len(prompts))]
    pool = PagePool(len(ids) + 1, config.num_layers, layout, shape, device.zeros)
    done, parts = [0] * len(prompts), [list[torch.Tensor]() for _ in prompts]
    with torch.inference_mode():
        while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
            plan, rows = StepPlan(), []
            for index, prompt in enumerate(prompts):
                count = min(rng.choice((0, 1, 1, 2, 13, 30)), len(prompt) - done[index])
                if count:
                    plan.token_ids += prompt[done[index] : done[index] + count]
                    done[index] += count
                    plan.slots.append(index)
                    plan.query_lens.append(count)
                    plan.kv_lens.append(done[index])
                    plan.pages.append(pages[index])
                    rows.append((index, count))
            if not rows:
                continue
            attention = device.plan_attention(plan, shape, layout)
            lasts = torch.tensor(plan.query_lens).cumsum(0) - 1
            step = StepInput(torch.tensor(plan.token_ids), torch.tensor(plan.positions()), lasts, attention)
            alone = model.logits(model.forward(step, pool))
            logits = model.logits(model.forward(replace(step, whole=True), pool))
            torch.testing.assert_close(alone, logits[lasts], rtol=0, atol=1e-4, msg="of the last tokens alone")
            for (index, _), part in zip(rows, logits.split_with_sizes([count for _, count in rows]), strict=True):
                parts[index].append(part)
    return [torch.cat(each) for each in parts]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers_in_chunks_and_mixed_steps_on_shuffled_pages(
    name: str, tmp_path: Path
) -> None:
    raw = {**SMALL, **MODELS[name]}
    folder = save_random_model(tmp_path, raw)
    rng = random.Random(name)
    prompts = [[rng.randrange(raw["vocab_size"]) for _ in range(length)] for length in LENGTHS]
    theirs = transformers_logits(folder, prompts)
    for seed in range(2):
        ours = our_logits(ReferenceDevice(), folder, prompts, seed)
        assert max(map(relative_error, ours, theirs)) < 1e-4


def test_dynamic_rope_past_the_trained_positions_equals_generation_token_by_token(tmp_path: Path) -> None:
    raw = {**SMALL, "max_position_embeddings": 32, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    folder = save_random_model(tmp_path, raw)
    prompt = [random.Random(3).randrange(160) for _ in range(max(LENGTHS))]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        out = model(torch.tensor([prompt[:32]]), use_cache=True)
        theirs = [out.logits[0]]
        for token in prompt[32:]:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            theirs.append(out.logits[0])
    ours = our_logits(ReferenceDevice(), folder, [prompt], 0)
    assert relative_error(ours[0], torch.cat(theirs)) < 1e-4


@pytest.mark.parametrize("device", [ReferenceDevice(), StaticDevice()], ids=lambda device: device.name)
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_greedy_tokens_equal_those_of_transformers(name: str, device: Device, tmp_path: Path) -> None:
    raw = {**SMALL, **MODELS[name]}
    folder = save_random_model(tmp_path, raw)
    prompt = [random.Random(name).randrange(raw["vocab_size"]) for _ in range(37)]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0
    )
    engine = load_engine(device, EngineOptions(folder, "test", max_batch_size=4, max_batch_prefill_tokens=64))
    batch = HandBatch(engine)
    assert batch.generate(make_request(1, prompt), 64) == generated[0, len(prompt) :].tolist()
    assert batch.generate(make_request(1, prompt), 64, chunk=10) == generated[0, len(prompt) :].tolist()
