"""The gated feed-forward block (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

import torch

from tgi_model_server.device import Ops
from tgi_model_server.layers.linear import Linear


class GatedMLP:
    """down(silu(gate(x)) * up(x)); `gate_up` is both matrices stacked."""

    def __init__(self, ops: Ops, gate_up: Linear, down: Linear) -> None:
        self._silu_mul = ops.silu_mul
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(self._silu_mul(self._gate_up(x)))
