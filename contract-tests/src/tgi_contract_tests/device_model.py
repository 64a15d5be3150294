"""The smallest model that uses a device as the engine does, with the plans and tensors that tests of devices share."""

from __future__ import annotations

import itertools
import random

import torch

from tgi_model_server.device import AttentionShape, Bucket, Device, KVLayout
from tgi_model_server.plan import StepPlan
from tgi_model_server.step import AttentionPlan, StepInput, refill, step_input

STALE = 64.0
"""What lies in pages that a row may not read: large enough to be seen in any result, small enough for float16."""


class ToyModel:
    """One attention layer between an embedding and a head, out of the device's own operations."""

    VOCAB, HIDDEN = 40, 32

    def __init__(self, device: Device, shape: AttentionShape, pages: int) -> None:
        self._device, self._shape = device, shape
        self._layout = device.kv_layout(shape)
        heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self._embedding = on(device, random_of(shape.dtype, self.VOCAB, self.HIDDEN))
        stacked = random_of(shape.dtype, (heads + 2 * kv_heads) * dim, self.HIDDEN)
        self._stacked = device.ops.pack_linear(on(device, stacked))
        self._out = device.ops.pack_linear(on(device, random_of(shape.dtype, self.HIDDEN, heads * dim)))
        self._head = device.ops.pack_linear(on(device, random_of(shape.dtype, self.VOCAB, self.HIDDEN)))
        # Its rows read a past that nobody wrote.
        self._fresh = tuple(on(device, torch.randn_like(pool)) for pool in pools_of(self._layout, shape, pages))
        self._pools = tuple(pool.clone() for pool in self._fresh)

    def reset(self) -> None:
        """The pools as they were; in place, because a captured graph remembers their addresses."""
        for pool, fresh in zip(self._pools, self._fresh, strict=True):
            pool.copy_(fresh)

    def input(self, plan: StepPlan, bucket: Bucket) -> StepInput:
        return step_input(plan, self._attention(plan, bucket), self._device.torch_device, sampled=bucket.num_rows)

    def refill(self, step: StepInput, plan: StepPlan, bucket: Bucket) -> StepInput:
        """`plan` in the tensors of `step`, as the engine does it for a captured step."""
        return refill(step, plan, self._attention(plan, bucket))

    def _attention(self, plan: StepPlan, bucket: Bucket) -> AttentionPlan:
        return self._device.plan_attention(plan, self._shape, self._layout, bucket)

    def forward(self, step: StepInput) -> torch.Tensor:
        ops, shape = self._device.ops, self._shape
        hidden = self._embedding[step.input_ids]
        sizes = [shape.num_heads * shape.head_dim, *[shape.num_kv_heads * shape.head_dim] * 2]
        stacked = torch.split(ops.linear(hidden, self._stacked, None), sizes, -1)
        q, k, v = (part.view(len(hidden), -1, shape.head_dim) for part in stacked)
        ops.write_kv(k, v, self._pools[0], self._pools[1], step.attention)
        mixed = ops.attention(
            q, self._pools[0], self._pools[1], step.attention, scale=shape.head_dim**-0.5, sliding_window=None
        )
        hidden = hidden + ops.linear(mixed.flatten(1), self._out, None)
        return ops.linear(hidden[step.last_token], self._head, None).float()


def shape_of(dtype: torch.dtype) -> AttentionShape:
    return AttentionShape(num_heads=4, num_kv_heads=2, head_dim=16, dtype=dtype, kv_dtype=dtype)


def plan_of(page_size: int, rows: list[tuple[int, int]]) -> StepPlan:
    """Rows of (new tokens, KV length), each on pages of its own that lie scattered over the pool."""
    needed = [-(-kv_len // page_size) for _, kv_len in rows]
    pages = list(range(1, sum(needed) + 1))
    random.Random(len(rows)).shuffle(pages)
    at = itertools.accumulate(needed, initial=0)
    tokens = sum(query_len for query_len, _ in rows)
    return StepPlan(
        slots=list(range(len(rows))),
        query_lens=[query_len for query_len, _ in rows],
        kv_lens=[kv_len for _, kv_len in rows],
        pages=[pages[start : start + count] for start, count in zip(at, needed, strict=False)],
        token_ids=[token % ToyModel.VOCAB for token in range(tokens)],
        sample_rows=list(range(len(rows))),
        allow_eos=[True] * len(rows),
        output_lens=[0] * len(rows),
    )


def pools_of(layout: KVLayout, shape: AttentionShape, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = [pages, layout.page_size, shape.num_kv_heads, shape.head_dim]
    if layout.order == "HND":
        size[1], size[2] = size[2], size[1]
    return torch.full(size, STALE, dtype=shape.kv_dtype), torch.full(size, -STALE, dtype=shape.kv_dtype)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_of(dtype: torch.dtype, *size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=generator(seed)).to(dtype)


def on(device: Device, tensor: torch.Tensor) -> torch.Tensor:
    """Always a copy: an operation that writes over its inputs must not reach the reference's."""
    return tensor.to(device.torch_device, copy=True)
