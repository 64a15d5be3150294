"""Self-attention over the paged KV pool: project, rotate, store, attend, project back."""

from __future__ import annotations

import torch

from tgi_model_server.device import AttentionShape, Ops
from tgi_model_server.layers.linear import Linear
from tgi_model_server.layers.norm import RMSNorm
from tgi_model_server.step import AttentionPlan


class Attention:
    """One layer's attention. `qkv` is the three matrices stacked; the norms, per head, are Qwen3's."""

    def __init__(
        self,
        ops: Ops,
        shape: AttentionShape,
        qkv: Linear,
        out: Linear,
        *,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        sliding_window: int | None = None,
    ) -> None:
        self._ops = ops
        self._qkv = qkv
        self._out = out
        self._q_norm = q_norm
        self._k_norm = k_norm
        self._window = sliding_window
        self._heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self._head_dim = shape.head_dim
        self._scale = shape.head_dim**-0.5

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """x [T, hidden]; `keys` and `values` are this layer's pools."""
        ops, tokens = self._ops, x.shape[0]
        q, k, v = self._qkv(x).view(tokens, -1, self._head_dim).split_with_sizes(self._heads, 1)
        if self._q_norm is not None and self._k_norm is not None:
            q, k = self._q_norm(q), self._k_norm(k)
        q, k = ops.rope(q, k, cos, sin)
        ops.write_kv(k, v, keys, values, plan)
        attended = ops.attention(q, keys, values, plan, scale=self._scale, sliding_window=self._window)
        return self._out(attended.reshape(tokens, -1))
