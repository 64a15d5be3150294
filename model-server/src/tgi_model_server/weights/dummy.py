"""Random weights from the configuration alone, made where they are used: for measuring without a checkpoint."""

from __future__ import annotations

import hashlib

import torch

from tgi_model_server.parallel import Shard
from tgi_model_server.weights.loader import RankWeights

SPREAD = 0.02
"""Standard deviation, which transformers also initializes with: activations stay finite through many layers."""


class DummyWeights(RankWeights):
    """The same for a name and shape in every run and on every rank, on devices that draw numbers in the same way."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device, shard: Shard, seed: int = 0) -> None:
        super().__init__(dtype=dtype, device=device, shard=shard)
        self._seed = seed
        self._generator = torch.Generator(device)

    def _fill(self, target: torch.Tensor, name: str, shape: tuple[int, ...], dim: int, start: int) -> None:
        if name.endswith("norm.weight"):
            target.fill_(1.0)
            return
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        self._generator.manual_seed(int.from_bytes(digest[:7], "little"))
        # Numbers depend on their place in the whole tensor, so a part is cut out of it.
        whole = target if target.shape == shape else self._empty(shape)
        whole.normal_(0.0, SPREAD, generator=self._generator)
        if whole is not target:
            target.copy_(whole.narrow(dim, start, target.shape[dim]))
