"""Tensor parallelism: which part of every tensor a rank holds (Shard), and how ranks exchange values (Group)."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from tgi_gateway.errors import ModelError, StartError

COLLECTIVE_TIMEOUT_S = 60.0
"""How long a rank waits for another one inside a step."""
LOADING_TIMEOUT_S = 3600.0
"""How long one waits for the other's weights. A rank that ends meanwhile is noticed at once."""


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

    def padded_range(self, whole: int) -> slice:
        """The same with equal parts whatever `whole` is: the last ones may reach beyond it."""
        size = -(-whole // self.world_size)
        return slice(self.rank * size, (self.rank + 1) * size)

    def among(self, pieces: int) -> Shard:
        """This rank's part of what has only `pieces` pieces: if they are fewer than ranks, neighbours hold the same."""
        if pieces >= self.world_size:
            return self
        return Shard(self.rank * pieces // self.world_size, pieces)


class Group:
    """The ranks of one engine. This one has a single rank, for which every exchange is free.

    Every rank must make the same calls with the same shapes in the same order. None of them waits for the device or
    looks at a value, so that they may be captured into a graph.
    """

    def __init__(self, shard: Shard | None = None) -> None:
        self.shard = shard or Shard()

    @property
    def rank(self) -> int:
        return self.shard.rank

    @property
    def world_size(self) -> int:
        return self.shard.world_size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, the same bits everywhere. `x` is contiguous and may be overwritten."""
        return x

    def all_reduce_add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual`, of x's shape and the same on all ranks, plus the sum of all ranks' `x`; as `all_reduce` besides.

        May overwrite both.
        """
        return residual.add_(self.all_reduce(x))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, columns] of each rank -> [rows, world_size * columns], in order of rank."""
        return x

    def broadcast(self, x: torch.Tensor) -> None:
        """Overwrite `x` with rank 0's."""

    def minimum(self, value: int) -> int:
        """The smallest of all ranks' numbers, on the host: for start-up, not for steps."""
        return value

    def abort(self) -> None:
        """Break what hangs because a rank is gone. From any thread; nothing works afterwards."""

    def close(self) -> None:
        """Leave the group. All steps are done."""


ALONE = Group()


class TorchGroup(Group):
    """Through torch.distributed. A device may wrap it in what is faster there: see `Device.collectives`."""

    def __init__(self, shard: Shard, backend: str, store: Store, device: torch.device | None = None) -> None:
        """Meets the other ranks at `store`. Raises `StartError` where this torch lacks the backend.

        With `device` what the backend needs there is made now, rather than in the middle of the first exchange.
        """
        super().__init__(shard)
        if not dist.is_available() or not dist.is_backend_available(backend):
            raise StartError(f"several shards need torch.distributed with {backend}, which this torch lacks.")
        # All ranks are on this machine: nothing has to listen to the network.
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
        if loopback is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        dist.init_process_group(
            backend,
            store=store,
            rank=shard.rank,
            world_size=shard.world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            device_id=device,
        )
        # Through the host whatever the device: gloo notices at once when a rank is gone.
        self._host = dist.new_group(backend="gloo", timeout=timedelta(seconds=LOADING_TIMEOUT_S))
        # The older name warns in newer versions.
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = x.shape
        parts = x.new_empty(self.world_size * rows, columns)
        self._gather(parts, x)
        return parts.view(self.world_size, rows, columns).transpose(0, 1).reshape(rows, self.world_size * columns)

    def broadcast(self, x: torch.Tensor) -> None:
        dist.broadcast(x, src=0)

    def minimum(self, value: int) -> int:
        smallest = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self._host)
        return int(smallest.item())

    def abort(self) -> None:
        if dist.is_initialized():
            world = dist.group.WORLD
            assert world is not None
            world.abort()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class WrappedGroup(Group):
    """Another group as it is: for a device to override what its chip does faster."""

    def __init__(self, inner: Group) -> None:
        super().__init__(inner.shard)
        self._inner = inner

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._inner.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._inner.all_gather(x)

    def broadcast(self, x: torch.Tensor) -> None:
        self._inner.broadcast(x)

    def minimum(self, value: int) -> int:
        return self._inner.minimum(value)

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()
