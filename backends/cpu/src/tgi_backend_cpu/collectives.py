"""Sums over ranks whose rounding does not depend on what else is in the step."""

from __future__ import annotations

import torch

from tgi_model_server.parallel import WrappedGroup


class OrderedSums(WrappedGroup):
    """Adds in order of rank, in float32. A ring starts each part of the tensor at another rank."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.all_gather(x.view(1, -1)).view(self.world_size, -1).float()
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype).view(x.shape)
