"""A weight matrix with its bias, laid out as the device likes it."""

from __future__ import annotations

import torch

from tgi_model_server.device import Ops
from tgi_model_server.parallel import Group


class Linear:
    """x [T, in] -> [T, out]"""

    def __init__(self, ops: Ops, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._linear = ops.linear
        self._weight = ops.pack_linear(weight)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, self._weight, self._bias)


class RowParallelLinear(Linear):
    """A rank's columns of the matrix, applied to its part of x; the ranks' results are added up."""

    def __init__(self, ops: Ops, weight: torch.Tensor, bias: torch.Tensor | None, group: Group) -> None:
        """`bias` is added once, by rank 0; others pass None."""
        super().__init__(ops, weight, bias)
        self._all_reduce = group.all_reduce

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._all_reduce(self._linear(x, self._weight, self._bias))
