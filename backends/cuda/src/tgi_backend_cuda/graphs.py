"""CUDA graphs: a step's launches recorded once and started as one; which sizes of steps are worth one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tgi_model_server.device import Forward
from tgi_model_server.step import StepInput

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_STEP = 64
"""Distance of the sizes beyond: padding costs little there."""


def graph_sizes(max_rows: int, wanted: Sequence[int] | None = None) -> list[int]:
    """Batch sizes to record, largest first, so that the smaller ones find their memory already there.

    `wanted` is the user's list, which may be empty. The largest batch always has its own size among ours.
    """
    if wanted is not None:
        return sorted({size for size in wanted if 0 < size <= max_rows}, reverse=True)
    sizes = {size for size in (*_SIZES, *range(_SIZES[-1], max_rows, _STEP)) if size < max_rows}
    return sorted({*sizes, max_rows}, reverse=True)


_MIXED = (64, 128, 256, 512, 1024, 1536, 2048)
"""Tokens of steps with prompts. Starting such a step's launches one by one takes the host 13 ms and more, in which no
token that is ready leaves.
"""


def mixed_sizes(max_rows: int, max_tokens: int) -> list[tuple[int, int]]:
    """(rows, tokens) of steps with prompts to record, largest first; at most `max_tokens`."""
    sizes = [tokens for tokens in _MIXED if tokens <= max_tokens] or [max_tokens]
    pairs = [(min(max_rows, tokens // 2), tokens) for tokens in sizes]
    return [pair for pair in reversed(pairs) if pair[0]]


_cuda: Any = torch.cuda  # whose streams have no types


class Recorder:
    """Records steps into one pool of memory: only one graph runs at a time, so all may use the same."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def record(self, forward: Forward, example: StepInput) -> Forward:
        """`forward` of `example`'s tensors as a graph. Its result is overwritten by the next graph that runs."""
        if self._stream is None:
            self._stream = _cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            forward(example)  # compiles kernels and creates handles, which a recording must not
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            logits = forward(example)
        self._pool = graph.pool()
        output = _alias(logits)

        def replay(step: StepInput) -> torch.Tensor:
            assert step.numbers is example.numbers, "a graph reads the tensors that it was recorded with"
            graph.replay()
            return output

        return replay


class _Bytes:
    """Device memory, told to torch by its address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.__cuda_array_interface__ = {
            "shape": ((last + 1) * tensor.element_size(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, which may be a view of a wider one, without owning its memory: the pool may give it to the next
    recording, whose graph runs later.
    """
    flat = torch.as_tensor(_Bytes(tensor), device=tensor.device)
    return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
