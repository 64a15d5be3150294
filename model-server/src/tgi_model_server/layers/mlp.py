"""The gated feed-forward block (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

import torch

from tgi_model_server.device import Norm
from tgi_model_server.layers.linear import Linear, RowParallelLinear


class GatedMLP:
    """x + down(silu(gate(norm(x))) * up(norm(x))); `gate_up` is both matrices stacked."""

    def __init__(self, norm: Norm, gate_up: Linear, down: RowParallelLinear) -> None:
        self._norm = norm
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: torch.Tensor, *, normed_next: bool) -> torch.Tensor:
        """x [T, hidden], which may be overwritten. `normed_next` as in `Ops.linear_reduce`."""
        return self._down.add(self._gate_up.normed_and_gated(x, self._norm), x, normed_next=normed_next)
