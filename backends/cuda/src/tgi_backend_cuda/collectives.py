"""Sums and gathers of ranks on one host: short ones through each other's memory, long ones through NCCL."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric

from tgi_backend_cuda.exchange import Exchange
from tgi_backend_cuda.native.linear import MAX_WORLD, NOTHING_SENT, Inboxes
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

SUM_NUMBERS = 1 << 15
"""Of a sum that products send themselves: 2 tokens of 16,384."""


def set_environment() -> None:
    """In every rank's process, before it makes a communicator."""
    os.environ.update(ENVIRONMENT)


class CudaGroup(WrappedGroup):
    """Another group, its short exchanges through `Exchange`; with `inboxes` products can send their sums themselves."""

    def __init__(self, inner: Group, exchange: Exchange, inboxes: Inboxes | None = None) -> None:
        super().__init__(inner)
        self.inboxes = inboxes
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
    fast: Group | None = None
    try:
        if _all_reach_each_other(group.world_size):
            fast = CudaGroup(group, *open_exchange(group.shard, device))
    except RuntimeError as error:
        log.warning("rank %d: no memory can be shared with the other GPUs (%s)", group.rank, error)
    if group.minimum(int(fast is not None)) and fast is not None:
        return fast
    log.warning("GPUs do not reach each other's memory: every exchange goes through NCCL, which is slower")
    return group


def open_exchange(shard: Shard, device: torch.device) -> tuple[Exchange, Inboxes | None]:
    """Inboxes for the ranks of torch's default group. Raises `RuntimeError` where memory cannot be shared."""
    world = shard.world_size
    words = LONGEST_BYTES // 4 // max(world - 1, 1) // 2 * 2
    mine, behind = 2 * world * words, 3 * world * SUM_NUMBERS // 4
    memory = symmetric.empty(mine + behind, dtype=torch.int64, device=device)
    memory[:mine].zero_()
    memory[mine:].view(torch.int16).fill_(NOTHING_SENT)
    torch.cuda.synchronize(device)
    assert dist.group.WORLD is not None
    # Returns when every rank is here, so all inboxes are empty before the first message.
    handle = symmetric.rendezvous(memory, dist.group.WORLD)
    everyone = [handle.get_buffer(rank, memory.shape, memory.dtype) for rank in range(world)]
    addresses = [each.data_ptr() for each in everyone]
    early = torch.cuda.get_device_capability(device) >= (9, 0)
    exchange = Exchange(
        shard,
        memory[:mine].view(2, world, words),
        torch.tensor(addresses, dtype=torch.int64).to(device),
        early=early,
        owner=(handle, everyone),
    )
    if not early or not 1 < world <= MAX_WORLD:
        return exchange, None
    state = torch.zeros(3, dtype=torch.int32, device=device)
    sums = tuple(each + mine * memory.itemsize for each in addresses)
    return exchange, Inboxes(sums, SUM_NUMBERS, shard.rank, state, exchange.stop)


def _all_reach_each_other(count: int) -> bool:
    pairs = ((one, other) for one in range(count) for other in range(count) if one != other)
    return all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)
