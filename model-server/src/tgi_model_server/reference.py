"""Every operation in plain torch, computed in float32: the oracle that faster ones are tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tgi_model_server.device import AttentionShape, HeadNorms, KVLayout, Norm
from tgi_model_server.kv.pool import to_kept
from tgi_model_server.parallel import Group
from tgi_model_server.plan import StepPlan
from tgi_model_server.step import AttentionPlan


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """An AttentionPlan that any device can use: the step's rows as they are."""

    layout: KVLayout
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    cache_slots: torch.Tensor
    """int64 [T]: ``page * page_size + offset`` of each new token."""


def reference_plan(plan: StepPlan, layout: KVLayout, device: torch.device) -> ReferencePlan:
    return ReferencePlan(
        layout=layout,
        query_lens=tuple(plan.query_lens),
        kv_lens=tuple(plan.kv_lens),
        pages=tuple(tuple(pages) for pages in plan.pages),
        cache_slots=torch.tensor(plan.cache_slots(layout.page_size), dtype=torch.int64, device=device),
    )


class ReferenceOps:
    """`device.Ops`, slow and clear. Attention needs a `ReferencePlan`."""

    def pack_linear(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    def linear_add(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor:
        return residual + self.linear(x, weight, bias)

    def linear_reduce(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        group: Group,
        *,
        normed_next: bool,  # noqa: ARG002
    ) -> torch.Tensor:
        return group.all_reduce_add(self.linear(x, weight, bias), residual)

    def norm_linear(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.linear(self.rms_norm(x, norm.weight, norm.eps), weight, bias)

    def norm_gated(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.silu_mul(self.norm_linear(x, norm, weight, bias))

    def logits(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor) -> torch.Tensor:
        return self.norm_linear(x, norm, weight, None).float()

    def greedy(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits.argmax(-1), logits.logsumexp(-1)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale).to(x.dtype) * weight

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def write_kv(
        self, k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, plan: AttentionPlan
    ) -> None:
        assert isinstance(plan, ReferencePlan)
        size = plan.layout.page_size
        page, offset = plan.cache_slots // size, plan.cache_slots % size
        for new, pool in ((k, k_pool), (v, v_pool)):
            if plan.layout.order == "NHD":
                pool[page, offset] = to_kept(new, pool.dtype)
            else:
                pool[page, :, offset] = to_kept(new, pool.dtype)

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
        assert isinstance(plan, ReferencePlan)
        out, start = torch.empty_like(q), 0
        for query_len, kv_len, pages in zip(plan.query_lens, plan.kv_lens, plan.pages, strict=True):
            rows = slice(start, start + query_len)
            keys, values = (self._gather(pool, pages, kv_len, plan.layout) for pool in (k_pool, v_pool))
            out[rows] = _attend(q[rows].float(), keys, values, kv_len, scale, sliding_window).to(q.dtype)
            start += query_len
        return out

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
        last_only: bool = False,  # noqa: ARG002
    ) -> torch.Tensor:
        q, k, v = split_heads(qkv, shape)
        if norms is not None:
            q, k = self.rms_norm(q, norms.q_weight, norms.eps), self.rms_norm(k, norms.k_weight, norms.eps)
        q, k = self.rope(q, k, cos, sin)
        self.write_kv(k, v, k_pool, v_pool, plan)
        return self.attention(q, k_pool, v_pool, plan, scale=scale, sliding_window=sliding_window).flatten(1)

    def _gather(self, pool: torch.Tensor, pages: tuple[int, ...], kv_len: int, layout: KVLayout) -> torch.Tensor:
        """float32 [kv_len, kv_heads, head_dim]"""
        chosen = pool[torch.tensor(pages, dtype=torch.int64, device=pool.device)]
        if layout.order == "HND":
            chosen = chosen.transpose(1, 2)
        return chosen.flatten(0, 1)[:kv_len].float()


def split_heads(qkv: torch.Tensor, shape: AttentionShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, heads, head_dim], k and v [T, kv_heads, head_dim]: views into the stacked projection."""
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    q, k, v = qkv.view(qkv.shape[0], -1, shape.head_dim).split_with_sizes(heads, 1)
    return q, k, v


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1)


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kv_len: int, scale: float, window: int | None
) -> torch.Tensor:
    """q [Q, heads, D] over keys, values [L, kv_heads, D], the queries being the last Q positions."""
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    query_at = torch.arange(kv_len - q.shape[0], kv_len, device=q.device)[:, None]
    key_at = torch.arange(kv_len, device=q.device)[None, :]
    seen = key_at <= query_at
    if window is not None:
        seen &= key_at > query_at - window
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
