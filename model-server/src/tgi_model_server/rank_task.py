"""What rank 0 tells another rank of its engine: its task at the start, then one StepPlan per step."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from torch._C._distributed_c10d import Store, TCPStore

from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import StartError
from tgi_model_server.device import Device
from tgi_model_server.parallel import Group, Shard, TorchGroup

MEETING_TIMEOUT_S = 120.0
"""How long ranks wait for each other when they start."""
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class RankTask:
    """One line of JSON on a rank's standard input. The pipe then stays open: when it closes, rank 0 is gone."""

    shard: Shard
    device: str
    """``module:name`` of what makes the Device."""
    options: EngineOptions
    port: int
    """Of the store, on the loopback interface, where ranks meet."""
    plans_fd: int
    report_fd: int
    log_level: str

    def encode(self) -> bytes:
        return msgspec.json.encode(self, enc_hook=str) + b"\n"

    @staticmethod
    def decode(line: bytes) -> RankTask:
        return msgspec.json.decode(line, type=RankTask, dec_hook=_decode_path)


def name_of(factory: Callable[[], Device]) -> str:
    """`factory` as ``module:name``, for another process to import. Raises `StartError` where it has no such name."""
    module, name = getattr(factory, "__module__", ""), getattr(factory, "__qualname__", "<unnamed>")
    if "<" in name or not module:
        raise StartError(f"several shards need a device that can be imported by name, which {name} cannot.")
    return f"{module}:{name}"


def device_of(name: str) -> Device:
    """Make the device that `name_of` named."""
    module, _, path = name.partition(":")
    made: Any = import_module(module)
    for part in path.split("."):
        made = getattr(made, part)
    device: Device = made()
    return device


def connect(device: Device, shard: Shard, store: Store) -> Group:
    """Meet the other ranks; returns when all are there."""
    own = None if device.torch_device.type == "cpu" else device.torch_device
    return device.collectives(TorchGroup(shard, device.collective_backend, store, own))


def open_store(port: int, world_size: int, listen_fd: int | None = None) -> Store:
    """Where ranks meet. Rank 0 gives the socket that it listens on: torch itself would listen on every interface."""
    return TCPStore(
        "127.0.0.1",
        port,
        world_size,
        is_master=listen_fd is not None,
        timeout=timedelta(seconds=MEETING_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )


def write_plan(fds: Sequence[int], body: bytes, timeout_s: float) -> None:
    """Send an encoded plan to every rank. `fds` do not block. Raises `OSError` if one is gone or takes nothing."""
    frame = memoryview(len(body).to_bytes(_LENGTH_BYTES, "little") + body)
    for fd in fds:
        left, deadline_s = frame, 0.0
        while left:
            try:
                left = left[os.write(fd, left) :]
            except BlockingIOError:
                deadline_s = deadline_s or time.monotonic() + timeout_s
                poll = select.poll()
                poll.register(fd, select.POLLOUT)
                if not poll.poll(max(deadline_s - time.monotonic(), 0.0) * 1000):
                    raise TimeoutError(f"it took no plan for {timeout_s:.0f} s") from None


def read_plan(plans: BinaryIO) -> bytes | None:
    """The next plan, encoded; None when there will be none."""
    size = int.from_bytes(plans.read(_LENGTH_BYTES), "little")
    body = plans.read(size)
    return body if body and len(body) == size else None


def _decode_path(kind: type, value: Any) -> Any:
    return Path(value) if kind is Path else value
