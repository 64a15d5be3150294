"""The operations of a step on an NVIDIA GPU: Triton's kernels, and libraries where they are faster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tgi_backend_cuda.collectives import CudaGroup
from tgi_backend_cuda.native.attention import MAX_ROWS, DecodeRows, supports_attention
from tgi_backend_cuda.native.compile import Kernel
from tgi_backend_cuda.native.linear import MAX_TOKENS, Arriving
from tgi_backend_cuda.native.ops import SENT_TOKENS, NativeOps
from tgi_backend_cuda.native.wide import WIDTHS
from tgi_backend_cuda.prefill import PlannedPrompts
from tgi_model_server.device import AttentionShape, HeadNorms, Norm
from tgi_model_server.kernels.launch import Tuning
from tgi_model_server.kernels.ops import TritonOps
from tgi_model_server.kernels.plan import TritonAttentionPlan
from tgi_model_server.kernels.shared import SharedState, merge_shared
from tgi_model_server.parallel import Group
from tgi_model_server.step import AttentionPlan


@dataclass(frozen=True, slots=True)
class CudaAttentionPlan(TritonAttentionPlan):
    """Triton's plan, and FlashInfer's for the same step's prompts."""

    prompts: PlannedPrompts | None = None


NATIVE_TOKENS = (1, 2, 4, 8)
"""Sizes of steps up to `MAX_TOKENS` that run on the native kernels: those that there are graphs of."""

_BROKEN_PROMISE = "linear_reduce was promised that its result is normed next; that is not what comes next"


class CudaOps(TritonOps):
    """As `TritonOps`; steps of few tokens go through the native kernels, which read weights faster than the library
    and overlap each other. Logits come in float32 straight from the product's accumulators.
    """

    def __init__(self, tuning: Tuning, native: NativeOps, prepare: Callable[[Iterable[Kernel]], None]) -> None:
        """`prepare` begins to compile native kernels that will be wanted."""
        super().__init__(tuning)
        self._native = native
        self._prepare = prepare
        self._packed: set[tuple[int, torch.dtype]] = set()
        self.world_size = 1
        """Ranks whose products send their sums; before weights are packed."""
        self._arriving: Arriving | None = None

    def pack_linear(self, weight: torch.Tensor) -> torch.Tensor:
        columns, dtype = weight.shape[1], weight.dtype
        if (columns, dtype) not in self._packed:
            self._packed.add((columns, dtype))
            self._prepare(self._native.kernels(dtype, (*NATIVE_TOKENS, *WIDTHS), columns, self.world_size))
        return weight

    def _received(self, x: torch.Tensor) -> Arriving | None:
        """How x comes to be, if it is the sum that was sent last."""
        arriving, self._arriving = self._arriving, None
        assert arriving is None or arriving.total is x, _BROKEN_PROMISE
        return arriving

    def _receive_nothing(self) -> None:
        assert self._arriving is None, _BROKEN_PROMISE

    def _suited(self, x: torch.Tensor, *, normed: bool, gated: int = 0) -> NativeOps | None:
        tokens, columns = x.shape
        if (tokens not in NATIVE_TOKENS and tokens <= MAX_TOKENS) or not x.is_contiguous():
            return None
        suited = self._native.supports(tokens, columns, x.dtype, normed=normed, gated=gated)
        return self._native if suited else None

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self._receive_nothing()
        native = self._suited(x, normed=False)
        return super().linear(x, weight, bias) if native is None else native.linear(x, weight, bias)

    def linear_add(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor:
        self._receive_nothing()
        native = self._suited(x, normed=False)
        if native is None:
            return super().linear_add(x, weight, bias, residual)
        return native.linear_add(x, weight, residual, bias)

    def linear_reduce(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        group: Group,
        *,
        normed_next: bool,
    ) -> torch.Tensor:
        """With `normed_next` few tokens' products are sent as they are, and added up by the kernel that norms them."""
        self._receive_nothing()
        inboxes = group.inboxes if normed_next and isinstance(group, CudaGroup) else None
        native = self._suited(x, normed=False) if x.shape[0] in SENT_TOKENS else None
        if (
            inboxes is None
            or native is None
            or self._suited(residual, normed=True) is None
            or residual.numel() > inboxes.capacity
        ):
            return super().linear_reduce(x, weight, bias, residual, group, normed_next=normed_next)
        native.linear_send(x, weight, inboxes, bias)
        self._arriving = Arriving(torch.empty_like(residual), residual, inboxes)
        return self._arriving.total

    def norm_linear(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        arriving, native = self._received(x), self._suited(x, normed=True)
        if native is None:
            return super().norm_linear(x, norm, weight, bias)
        return native.norm_linear(x, norm.weight, norm.eps, weight, bias, arriving=arriving)

    def norm_gated(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        arriving, native = self._received(x), self._suited(x, normed=True, gated=weight.shape[0] // 2)
        if native is None:
            return super().norm_gated(x, norm, weight, bias)
        return native.norm_gated(x, norm.weight, norm.eps, weight, bias, arriving=arriving)

    def logits(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor) -> torch.Tensor:
        arriving, native = self._received(x), self._suited(x, normed=True)
        if native is not None:
            return native.norm_head(x, norm.weight, norm.eps, weight, arriving=arriving)
        normed = self.rms_norm(x, norm.weight, norm.eps)
        if normed.dtype == torch.float32:
            return F.linear(normed, weight)
        return torch.mm(normed, weight.t(), out_dtype=torch.float32)

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
        self._receive_nothing()
        assert isinstance(plan, TritonAttentionPlan)
        tokens = qkv.shape[0]
        # Where nothing is shared and all rows have one token, the tables have the step's order.
        if (
            (tokens in NATIVE_TOKENS or MAX_TOKENS < tokens <= MAX_ROWS)
            and plan.decode_lens.shape[0] == tokens
            and not plan.tiles.shape[0]
            and plan.shared is None
            and supports_attention(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype, shape.kv_dtype)
        ):
            rows = DecodeRows(plan.page_table, plan.kv_lens, plan.cache_slots)
            return self._native.rope_attention(
                qkv, cos, sin, k_pool, v_pool, rows, scale=scale, window=sliding_window, norms=norms
            )
        return super().rope_attention(
            qkv,
            cos,
            sin,
            k_pool,
            v_pool,
            plan,
            shape,
            norms=norms,
            scale=scale,
            sliding_window=sliding_window,
            last_only=last_only,
        )

    def attend_shared(
        self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, plan: TritonAttentionPlan, scale: float
    ) -> SharedState:
        prompts = plan.prompts if isinstance(plan, CudaAttentionPlan) else None
        if prompts is not None and plan.shared is not None and prompts.scale == scale:
            state = prompts.run_shared(q, k_pool, v_pool, plan.shared)
            if state is not None:
                return state
        return super().attend_shared(q, k_pool, v_pool, plan, scale)

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
        prompts = plan.prompts if isinstance(plan, CudaAttentionPlan) else None
        if prompts is None or prompts.scale != scale or sliding_window:
            super().attend_prompts(q, k_pool, v_pool, out, plan, state, scale=scale, sliding_window=sliding_window)
            return
        first, after, _ = prompts.tokens.indices(q.shape[0])
        lse = None
        if state is not None:
            lse = torch.empty((after - first, q.shape[1]), dtype=torch.float32, device=q.device)
        prompts.run(q, k_pool, v_pool, out, lse)
        if state is not None and lse is not None:
            tables = (plan.tiles, plan.query_lens, plan.query_starts)
            merge_shared(out, lse, first, state, *tables, kv_heads=k_pool.shape[2], tuning=self.tuning)
