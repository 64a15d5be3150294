"""CpuDevice: the reference device, eager and always there."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence

import torch

from tgi_backend_cpu.attention import PAGE_SIZE, CpuAttentionPlan
from tgi_backend_cpu.collectives import OrderedSums
from tgi_backend_cpu.ops import CpuOps
from tgi_model_server import machine
from tgi_model_server.device import AttentionShape, Bucket, Forward, KVLayout, MemoryFigures, StepDefaults, StepLimits
from tgi_model_server.parallel import Group, Shard
from tgi_model_server.plan import StepPlan
from tgi_model_server.step import StepInput

_FLOAT32_PARAMETERS = 1_000_000_000
"""Up to here weights are small enough to be read in float32; larger models live on memory bandwidth."""


class CpuDevice:
    """One process's CPU cores. `device.Device` says what each member means."""

    name = "cpu"
    pipeline_depth = 1
    collective_backend = "gloo"
    kv_dtypes = (torch.float8_e4m3fn, torch.float8_e5m2)
    defaults = StepDefaults()

    def __init__(self, *, threads: int | None = None) -> None:
        # Without it MKL, inside the attention, rounds differently for different numbers of rows. MKL reads it at its
        # first use.
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        # oneDNN keeps compiled products for 1,024 shapes, of some 300 kB each, and every number of rows is another one.
        # It reads this at its first use, too.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        self.torch_device = torch.device("cpu")
        self.ops = CpuOps()
        self._threads = threads
        self._processes = 1
        torch.set_num_threads(threads or machine.usable_cores())

    def join(self, shard: Shard) -> None:
        """An equal share of cores and memory."""
        self._processes = shard.world_size
        torch.set_num_threads(self._threads or machine.usable_cores(shard.world_size))

    def collectives(self, group: Group) -> Group:
        """Of two numbers the sum is the same in either order; of more the order must not depend on the batch."""
        return OrderedSums(group) if group.world_size > 2 else group

    def default_dtype(self, checkpoint_dtype: torch.dtype, num_parameters: int) -> torch.dtype:  # noqa: ARG002
        """float32 for small models: exact, and as fast as half precision there. bfloat16 for large ones."""
        if num_parameters <= _FLOAT32_PARAMETERS and num_parameters * 4 <= machine.available_bytes() // 2:
            return torch.float32
        return torch.bfloat16

    def memory(self) -> MemoryFigures:
        """A quarter of what is available: a CPU's memory belongs to everyone on the machine."""
        share = self._processes
        return MemoryFigures(total=machine.total_bytes() // share, free=machine.available_bytes() // 4 // share)

    def peak(self, work: Callable[[], None]) -> int | None:  # noqa: ARG002
        """The pool takes a part of what is free; the largest step would take minutes of a large model's start."""
        return None

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Anonymous pages of the kernel, which are zero and take no memory before they are written."""
        return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)

    def kv_layout(self, shape: AttentionShape) -> KVLayout:  # noqa: ARG002
        return KVLayout(PAGE_SIZE)

    def plan_attention(
        self,
        plan: StepPlan,
        shape: AttentionShape,  # noqa: ARG002
        layout: KVLayout,  # noqa: ARG002
        bucket: Bucket | None = None,  # noqa: ARG002
    ) -> CpuAttentionPlan:
        # OpenMP keeps the number of threads per calling thread, and torch passes ours on only when asked for it. Steps
        # run in another thread than the one that made this device.
        torch.get_num_threads()
        return CpuAttentionPlan(plan)

    def buckets(self, limits: StepLimits) -> Sequence[Bucket]:  # noqa: ARG002
        return ()

    def prefers_captured(self, plan: StepPlan) -> bool:  # noqa: ARG002
        return False

    def capture(self, forward: Forward, example: StepInput, bucket: Bucket) -> Forward:  # noqa: ARG002
        return forward
