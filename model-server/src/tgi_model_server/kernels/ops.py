"""TritonOps: the table of operations for a device that runs Triton; products of matrices stay with torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tgi_model_server.device import AttentionShape, HeadNorms, KVLayout
from tgi_model_server.kernels import activation, norm, rope, sampling
from tgi_model_server.kernels.decode import decode
from tgi_model_server.kernels.launch import Tuning
from tgi_model_server.kernels.plan import TritonAttentionPlan
from tgi_model_server.kernels.prefill import prefill
from tgi_model_server.kernels.shared import SharedState, attend_shared
from tgi_model_server.reference import ReferenceOps, split_heads
from tgi_model_server.step import AttentionPlan

DEFAULT_TUNING = Tuning()


class TritonOps(ReferenceOps):
    """`device.Ops` over Triton kernels. Attention needs a `TritonAttentionPlan` made with the same `tuning`.

    Beyond the protocol: `rope_write_kv`, which spares two launches a layer, and `sample`.
    """

    def __init__(self, tuning: Tuning = DEFAULT_TUNING) -> None:
        self.tuning = tuning

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The vendor's library, which accumulates in float32."""
        return F.linear(x, weight, bias)

    def linear_add(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor:
        """The library adds the product to `residual` before it rounds, in place."""
        residual.addmm_(x, weight.t())
        return residual if bias is None else residual.add_(bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return norm.rms_norm(x, weight, eps)

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rope.rope(q, k, cos, sin)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return activation.silu_mul(gate_up)

    def write_kv(
        self, k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, plan: AttentionPlan
    ) -> None:
        assert isinstance(plan, TritonAttentionPlan)
        k_pool, v_pool = _pages(k_pool, plan.layout), _pages(v_pool, plan.layout)
        rope.write_kv(k, v, k_pool, v_pool, plan.cache_slots)

    def rope_attention(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        plan: AttentionPlan,
        shape: AttentionShape,
        *,
        norms: HeadNorms | None,
        scale: float,
        sliding_window: int | None,
        last_only: bool = False,
    ) -> torch.Tensor:
        assert isinstance(plan, TritonAttentionPlan)
        q = self.rope_write_kv(*split_heads(qkv, shape), cos, sin, k_pool, v_pool, plan, norms)
        plan = plan.of_last_tokens() if last_only else plan
        return self.attention(q, k_pool, v_pool, plan, scale=scale, sliding_window=sliding_window).flatten(1)

    def rope_write_kv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        plan: AttentionPlan,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        """Rotated q; k, rotated, and v are stored. The same as the norms, `rope` and `write_kv` one after the other."""
        assert isinstance(plan, TritonAttentionPlan)
        k_pool, v_pool = _pages(k_pool, plan.layout), _pages(v_pool, plan.layout)
        return rope.rope_write_kv(q, k, v, k_pool, v_pool, plan.cache_slots, cos, sin, norms)

    def attention(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        plan: AttentionPlan,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        assert isinstance(plan, TritonAttentionPlan)
        k_pool, v_pool = _pages(k_pool, plan.layout), _pages(v_pool, plan.layout)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # In a window rows do not read the same keys.
        state = None if sliding_window or plan.shared is None else self.attend_shared(q, k_pool, v_pool, plan, scale)
        self.attend_prompts(q, k_pool, v_pool, out, plan, state, scale=scale, sliding_window=sliding_window)
        if plan.decode_lens.shape[0]:
            decode(
                q,
                k_pool,
                v_pool,
                out,
                plan.page_table,
                plan.decode_lens,
                plan.query_starts,
                scale=scale,
                window=sliding_window,
                splits=plan.decode_splits,
                tuning=self.tuning,
                state=state,
            )
        return out

    def attend_shared(
        self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, plan: TritonAttentionPlan, scale: float
    ) -> SharedState:
        """The part of `attention` over keys that rows of `plan` share; pools in order NHD."""
        assert plan.shared is not None
        return attend_shared(q, k_pool, v_pool, plan.page_table, plan.shared, scale=scale, tuning=self.tuning)

    def attend_prompts(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        out: torch.Tensor,
        plan: TritonAttentionPlan,
        state: SharedState | None,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> None:
        """The part of `attention` that concerns rows with several new tokens, from the `state` that what they share
        left; pools in order NHD. Fills `out` there; the tokens of other rows may get anything.
        """
        if plan.tiles.shape[0]:
            prefill(
                q,
                k_pool,
                v_pool,
                out,
                plan.tiles,
                plan.page_table,
                plan.kv_lens,
                plan.query_lens,
                plan.query_starts,
                scale=scale,
                window=sliding_window,
                tuning=self.tuning,
                state=state,
            )

    def greedy(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sampling.greedy(logits)

    def sample(
        self, logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        """As `kernels.sampling.sample`: rows without any filter, drawn or greedy."""
        return sampling.sample(logits, temperature, seeds, indices)


def _pages(pool: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """The pool as [num_pages, page_size, kv_heads, head_dim]."""
    return pool if layout.order == "NHD" else pool.transpose(1, 2)
