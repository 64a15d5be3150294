"""Short messages between GPUs that reach each other's memory: each rank writes its numbers into all others' inboxes.

Every 8 bytes carry 4 bytes of numbers and a count, so that a number is known to be there by itself: no barrier before,
none after, one way over the wire (as NCCL's low-latency protocol, at twice the traffic). Messages of the same parity
share an inbox. That is safe, because in each exchange every rank waits for every other: one that sends message n + 2
has received all messages n + 1, whose senders had finished with message n.

Counts live on the device, one for each program of the grid, so that exchanges may be recorded into graphs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tgi_model_server.parallel import Shard

BLOCK = 512
"""Words of 4 bytes that a program handles at a time. The same for all messages: a place belongs to one program."""
PROGRAMS = 128
"""At most: all run at the same time, since each waits for its counterparts on the other GPUs."""
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def _send(x, addresses, start, count, words, RANK: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr):
    """This program's words of x, each with the count, to `start` of the inboxes of all other ranks."""
    mark = count.to(tl.int64) << 32
    for chunk in range(tl.program_id(0), tl.cdiv(words, BLOCK), tl.num_programs(0)):
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = at < words
        word = tl.load(x + at, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
        for other in tl.static_range(WORLD):
            if other != RANK:
                inbox = tl.multiple_of(tl.load(addresses + other).to(tl.pointer_type(tl.int64)), 16)
                # Past every cache: the other side waits for it.
                tl.store(inbox + start + at, word | mark, mask=inside, cache_modifier=".wt")


@triton.jit
def _receive(inbox, at, inside, count, stop):
    """int32: the words at these places, once they carry the count; anything, once `stop` is set."""
    packed = tl.load(inbox + at, mask=inside, other=0, volatile=True)
    missing = tl.sum(tl.where(inside & ((packed >> 32).to(tl.int32) != count), 1, 0), axis=0)
    while missing > 0:
        packed = tl.load(inbox + at, mask=inside, other=0, volatile=True)
        missing = tl.sum(tl.where(inside & ((packed >> 32).to(tl.int32) != count), 1, 0), axis=0)
        missing = tl.where(tl.load(stop, volatile=True) != 0, 0, missing)
    return packed.to(tl.int32)


@triton.jit
def _numbers(word, KIND: tl.constexpr):
    """Both numbers of a word, float32; the second is 0 where it holds only one."""
    if KIND == 0:
        first = word.to(tl.float32, bitcast=True)
        second = tl.zeros_like(first)
    elif KIND == 1:
        first = (word << 16).to(tl.float32, bitcast=True)
        second = (word & -65536).to(tl.float32, bitcast=True)
    else:
        first = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def _word(first, second, KIND: tl.constexpr):
    if KIND == 0:
        return first.to(tl.int32, bitcast=True)
    if KIND == 1:
        low = first.to(tl.bfloat16).to(tl.int16, bitcast=True)
        high = second.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        low = first.to(tl.float16).to(tl.int16, bitcast=True)
        high = second.to(tl.float16).to(tl.int16, bitcast=True)
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def sum_kernel(
    x,
    residual,
    out,
    inbox,
    addresses,
    counts,
    stop,
    words,
    CAPACITY: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out = sum of all ranks' x, plus residual with ADD; all int32 views of `words` words, out may be either input.

    inbox int64 [2, WORLD, CAPACITY]; addresses int64 [WORLD], of all ranks' inboxes; counts int32 [PROGRAMS]; stop
    int32 [1]. Added up in float32 in order of rank, so that all ranks get the same bits. EARLY is programmatic
    dependent launch: this kernel is started before its input is there, and so is a next one that was launched for it,
    which fetches its weights meanwhile.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    count = tl.load(counts + program) + 1
    half = (count & 1).to(tl.int64) * (WORLD * CAPACITY)
    _send(x, addresses, half + RANK * CAPACITY, count, words, RANK, WORLD, BLOCK)
    for chunk in range(program, tl.cdiv(words, BLOCK), tl.num_programs(0)):
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = at < words
        first = tl.zeros((BLOCK,), tl.float32)
        second = tl.zeros((BLOCK,), tl.float32)
        for source in tl.static_range(WORLD):
            if source == RANK:
                word = tl.load(x + at, mask=inside, other=0)
            else:
                word = _receive(inbox + half + source * CAPACITY, at, inside, count, stop)
            one, other = _numbers(word, KIND)
            first += one
            second += other
        if ADD:
            one, other = _numbers(tl.load(residual + at, mask=inside, other=0), KIND)
            first += one
            second += other
        tl.store(out + at, _word(first, second, KIND), mask=inside)
    tl.store(counts + program, count)


@triton.jit
def gather_kernel(
    x,
    out,
    width,
    inbox,
    addresses,
    counts,
    stop,
    words,
    CAPACITY: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x int32 [rows, width] of each rank to out [rows, WORLD, width]; with FIRST rank 0's to out [rows, width].

    The rest as in `sum_kernel`.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    count = tl.load(counts + program) + 1
    half = (count & 1).to(tl.int64) * (WORLD * CAPACITY)
    _send(x, addresses, half + RANK * CAPACITY, count, words, RANK, WORLD, BLOCK)
    for chunk in range(program, tl.cdiv(words, BLOCK), tl.num_programs(0)):
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = at < words
        for source in tl.static_range(WORLD):
            if source == RANK:
                word = tl.load(x + at, mask=inside, other=0)
            else:
                word = _receive(inbox + half + source * CAPACITY, at, inside, count, stop)
            if FIRST:
                if source == 0:
                    tl.store(out + at, word, mask=inside)
            else:
                tl.store(out + (at // width * WORLD + source) * width + at % width, word, mask=inside)
    tl.store(counts + program, count)


class Exchange:
    """One rank's end. All ranks make the same calls with the same sizes in the same order, from one stream."""

    def __init__(
        self,
        shard: Shard,
        inbox: torch.Tensor,
        addresses: torch.Tensor,
        *,
        early: bool = False,
        owner: object = None,
    ) -> None:
        """`inbox` int64 [2, world_size, words], zeroed on all ranks; `addresses` int64 [world_size], on the device.

        `early`: the chip has programmatic dependent launch. `owner` keeps the memory of the others mapped.
        """
        self._early = early
        self._shard = shard
        self._owner = owner
        self._inbox = inbox
        self._addresses = addresses
        self._capacity = inbox.shape[2]
        self._counts = torch.zeros(PROGRAMS, dtype=torch.int32, device=inbox.device)
        self.stop = torch.zeros(1, dtype=torch.int32, device=inbox.device)
        """Not 0 once nobody may wait any more."""
        self._abort_stream: Any = None
        if inbox.is_cuda:
            self._one = torch.ones(1, dtype=torch.int32).pin_memory()
            self._abort_stream = torch.cuda.Stream(inbox.device)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `x` can be exchanged here: small enough, in one piece, of whole words."""
        size, start = x.numel() * x.element_size(), x.storage_offset() * x.element_size()
        return size <= self._capacity * 4 and size % 4 == start % 4 == 0 and x.is_contiguous() and size > 0

    def sum(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of all ranks' `x`, written into it; or `residual`, of the same shape, with the sum added to it."""
        out = x if residual is None else residual
        added = None if residual is None else _words(residual)
        self._start(sum_kernel, _words(x), added, _words(out), KIND=_KINDS[x.dtype], ADD=residual is not None)
        return out

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, columns] -> [rows, world_size * columns]; a row has whole words."""
        rows, columns = x.shape
        out = torch.empty((rows, self._shard.world_size * columns), dtype=x.dtype, device=x.device)
        words = _words(x)
        self._start(gather_kernel, words, _words(out), words.shape[0] // rows, FIRST=False)
        return out

    def broadcast(self, x: torch.Tensor) -> None:
        """Rank 0's `x` into all."""
        words = _words(x)
        self._start(gather_kernel, words, words, words.shape[0], FIRST=True)

    def abort(self) -> None:
        """No exchange waits any more; what it gives is worthless. From any thread."""
        if self._abort_stream is None:
            self.stop.fill_(1)
            return
        # Beside the stream in which the device waits. The tensor was made in inference mode, as all of the engine is.
        with torch.inference_mode(), torch.cuda.stream(self._abort_stream):
            self.stop.copy_(self._one, non_blocking=True)

    def _start(self, kernel: Any, words: torch.Tensor, *others: torch.Tensor | int | None, **constants: Any) -> None:
        count = words.shape[0]
        kernel[(min(triton.cdiv(count, BLOCK), PROGRAMS),)](
            words,
            *others,
            self._inbox,
            self._addresses,
            self._counts,
            self.stop,
            count,
            CAPACITY=self._capacity,
            RANK=self._shard.rank,
            WORLD=self._shard.world_size,
            BLOCK=BLOCK,
            EARLY=self._early,
            num_warps=4,
            **({"launch_pdl": True} if self._early else {}),
            **constants,
        )


def _words(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.int32)
