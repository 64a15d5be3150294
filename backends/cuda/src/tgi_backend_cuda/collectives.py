"""Sums and gathers of ranks on one host: short ones through each other's memory, long ones through NCCL."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric

from tgi_backend_cuda.exchange import Exchange
from tgi_model_server.parallel import Group, Shard, WrappedGroup

log = logging.getLogger(__name__)

ENVIRONMENT = {
    # NVLink multicast: a program that dies while it uses it can leave the links of a shared host in disorder.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    # torch would end the process by itself when it sees a broken exchange; the server's own words are clearer.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
LONGEST_BYTES = 2 << 20
"""Of a message to one other rank; to several it is so much less. Beyond, NCCL's half traffic is worth its latency."""


def set_environment() -> None:
    """In every rank's process, before it makes a communicator."""
    os.environ.update(ENVIRONMENT)


class CudaGroup(WrappedGroup):
    """Another group, its short exchanges through `Exchange`."""

    def __init__(self, inner: Group, exchange: Exchange) -> None:
        super().__init__(inner)
        self._exchange = exchange

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange.sum(x) if self._exchange.takes(x) else self._inner.all_reduce(x)

    def all_reduce_add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self._exchange.takes(x) and self._exchange.takes(residual):
            return self._exchange.sum(x, residual)
        return super().all_reduce_add(x, residual)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        whole = x.shape[1] * x.element_size() % 4 == 0
        return self._exchange.gather(x) if whole and self._exchange.takes(x) else self._inner.all_gather(x)

    def broadcast(self, x: torch.Tensor) -> None:
        if self._exchange.takes(x):
            self._exchange.broadcast(x)
        else:
            self._inner.broadcast(x)

    def abort(self) -> None:
        self._exchange.abort()
        self._inner.abort()


def fast_group(group: Group, device: torch.device) -> Group:
    """`group`, faster if all its GPUs reach each other's memory. All ranks call it together."""
    exchange: Exchange | None = None
    try:
        if _all_reach_each_other(group.world_size):
            exchange = open_exchange(group.shard, device)
    except RuntimeError as error:
        log.warning("rank %d: no memory can be shared with the other GPUs (%s)", group.rank, error)
    if group.minimum(int(exchange is not None)) and exchange is not None:
        return CudaGroup(group, exchange)
    log.warning("GPUs do not reach each other's memory: every exchange goes through NCCL, which is slower")
    return group


def open_exchange(shard: Shard, device: torch.device) -> Exchange:
    """Inboxes for the ranks of torch's default group. Raises `RuntimeError` where memory cannot be shared."""
    words = LONGEST_BYTES // 4 // max(shard.world_size - 1, 1)
    inbox = symmetric.empty((2, shard.world_size, words), dtype=torch.int64, device=device)
    inbox.zero_()
    torch.cuda.synchronize(device)
    assert dist.group.WORLD is not None
    # Returns when every rank is here, so all are zero before the first message.
    handle = symmetric.rendezvous(inbox, dist.group.WORLD)
    everyone = [handle.get_buffer(rank, inbox.shape, inbox.dtype) for rank in range(shard.world_size)]
    addresses = torch.tensor([each.data_ptr() for each in everyone], dtype=torch.int64).to(device)
    early = torch.cuda.get_device_capability(device) >= (9, 0)
    return Exchange(shard, inbox, addresses, early=early, owner=(handle, everyone))


def _all_reach_each_other(count: int) -> bool:
    pairs = ((one, other) for one in range(count) for other in range(count) if one != other)
    return all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)
