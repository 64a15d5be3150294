"""A group whose ranks are threads of one process: what a split model computes, without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from tgi_model_server.parallel import Group, Shard

T = TypeVar("T")


class Meeting:
    """Where the threads of a group exchange tensors."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.brought: list[torch.Tensor] = [torch.empty(0)] * ranks


class ThreadGroup(Group):
    """One rank of several in one process."""

    def __init__(self, shard: Shard, meeting: Meeting) -> None:
        super().__init__(shard)
        self._meeting = meeting

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim=1)

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._meeting.brought[self.rank] = x.clone()
        self._meeting.barrier.wait()
        everything = list(self._meeting.brought)
        self._meeting.barrier.wait()
        return everything


def on_ranks(count: int, work: Callable[[Group], T]) -> list[T]:
    """`work` of each rank, at the same time."""
    meeting = Meeting(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(ThreadGroup(Shard(rank, count), meeting)), range(count)))
