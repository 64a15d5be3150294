"""Root-mean-square normalization with its weight."""

from __future__ import annotations

import torch

from tgi_model_server.device import Ops


class RMSNorm:
    """Over the last dimension."""

    def __init__(self, ops: Ops, weight: torch.Tensor, eps: float) -> None:
        self._ops = ops
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(x, self._weight, self._eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalized sum, sum); both arguments may be overwritten."""
        return self._ops.add_rms_norm(x, residual, self._weight, self._eps)
