"""Shard: which part of every tensor a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from tgi_gateway.errors import ModelError


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1

    def size(self, whole: int, what: str) -> int:
        """One rank's part of `whole`. Raises `ModelError` where it does not come out even."""
        if whole % self.world_size:
            raise ModelError(f"{what}: {whole} cannot be split among {self.world_size} shards. Lower --num-shard.")
        return whole // self.world_size

    def range(self, whole: int, what: str) -> slice:
        """Where this rank's part of `whole` lies."""
        size = self.size(whole, what)
        return slice(self.rank * size, (self.rank + 1) * size)
