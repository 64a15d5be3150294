"""Llama and its close relatives: Mistral (sliding window), Qwen2 (QKV bias), Qwen3 (normalized queries and keys)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tgi_model_server.device import AttentionShape, HeadNorms, Norm, Ops
from tgi_model_server.kv.pool import PagePool
from tgi_model_server.layers.attention import Attention
from tgi_model_server.layers.embedding import Embedding, Head
from tgi_model_server.layers.linear import Linear, RowParallelLinear
from tgi_model_server.layers.mlp import GatedMLP
from tgi_model_server.layers.rope import Rope
from tgi_model_server.models.config import ModelConfig
from tgi_model_server.parallel import Group
from tgi_model_server.step import StepInput
from tgi_model_server.weights.loader import Weights


class Llama:
    """A pre-norm decoder: embedding, layers, norm, head."""

    def __init__(
        self,
        config: ModelConfig,
        shape: AttentionShape,
        weights: Weights,
        ops: Ops,
        *,
        device: torch.device,
        max_positions: int,
        group: Group,
    ) -> None:
        vocabulary = (config.vocab_size, config.hidden_size)
        embedding = weights.take("model.embed_tokens.weight", vocabulary, split=0, padded=True)
        self._embed = Embedding(embedding, group)
        self._rope = Rope(config.rope, max_positions, device)
        self._layers = [_Layer(config, shape, weights, ops, index, group) for index in range(config.num_layers)]
        norm = _norm(config, weights, "model.norm")
        if config.tie_word_embeddings:
            weights.ignore("lm_head.weight")
            head = embedding
        else:
            head = weights.take("lm_head.weight", vocabulary, split=0, padded=True)
        self._head = Head(ops, norm, head, config.vocab_size, group)

    def forward(self, step: StepInput, kv: PagePool) -> torch.Tensor:
        """As `registry.Model`. The last layer stores all tokens' keys and values, and goes on with the wanted alone."""
        cos, sin = self._rope.at(step.positions)
        x = self._embed(step.input_ids)
        for layer, keys, values in zip(self._layers, kv.keys, kv.values, strict=True):
            last = layer is self._layers[-1]
            x = layer.attention(x, cos, sin, keys, values, step.attention, step.wanted if last else None)
            # What the last layer gives, others may read before it is normed.
            x = layer.mlp(x, normed_next=not last)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> float32 [rows, vocabulary]"""
        return self._head(hidden)


class _Layer:
    """The parts of one decoder layer."""

    def __init__(
        self, config: ModelConfig, shape: AttentionShape, weights: Weights, ops: Ops, index: int, group: Group
    ) -> None:
        prefix, hidden, inner = f"model.layers.{index}", config.hidden_size, config.intermediate_size
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def stacked(names: Sequence[str], rows: Sequence[int], bias: bool, pieces: Sequence[int] = ()) -> Linear:
            def take(kind: str, *columns: int) -> torch.Tensor:
                shapes = [(size, *columns) for size in rows]
                return weights.take_stacked([f"{name}.{kind}" for name in names], shapes, pieces=pieces)

            return Linear(ops, take("weight", hidden), take("bias") if bias else None)

        def back(name: str, columns: int, bias: bool) -> RowParallelLinear:
            weight = weights.take(f"{name}.weight", (hidden, columns), split=1)
            added = weights.take(f"{name}.bias", (hidden,)) if bias else None
            return RowParallelLinear(ops, weight, added if group.rank == 0 else None, group)

        def head_norms(name: str) -> HeadNorms:
            q_weight, k_weight = (weights.take(f"{name}.{part}_norm.weight", (config.head_dim,)) for part in "qk")
            return HeadNorms(q_weight, k_weight, config.rms_norm_eps)

        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        self.attention = Attention(
            ops,
            shape,
            _norm(config, weights, f"{prefix}.input_layernorm"),
            stacked(
                [f"{attention}.{part}_proj" for part in "qkv"],
                (q_rows, kv_rows, kv_rows),
                config.qkv_bias,
                (config.num_heads, config.num_kv_heads, config.num_kv_heads),
            ),
            back(f"{attention}.o_proj", q_rows, config.o_bias),
            head_norms=head_norms(attention) if config.qk_norm else None,
            sliding_window=config.sliding_windows[index],
        )
        self.mlp = GatedMLP(
            _norm(config, weights, f"{prefix}.post_attention_layernorm"),
            stacked((f"{mlp}.gate_proj", f"{mlp}.up_proj"), (inner, inner), config.mlp_bias),
            back(f"{mlp}.down_proj", inner, config.mlp_bias),
        )


def _norm(config: ModelConfig, weights: Weights, name: str) -> Norm:
    return Norm(weights.take(f"{name}.weight", (config.hidden_size,)), config.rms_norm_eps)
