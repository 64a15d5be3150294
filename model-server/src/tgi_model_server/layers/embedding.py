"""Token ids to vectors, and vectors to logits. Each rank holds an equal part of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tgi_model_server.device import Norm, Ops
from tgi_model_server.parallel import Group


class Embedding:
    """int64 [T] -> [T, hidden]. `weight` holds the rank's rows."""

    def __init__(self, weight: torch.Tensor, group: Group) -> None:
        self._weight = weight
        self._group = group
        self._first = group.rank * weight.shape[0]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self._group.world_size == 1:
            return F.embedding(ids, self._weight)
        ids = ids - self._first
        elsewhere = (ids < 0) | (ids >= self._weight.shape[0])
        found = F.embedding(ids.masked_fill(elsewhere, 0), self._weight)
        return self._group.all_reduce(found.masked_fill_(elsewhere[:, None], 0))


class Head:
    """[rows, hidden] -> float32 logits [rows, vocabulary]: the model's last norm, and its matrix.

    `weight`, the rank's rows, may be the embedding's (tied).
    """

    def __init__(self, ops: Ops, norm: Norm, weight: torch.Tensor, vocab_size: int, group: Group) -> None:
        self._ops = ops
        self._norm = norm
        self._weight = ops.pack_linear(weight)
        self._vocab_size = vocab_size
        self._all_gather = group.all_gather

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        # Where the vocabulary does not come out even, the last ranks' rows are padded.
        return self._all_gather(self._ops.logits(hidden, self._norm, self._weight))[:, : self._vocab_size]
