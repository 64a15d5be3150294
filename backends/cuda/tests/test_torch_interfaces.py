"""What the untested-without-a-GPU parts ask of torch exists in the torch that is installed, by name and argument."""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, _SymmetricMemory
from torch.distributed import _symmetric_memory as symmetric


def arguments(function: object) -> set[str]:
    assert callable(function)
    return set(inspect.signature(function).parameters)


def test_memory_that_ranks_share_is_made_as_collectives_makes_it() -> None:
    assert {"dtype", "device"} <= arguments(symmetric.empty)
    assert list(inspect.signature(symmetric.rendezvous).parameters) == ["tensor", "group"]
    assert callable(_SymmetricMemory.get_buffer)
    assert callable(torch.cuda.can_device_access_peer)


def test_groups_are_made_at_once_for_a_device_and_can_be_broken_off() -> None:
    assert {"store", "rank", "world_size", "timeout", "device_id"} <= arguments(dist.init_process_group)
    assert callable(ProcessGroup.abort)


def test_streams_and_events_are_those_that_uploads_uses() -> None:
    assert {"__enter__", "__exit__", "wait_stream", "record_event"} <= set(dir(torch.Stream))
    assert callable(torch.Event.synchronize)
    assert len(inspect.signature(torch.accelerator.current_stream).parameters) == 1


def test_graphs_are_recorded_beside_the_threads_that_load_and_serve() -> None:
    assert {"pool", "stream", "capture_error_mode"} <= arguments(torch.cuda.graph)
