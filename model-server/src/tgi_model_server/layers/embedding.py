"""Token ids to vectors, and vectors to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tgi_model_server.device import Ops
from tgi_model_server.layers.linear import Linear


class Embedding:
    """int64 [T] -> [T, hidden]"""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self._weight)


class Head:
    """[rows, hidden] -> float32 logits [rows, vocabulary]. `weight` may be the embedding's (tied)."""

    def __init__(self, ops: Ops, weight: torch.Tensor) -> None:
        self._linear = Linear(ops, weight)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._linear(hidden).float()
