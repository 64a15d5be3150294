"""A weight matrix with its bias, laid out as the device likes it."""

from __future__ import annotations

import torch

from tgi_model_server.device import Norm, Ops
from tgi_model_server.parallel import Group


class Linear:
    """x [T, in] -> [T, out]"""

    def __init__(self, ops: Ops, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._ops = ops
        self._weight = ops.pack_linear(weight)
        self._bias = bias

    def normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Of the RMS norm of x."""
        return self._ops.norm_linear(x, norm, self._weight, self._bias)

    def normed_and_gated(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """The same, where the matrix is gate and up projections stacked: [T, out / 2] (Shazeer 2020, SwiGLU)."""
        return self._ops.norm_gated(x, norm, self._weight, self._bias)


class RowParallelLinear:
    """A rank's columns of the matrix, applied to its part of x; the ranks' results are added up."""

    def __init__(self, ops: Ops, weight: torch.Tensor, bias: torch.Tensor | None, group: Group) -> None:
        """`bias` is added once, by rank 0; others pass None."""
        self._ops = ops
        self._weight = ops.pack_linear(weight)
        self._bias = bias
        self._group = group

    def add(self, x: torch.Tensor, residual: torch.Tensor, *, normed_next: bool) -> torch.Tensor:
        """residual + linear(x); may overwrite `residual`. `normed_next` as in `Ops.linear_reduce`."""
        if not x.shape[0]:
            return residual  # nobody exchanges nothing
        if self._group.world_size == 1:
            return self._ops.linear_add(x, self._weight, self._bias, residual)
        return self._ops.linear_reduce(x, self._weight, self._bias, residual, self._group, normed_next=normed_next)
