"""Weights from good and bad checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import ModelError
from tgi_model_server.device import AttentionShape
from tgi_model_server.engine import load_engine
from tgi_model_server.models.config import ModelConfig, load_config, parse_config
from tgi_model_server.models.registry import build_model
from tgi_model_server.parallel import Shard
from tgi_model_server.reference import ReferenceOps
from tgi_model_server.testing.devices import ReferenceDevice
from tgi_model_server.testing.models import SMALL, HandBatch, make_request, random_tensors, save_random_model
from tgi_model_server.weights.dummy import DummyWeights
from tgi_model_server.weights.loader import CheckpointWeights

CPU = torch.device("cpu")
PROMPT = [5, 9, 2, 44]


def load(folder: Path, **options: object) -> list[int]:
    """Greedy tokens of the model in `folder`."""
    engine = load_engine(ReferenceDevice(), EngineOptions(folder, "test", **options))  # type: ignore[arg-type]
    return HandBatch(engine).generate(make_request(1, PROMPT), 6)


def rewrite(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def shard_files(folder: Path) -> dict[str, str]:
    """Split the single file in two with an index; returns the index's map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(2):
        names = sorted(tensors)[part::2]
        file = f"model-{part + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_sharded_files_give_the_same_model_as_a_single_one(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    expected = load(tmp_path)
    shard_files(tmp_path)
    assert load(tmp_path) == expected


def test_progress_ends_at_the_size_of_the_weights_and_never_goes_back(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    seen: list[tuple[int, int]] = []
    load_engine(ReferenceDevice(), EngineOptions(tmp_path, "test"), lambda done, total: seen.append((done, total)))
    size = sum(tensor.numel() * 4 for tensor in load_file(tmp_path / "model.safetensors").values())
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_half_precision_checkpoints_load_into_any_dtype(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    rewrite(tmp_path, {name: tensor.float() for name, tensor in tensors.items()})
    expected = load(tmp_path)
    rewrite(tmp_path, tensors)
    assert load(tmp_path) == expected


def test_dummy_weights_need_only_the_configuration_and_are_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert load(tmp_path, load_format="dummy") == load(tmp_path, load_format="dummy")


NAME = "model.layers.1.self_attn.k_proj.weight"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[NAME]
    rewrite(tmp_path, tensors)
    with pytest.raises(ModelError, match=rf"tensor {NAME} \[16, 48\] is missing"):
        load(tmp_path)


def test_a_wrong_shape_is_named_with_what_was_expected(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    rewrite(tmp_path, {**load_file(tmp_path / "model.safetensors"), NAME: torch.zeros(8, 48)})
    with pytest.raises(ModelError, match=rf"model.safetensors: tensor {NAME} has shape \[8, 48\]; .* \[16, 48\]"):
        load(tmp_path)


def test_a_wrong_dtype_is_named(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    rewrite(tmp_path, {**load_file(tmp_path / "model.safetensors"), NAME: torch.zeros(16, 48, dtype=torch.int8)})
    with pytest.raises(ModelError, match=rf"tensor {NAME} has dtype I8"):
        load(tmp_path)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    rewrite(tmp_path, {**load_file(tmp_path / "model.safetensors"), "model.visual.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"unexpected tensors model.visual.weight"):
        load(tmp_path)


def test_rotary_frequencies_and_a_tied_head_may_lie_in_the_checkpoint(tmp_path: Path) -> None:
    save_random_model(tmp_path, {**SMALL, "tie_word_embeddings": True})
    expected = load(tmp_path)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "lm_head.weight": torch.zeros(160, 48),
    }
    rewrite(tmp_path, {**load_file(tmp_path / "model.safetensors"), **extra})
    assert load(tmp_path) == expected


@pytest.mark.parametrize("kept", [0, 7, 300, -100])
def test_a_truncated_file_is_named(kept: int, tmp_path: Path) -> None:
    save_random_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged or incomplete .* Download it again"):
        load(tmp_path)


def test_a_corrupt_header_is_named(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[10:40] = b"\xff" * 30
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model.safetensors is damaged"):
        load(tmp_path)


def test_a_tensor_in_two_files_is_an_error(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    shutil.move(tmp_path / "model.safetensors", tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match=r"lm_head.weight is in two files: .*a.safetensors and .*b.safetensors"):
        load(tmp_path)


def test_a_file_that_the_index_names_must_exist(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    shard_files(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names files that are missing: model-00002-of-00002.safetensors"):
        load(tmp_path)


def test_a_tensor_that_the_index_promises_must_be_in_its_file(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    weight_map = shard_files(tmp_path)
    weight_map["extra"] = "model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"the index promises extra"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_named(content: str, tmp_path: Path) -> None:
    save_random_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model.safetensors.index.json"):
        load(tmp_path)


def test_pickled_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"It holds pytorch_model.bin: convert them to safetensors first"):
        load(tmp_path)


def parts_of(config: ModelConfig, folder: Path, rank: int) -> dict[str, torch.Tensor]:
    weights = CheckpointWeights(folder, dtype=torch.float32, device=CPU, shard=Shard(rank, 2))
    return {
        "qkv": weights.take_stacked(
            [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"], [(48, 48), (16, 48), (16, 48)]
        ),
        "o": weights.take("model.layers.0.self_attn.o_proj.weight", (48, 48), split=1),
        "norm": weights.take("model.norm.weight", (config.hidden_size,)),
    }


def test_two_ranks_hold_the_halves_of_every_split_tensor(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    first, second = (parts_of(load_config(folder), folder, rank) for rank in range(2))
    tensors = random_tensors(SMALL)
    attention = "model.layers.0.self_attn"
    q, k = tensors[f"{attention}.q_proj.weight"], tensors[f"{attention}.k_proj.weight"]
    assert torch.equal(torch.cat((first["qkv"][:24], second["qkv"][:24])), q)
    assert torch.equal(torch.cat((first["qkv"][24:32], second["qkv"][24:32])), k)
    assert torch.equal(torch.cat((first["o"], second["o"]), dim=1), tensors[f"{attention}.o_proj.weight"])
    assert torch.equal(first["norm"], second["norm"])


def test_dummy_weights_of_two_ranks_are_halves_of_the_same_tensor() -> None:
    whole = DummyWeights(dtype=torch.float32, device=CPU, shard=Shard()).take("a.weight", (6, 4))
    halves = [
        DummyWeights(dtype=torch.float32, device=CPU, shard=Shard(rank, 2)).take("a.weight", (6, 4), split=0)
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(halves), whole)


def test_a_dimension_that_cannot_be_split_evenly_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"a.weight: 6 cannot be split among 4 shards. Lower --num-shard."):
        DummyWeights(dtype=torch.float32, device=CPU, shard=Shard(0, 4)).take("a.weight", (6, 4), split=0)


def test_a_model_takes_the_same_tensors_under_any_shard() -> None:
    config = parse_config(SMALL, "config.json")
    shape = AttentionShape(3, 1, config.head_dim, torch.float32, torch.float32)
    weights = DummyWeights(dtype=torch.float32, device=CPU, shard=Shard(1, 2))
    build_model(config, shape, weights, ReferenceOps(), device=CPU, max_positions=8)
