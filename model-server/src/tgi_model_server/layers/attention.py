"""Self-attention over the paged KV pool: norm, project, rotate, store, attend, project back."""

from __future__ import annotations

import torch

from tgi_model_server.device import AttentionShape, HeadNorms, Norm, Ops
from tgi_model_server.layers.linear import Linear, RowParallelLinear
from tgi_model_server.step import AttentionPlan


class Attention:
    """One layer's attention, added to the residual stream. `qkv` is the three matrices stacked."""

    def __init__(
        self,
        ops: Ops,
        shape: AttentionShape,
        norm: Norm,
        qkv: Linear,
        out: RowParallelLinear,
        *,
        head_norms: HeadNorms | None = None,
        sliding_window: int | None = None,
    ) -> None:
        self._ops = ops
        self._shape = shape
        self._norm = norm
        self._qkv = qkv
        self._out = out
        self._head_norms = head_norms
        self._window = sliding_window
        self._scale = shape.head_dim**-0.5

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: AttentionPlan,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, hidden], which may be overwritten; `keys` and `values` are this layer's pools, which get all tokens'.

        `wanted`: flat indices of tokens, each its row's last; only these are returned, in that order. The result is to
        be normed next, as `Ops.linear_reduce` has it.
        """
        attended = self._ops.rope_attention(
            self._qkv.normed(x, self._norm),
            cos,
            sin,
            keys,
            values,
            plan,
            self._shape,
            norms=self._head_norms,
            scale=self._scale,
            sliding_window=self._window,
            last_only=wanted is not None,
        )
        if wanted is not None:
            attended, x = attended.index_select(0, wanted), x.index_select(0, wanted)
        return self._out.add(attended, x, normed_next=True)
