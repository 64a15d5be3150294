"""Several ranks on one CPU: shares of the machine, and sums that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

from tgi_backend_cpu.collectives import OrderedSums
from tgi_backend_cpu.device import CpuDevice
from tgi_model_server import machine
from tgi_model_server.parallel import Group, Shard
from tgi_model_server.testing.groups import on_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_add_in_order_of_rank_whatever_else_is_in_the_tensor(dtype: torch.dtype) -> None:
    parts = [torch.randn(7, 33, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(5)]
    expected = torch.zeros(7, 33)
    for part in parts:
        expected += part.float()

    def add(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        sums, mine = OrderedSums(group), parts[group.rank]
        return sums.all_reduce(mine.clone()), sums.all_reduce(mine[3:4].clone())

    for together, alone in on_ranks(5, add):
        assert together.dtype == dtype
        assert torch.equal(together, expected.to(dtype))
        assert torch.equal(alone, together[3:4])


def test_only_more_than_two_ranks_need_an_order() -> None:
    device = CpuDevice(threads=1)
    assert isinstance(device.collectives(Group(Shard(1, 3))), OrderedSums)
    pair = Group(Shard(1, 2))
    assert device.collectives(pair) is pair


def test_ranks_share_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = machine.usable_cores()
    assert machine.usable_cores(2) == max(1, cores // 2)
    monkeypatch.setattr(machine, "total_bytes", lambda: 1200)
    monkeypatch.setattr(machine, "available_bytes", lambda: 600)
    threads = torch.get_num_threads()
    try:
        device = CpuDevice()
        assert (device.memory().total, device.memory().free) == (1200, 150)
        device.join(Shard(2, 3))
        assert (device.memory().total, device.memory().free) == (400, 50)
        assert torch.get_num_threads() == max(1, cores // 3)
    finally:
        torch.set_num_threads(threads)
