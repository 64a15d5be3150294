"""The operations of a step on an NVIDIA GPU: Triton's kernels, the vendor's library for products of matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tgi_model_server.device import Norm
from tgi_model_server.kernels.launch import Tuning
from tgi_model_server.kernels.ops import TritonOps


class CudaOps(TritonOps):
    """As `TritonOps`, with logits in float32 straight from the product's accumulators."""

    def __init__(self, tuning: Tuning) -> None:
        super().__init__(tuning)

    def logits(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor) -> torch.Tensor:
        normed = self.rms_norm(x, norm.weight, norm.eps)
        if normed.dtype == torch.float32:
            return F.linear(normed, weight)
        return torch.mm(normed, weight.t(), out_dtype=torch.float32)
