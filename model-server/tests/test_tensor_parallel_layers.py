"""A model that is split among ranks computes what the whole one does. Ranks are threads here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import SettingsError
from tgi_model_server.engine import prepare
from tgi_model_server.kv.pool import PagePool
from tgi_model_server.models.config import load_config
from tgi_model_server.models.registry import build_model
from tgi_model_server.parallel import ALONE, Group, Shard, WrappedGroup
from tgi_model_server.plan import StepPlan
from tgi_model_server.reference import ReferenceOps
from tgi_model_server.sizing import attention_shape
from tgi_model_server.step import StepInput
from tgi_model_server.testing.devices import ReferenceDevice
from tgi_model_server.testing.groups import on_ranks
from tgi_model_server.testing.models import SMALL, save_random_model
from tgi_model_server.weights.dummy import DummyWeights
from tgi_model_server.weights.loader import CheckpointWeights

CPU = torch.device("cpu")
GROUPED = {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-tied-odd-vocabulary": {"tie_word_embeddings": True, "vocab_size": 157},
    "llama-odd-vocabulary": {"vocab_size": 161},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
}


class DeferringOps(ReferenceOps):
    """Takes the promise at its word: a sum that is normed next is not there before."""

    def __init__(self) -> None:
        self.left: tuple[torch.Tensor, torch.Tensor] | None = None
        """What is to be filled in, and with what."""
        self.promised = self.others = 0

    def linear_reduce(self, *given: Any, normed_next: bool) -> torch.Tensor:
        total = super().linear_reduce(*given, normed_next=normed_next)
        if not normed_next:
            self.others += 1
            return total
        self.promised += 1
        self.left = torch.full_like(total, float("nan")), total.clone()
        return self.left[0]

    def linear(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        assert self.left is None, "not normed next"
        return super().linear(x, *more)

    def rms_norm(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        if self.left is not None:
            assert x is self.left[0], "another tensor is normed next"
            x.copy_(self.left[1])
            self.left = None
        return super().rms_norm(x, *more)


def logits(folder: Path, group: Group, ops: ReferenceOps | None = None) -> torch.Tensor:
    """float32 [tokens, vocabulary] of two prompts, one of them in two chunks."""
    device, config = ReferenceDevice(), load_config(folder)
    if ops is not None:
        device.ops = ops
    shape = attention_shape(config, group.shard, torch.float32)
    weights = CheckpointWeights(folder, dtype=torch.float32, device=CPU, shard=group.shard)
    model = build_model(config, shape, weights, device.ops, device=CPU, max_positions=64, group=group)
    layout = device.kv_layout(shape)
    pool = PagePool(16, config.num_layers, layout, shape, device.zeros)
    out = []
    for plan in (
        StepPlan(query_lens=[5], kv_lens=[5], pages=[[3, 1, 2]], token_ids=[2, 3, 5, 7, 11]),
        StepPlan(
            query_lens=[6, 9],
            kv_lens=[11, 9],
            pages=[[3, 1, 2], [7, 6, 5]],
            token_ids=[13, 17, 19, 23, 29, 31, *range(148, 157)],
        ),
    ):
        attention = device.plan_attention(plan, shape, layout)
        step = StepInput(torch.tensor(plan.token_ids), torch.tensor(plan.positions()), torch.tensor([4]), attention)
        with torch.inference_mode():
            out.append(model.logits(model.forward(replace(step, whole=True), pool)))
            alone = model.logits(model.forward(step, pool))
            torch.testing.assert_close(alone, out[-1][4:5], rtol=0, atol=1e-4)
            nothing = replace(step, last_token=torch.empty(0, dtype=torch.int64))
            assert model.forward(nothing, pool).shape == (0, config.hidden_size)
    return torch.cat(out)


@pytest.mark.parametrize("ranks", [2, 6])
@pytest.mark.parametrize("name", FAMILIES)
def test_split_models_give_the_logits_of_the_whole_one(name: str, ranks: int, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, {**SMALL, **GROUPED, **FAMILIES[name]})
    whole = logits(folder, ALONE)
    assert whole.shape == (20, {**SMALL, **FAMILIES[name]}["vocab_size"])
    parts = on_ranks(ranks, lambda group: logits(folder, group))
    assert all(torch.equal(part, parts[0]) for part in parts), "ranks must agree to the bit"
    assert float((parts[0] - whole).abs().max() / whole.abs().max()) < 1e-4


def test_what_is_promised_to_be_normed_next_is(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, {**SMALL, **GROUPED})

    def deferred(group: Group) -> tuple[torch.Tensor, DeferringOps]:
        ops = DeferringOps()
        return logits(folder, group, ops), ops

    wanted = on_ranks(2, lambda group: logits(folder, group))
    sums = 2 * SMALL["num_hidden_layers"]
    for (found, ops), whole in zip(on_ranks(2, deferred), wanted, strict=True):
        assert torch.equal(found, whole)
        assert ops.promised >= ops.others * (sums - 1) > 0, "all but each step's last sum"


def test_a_split_that_the_model_does_not_allow_is_refused_with_those_that_it_allows(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    with pytest.raises(SettingsError) as caught:
        prepare(ReferenceDevice(), EngineOptions(folder, "small", num_shard=4), Shard(0, 4))
    assert str(caught.value) == (
        "--num-shard is 4; this model has 6 attention heads, 2 key-value heads and 96 intermediate columns, which can "
        "be split among 1, 2, 6. Choose one of these."
    )


def test_fewer_key_value_heads_than_ranks_are_held_by_neighbours() -> None:
    assert [Shard(rank, 6).among(2) for rank in range(6)] == [Shard(0, 2)] * 3 + [Shard(1, 2)] * 3
    assert Shard(1, 2).among(8) == Shard(1, 2)


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 160])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_padded_parts_are_equally_large_and_hold_every_row_once(rows: int, ranks: int, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, {**SMALL, "vocab_size": rows, "num_hidden_layers": 1})
    name, shape = "lm_head.weight", (rows, 48)
    whole = CheckpointWeights(folder, dtype=torch.float32, device=CPU, shard=Shard()).take(name, shape)
    dummy = DummyWeights(dtype=torch.float32, device=CPU, shard=Shard()).take(name, shape)
    for full, parts in (
        (
            whole,
            [
                CheckpointWeights(folder, dtype=torch.float32, device=CPU, shard=Shard(rank, ranks)).take(
                    name, shape, split=0, padded=True
                )
                for rank in range(ranks)
            ],
        ),
        (
            dummy,
            [
                DummyWeights(dtype=torch.float32, device=CPU, shard=Shard(rank, ranks)).take(
                    name, shape, split=0, padded=True
                )
                for rank in range(ranks)
            ],
        ),
    ):
        assert len({tuple(part.shape) for part in parts}) == 1
        joined = torch.cat(parts)
        assert torch.equal(joined[:rows], full)
        assert not joined[rows:].any()


def test_a_single_rank_exchanges_nothing() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert ALONE.all_reduce(x) is x
    assert ALONE.all_gather(x) is x
    ALONE.broadcast(x)
    assert ALONE.minimum(7) == 7
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_wrapped_group_does_what_the_inner_one_does() -> None:
    def exchange(group: Group) -> tuple[list[float], list[list[float]]]:
        wrapped = WrappedGroup(group)
        assert wrapped.shard == group.shard
        x = torch.full((1, 2), float(group.rank + 1))
        return wrapped.all_reduce(x)[0].tolist(), wrapped.all_gather(x).tolist()

    assert on_ranks(3, exchange) == [([6.0, 6.0], [[1.0, 1.0, 2.0, 2.0, 3.0, 3.0]])] * 3
