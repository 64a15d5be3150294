"""Products with few rows: which variant of `linear.cu` to start, and with how much of everything."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from tgi_backend_cuda.native.compile import Kernel
from tgi_backend_cuda.native.launch import Launcher, pointer

MAX_TOKENS = 8
"""Rows of x that one product takes: columns of the matrix unit's right operand."""
MAX_WORLD = 8
"""Ranks that send sums to each other."""
NOTHING_SENT = -0x8000
"""Of an inbox's numbers: the 16 bits of minus zero."""
_CHUNK = 64
_CHUNK_BYTES = 128


class Epilogue(IntEnum):
    """What becomes of the sums."""

    STORE = 0
    STORE_FLOAT = 1
    ADD = 2
    GATED = 3
    SEND = 4
    """They go to all ranks."""


class InboxesArgument(ctypes.Structure):
    """`Inboxes` in `inboxes.cuh`."""

    _fields_ = (
        ("ranks", ctypes.c_uint64 * MAX_WORLD),
        ("own", ctypes.c_uint64),
        ("state", ctypes.c_uint64),
        ("stop", ctypes.c_uint64),
        ("sum", ctypes.c_uint64),
        ("capacity", ctypes.c_uint32),
        ("rank", ctypes.c_uint32),
    )


@dataclass(frozen=True, slots=True)
class Inboxes:
    """Where products of all ranks send what they bring to a sum, and the next ones find it: see `inboxes.cuh`."""

    addresses: tuple[int, ...]
    """By rank, each int16 [3, world_size, capacity], `NOTHING_SENT` throughout at first."""
    capacity: int
    """Numbers of one sum."""
    rank: int
    state: torch.Tensor
    """int32 [3] of this rank, zero at first."""
    stop: torch.Tensor
    """int32 [1]: not 0 once nobody may wait any more."""

    def argument(self, total: torch.Tensor | None = None) -> InboxesArgument:
        """For the receiver: `total` becomes its x with the sum added."""
        ranks = (*self.addresses, *(0 for _ in range(MAX_WORLD - len(self.addresses))))
        others = (self.state.data_ptr(), self.stop.data_ptr(), 0 if total is None else total.data_ptr())
        return InboxesArgument(ranks, self.addresses[self.rank], *others, self.capacity, self.rank)


@dataclass(frozen=True, slots=True)
class Arriving:
    """A sum under way: the product that norms `total` next receives it, and fills `total` in."""

    total: torch.Tensor
    residual: torch.Tensor
    inboxes: Inboxes


NO_INBOXES = InboxesArgument()


@dataclass(frozen=True, slots=True)
class LinearTuning:
    """See `linear.cu`; which values are best is measured."""

    warps: int = 8
    stages: int = 4
    tiles: int = 1
    blocks: int = 2
    """Blocks at most for each multiprocessor; they share the rows of the weight."""
    prefetch: int = 0
    evict_first: bool = True


@dataclass(frozen=True, slots=True)
class LinearTunings:
    """One for each place in a decoder; measured on H200 with a whole step of an 8B model, one token, in one graph."""

    norm_linear: LinearTuning = LinearTuning(warps=16, stages=4, blocks=1, prefetch=8192)
    linear: LinearTuning = LinearTuning(warps=8, stages=6, blocks=2)
    linear_add: LinearTuning = LinearTuning(warps=8, stages=6, blocks=2)
    norm_gated: LinearTuning = LinearTuning(warps=16, stages=4, blocks=1, prefetch=2048)
    head: LinearTuning = LinearTuning(warps=16, stages=4, blocks=1, prefetch=8192)

    receiving_stages: int = 5
    """Of those with a norm that wait for other GPUs: they get further ahead meanwhile."""

    def of(self, normed: bool, epilogue: Epilogue, world_size: int = 1) -> LinearTuning:
        tuning = {
            Epilogue.STORE: self.norm_linear if normed else self.linear,
            Epilogue.SEND: self.linear,
            Epilogue.STORE_FLOAT: self.head,
            Epilogue.ADD: self.linear_add,
            Epilogue.GATED: self.norm_gated,
        }[epilogue]
        return replace(tuning, stages=self.receiving_stages) if normed and world_size > 1 else tuning


@dataclass(frozen=True, slots=True)
class Linear:
    """A product of one shape, compiled and divided among blocks."""

    tokens: int
    columns: int
    rows: int
    """Outputs per token."""
    dtype: torch.dtype
    normed: bool
    epilogue: Epilogue
    tuning: LinearTuning
    world_size: int = 1
    """Ranks that send x, where it is normed, or that it is sent to."""

    @property
    def kernel(self) -> Kernel:
        tuning = self.tuning
        constants = {
            "BF16": int(self.dtype == torch.bfloat16),
            "TOKENS": self.tokens,
            "NORM": int(self.normed),
            "EPILOGUE": int(self.epilogue),
            "WARPS": tuning.warps,
            "STAGES": tuning.stages,
            "TILES": tuning.tiles,
            "PREFETCH": tuning.prefetch,
            "EVICT_FIRST": int(tuning.evict_first),
            "WORLD": self.world_size,
        }
        return Kernel("linear", tuple(constants.items()))

    @property
    def shared_bytes(self) -> int:
        """As `linear` in `linear.cu` divides it."""
        tuning = self.tuning
        chunks = -(-self.columns // _CHUNK)
        stage = (16 * tuning.tiles + (0 if self.normed else self.tokens)) * _CHUNK_BYTES
        sums = 2 * tuning.warps * 16 * tuning.tiles * self.tokens * 4
        norm = chunks * (self.tokens + 1) * _CHUNK_BYTES + 4 * self.tokens * tuning.warps if self.normed else 0
        return tuning.warps * tuning.stages * stage + sums + -(-norm // 16) * 16

    def fitted(self, shared_bytes: int) -> Linear:
        """With as many stages as a block's shared memory has room for, two at least."""
        stages = self.tuning.stages
        fitted = self
        while fitted.shared_bytes > shared_bytes and stages > 2:
            stages -= 1
            fitted = replace(self, tuning=replace(self.tuning, stages=stages))
        return fitted

    def blocks(self, multiprocessors: int) -> int:
        groups = -(-self.rows // ((8 if self.epilogue == Epilogue.GATED else 16) * self.tuning.tiles))
        return min(groups, multiprocessors * self.tuning.blocks)

    def start(
        self,
        launcher: Launcher,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        eps: float,
        inboxes: InboxesArgument = NO_INBOXES,
    ) -> None:
        arguments = (
            pointer(x),
            pointer(norm_weight),
            ctypes.c_float(eps),
            pointer(weight),
            pointer(bias),
            pointer(out),
            ctypes.c_uint32(self.columns),
            ctypes.c_uint32(self.rows),
            inboxes,
        )
        grid = (self.blocks(launcher.multiprocessors), 1, 1)
        launcher.launch(self.kernel, grid, 32 * self.tuning.warps, self.shared_bytes, arguments)
