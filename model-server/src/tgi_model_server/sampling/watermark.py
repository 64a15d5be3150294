"""Watermark (Kirchenbauer et al. 2023): raise a pseudo-random part of the vocabulary; the previous token says which."""

from __future__ import annotations

from functools import lru_cache

import torch

HASH_KEY = 15485863


class Watermark:
    """`gamma`: part of the vocabulary that is raised. `delta`: by how much. As TGI and the paper's own detector do."""

    def __init__(self, vocab_size: int, gamma: float, delta: float) -> None:
        self._delta = delta

        @lru_cache(maxsize=1024)
        def raised(previous_token: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(HASH_KEY * previous_token)
            return torch.randperm(vocab_size, generator=generator)[: int(vocab_size * gamma)]

        self.raised = raised
        """Ids that follow `previous_token` with a bonus, int64 on the host."""

    def apply(self, logits: torch.Tensor, row: int, previous_token: int) -> None:
        """Raise row `row` of float32 logits [rows, vocabulary], in place."""
        logits[row, self.raised(previous_token).to(logits.device)] += self._delta
