"""The operations of a step on an NVIDIA GPU: Triton's kernels, and libraries where they are faster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tgi_backend_cuda.prefill import PlannedPrompts
from tgi_model_server.device import Norm
from tgi_model_server.kernels.ops import TritonOps
from tgi_model_server.kernels.plan import TritonAttentionPlan


@dataclass(frozen=True, slots=True)
class CudaAttentionPlan(TritonAttentionPlan):
    """Triton's plan, and FlashInfer's for the same step's prompts."""

    prompts: PlannedPrompts | None = None


class CudaOps(TritonOps):
    """As `TritonOps`; logits come in float32 straight from the product's accumulators."""

    def logits(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor) -> torch.Tensor:
        normed = self.rms_norm(x, norm.weight, norm.eps)
        if normed.dtype == torch.float32:
            return F.linear(normed, weight)
        return torch.mm(normed, weight.t(), out_dtype=torch.float32)

    def attend_prompts(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        out: torch.Tensor,
        plan: TritonAttentionPlan,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> None:
        prompts = plan.prompts if isinstance(plan, CudaAttentionPlan) else None
        if prompts is not None and prompts.scale == scale and not sliding_window:
            prompts.run(q, k_pool, v_pool, out)
        else:
            super().attend_prompts(q, k_pool, v_pool, out, plan, scale=scale, sliding_window=sliding_window)
