"""config.json, good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tgi_gateway.errors import ModelError
from tgi_model_server.layers.rope import Rope, inverse_frequencies
from tgi_model_server.models.config import SUPPORTED, find_eos, load_config, parse_config
from tgi_model_server.models.registry import ARCHITECTURES
from tgi_model_server.testing.models import SMALL


def parse(**changes: Any) -> Any:
    return parse_config({**SMALL, **changes}, "config.json")


def test_every_supported_model_type_has_an_architecture() -> None:
    assert set(SUPPORTED) == set(ARCHITECTURES)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_missing_key_is_named(key: str) -> None:
    raw = {name: value for name, value in SMALL.items() if name != key}
    with pytest.raises(ModelError, match=rf"config.json: {key} is missing"):
        parse_config(raw, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported are llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type is None; supported are"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; supported are"),
        ({"hidden_size": 0}, "hidden_size is 0; a whole number of at least 1"),
        ({"hidden_size": "48"}, "hidden_size is '48'; a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; a number is needed"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; llama is supported with 'silu'"),
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4 key-value heads evenly"),
        ({"hidden_size": 50}, "hidden_size 50 is not divisible by 6 attention heads"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; a token id or a list"),
        ({"quantization_config": {"quant_method": "gptq"}}, "cannot read quantized checkpoints"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type is 'longrope'; supported are default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "rope type linear needs the number factor; got None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs the number high_freq_factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 2, "high_freq_factor": 2}},
            "needs high_freq_factor above low_freq_factor",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 2}},
            "needs the number original_max_position",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between kinds of layers"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "rope factor is 0.5; at least 1"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object is needed"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse(**changes)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b""])
def test_an_unreadable_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_missing_file_is_named_with_what_a_folder_holds(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json is missing. A model folder holds"):
        load_config(tmp_path)


def test_sliding_windows_follow_each_familys_keys() -> None:
    window = {"sliding_window": 9}
    assert parse(**window).sliding_windows == (None, None, None)
    assert parse(model_type="mistral", **window).sliding_windows == (9, 9, 9)
    assert parse(model_type="mistral", sliding_window=None).sliding_windows == (None, None, None)
    assert parse(model_type="qwen2", max_window_layers=0, **window).sliding_windows == (None, None, None)
    qwen = {"model_type": "qwen2", "use_sliding_window": True, **window}
    assert parse(max_window_layers=1, **qwen).sliding_windows == (None, 9, 9)
    assert parse(**qwen).sliding_windows == (None, None, None)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert parse(layer_types=kinds, **qwen).sliding_windows == (None, 9, None)
    with pytest.raises(ModelError, match="layer_types must name"):
        parse(layer_types=kinds[:2], **qwen)


def test_both_spellings_of_rope_scaling_mean_the_same() -> None:
    old = parse(rope_theta=5000.0, rope_scaling={"type": "yarn", "factor": 2.0})
    new = parse(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 5000.0})
    assert old.rope == new.rope
    assert old.rope.theta == 5000.0


def test_the_override_replaces_what_the_file_says_and_extends_the_positions() -> None:
    raw = {**SMALL, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    config = parse_config(raw, "config.json", rope_scaling="linear", rope_factor=4.0)
    assert (config.rope.kind, config.rope.factor, config.max_positions) == ("linear", 4.0, 1024)
    plain = inverse_frequencies(parse().rope)
    assert torch.equal(inverse_frequencies(config.rope), plain / 4)
    with pytest.raises(ModelError, match="needs a factor: set --rope-factor"):
        parse_config(raw, "config.json", rope_scaling="dynamic")
    with pytest.raises(ModelError, match="--rope-factor needs --rope-scaling"):
        parse_config(raw, "config.json", rope_factor=2.0)


def test_rope_tables_of_all_positions_equal_those_of_few() -> None:
    config = parse(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=16).rope
    few, many = (Rope(config, length, torch.device("cpu")) for length in (24, 100))
    positions = torch.tensor([0, 23, 5])
    assert torch.equal(few.at(positions)[0], many.at(positions)[0])
    assert torch.equal(few.at(positions)[1], many.at(positions)[1])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [7, 8]}}, (7, 8)),
        ({"generation_config.json": {"eos_token_id": 9}}, (9,)),
        ({"generation_config.json": {}}, (1,)),
        ({}, (1,)),
    ],
)
def test_end_of_sequence_ids_come_from_the_generation_config_first(
    files: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert find_eos(tmp_path, parse()) == expected


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>"}])
def test_end_of_sequence_falls_back_to_the_tokenizers_token(token: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 3, "content": "</s>"}]}))
    assert find_eos(tmp_path, parse(eos_token_id=None)) == (3,)
    (tmp_path / "tokenizer.json").unlink()
    assert find_eos(tmp_path, parse(eos_token_id=None)) == ()
