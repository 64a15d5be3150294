"""The kernels of attention compiled before a step waits for them, several at a time."""

from __future__ import annotations

import torch

from tgi_model_server.device import AttentionShape, KVLayout, StepLimits
from tgi_model_server.kernels.decode import decode
from tgi_model_server.kernels.launch import Tuning, compiling
from tgi_model_server.kernels.ops import TritonOps
from tgi_model_server.kernels.plan import TritonAttentionPlan, aligned, triton_plan
from tgi_model_server.kernels.shared import SharedState, merge_shared
from tgi_model_server.worst_case import largest_plans

_META = torch.device("meta")


def compile_attention(
    shape: AttentionShape, layout: KVLayout, limits: StepLimits, *, cores: int, tuning: Tuning, states: bool
) -> None:
    """What `largest_plans` start between two projections, of models without a window and norms of heads; with `states`
    what goes on from keys that another library has read, too.
    """
    with compiling():
        for plan in largest_plans(limits, layout.page_size):
            planned = triton_plan(plan, shape, layout, device=torch.device("cpu"), cores=cores, tuning=tuning)
            for last_only in (False, True):
                start_attention(planned, plan.num_tokens, shape, layout, tuning, last_only=last_only)
        if states:
            start_states(shape, layout, tuning)


def start_attention(
    plan: TritonAttentionPlan,
    tokens: int,
    shape: AttentionShape,
    layout: KVLayout,
    tuning: Tuning,
    *,
    last_only: bool = False,
) -> None:
    """All between the projections of one layer, on tensors that hold nothing."""
    heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.empty((tokens, heads * shape.head_dim), dtype=shape.dtype, device=_META)
    angles = torch.empty((tokens, shape.head_dim // 2), dtype=torch.float32, device=_META)
    pool = _pool(shape, layout)
    TritonOps(tuning).rope_attention(
        *(qkv, angles, angles, pool, pool, plan, shape),
        norms=None,
        scale=1.0,
        sliding_window=None,
        last_only=last_only,
    )


def start_states(shape: AttentionShape, layout: KVLayout, tuning: Tuning) -> None:
    """`merge_shared` for states of float32 and of the shape's dtype, and `decode`, with one split and with more, for
    the latter: our own kernels leave states of float32.
    """
    numbers = torch.empty(1, dtype=torch.int32, device=_META)
    tiles = torch.empty((1, 2), dtype=torch.int32, device=_META)
    lse = torch.empty((1, shape.num_heads), device=_META)
    out = torch.empty((1, shape.num_heads, shape.head_dim), dtype=shape.dtype, device=_META)
    state = SharedState(numbers, numbers, out, lse)
    for each in (state, SharedState(numbers, numbers, out.float(), lse)):
        merge_shared(out, lse, 0, each, tiles, numbers, numbers, kv_heads=shape.num_kv_heads, tuning=tuning)
    pool = _pool(shape, layout)
    table = torch.empty((1, aligned(1)), dtype=torch.int32, device=_META)
    for splits in (1, 2):
        decode(
            *(out, pool, pool, out, table, numbers, numbers),
            scale=1.0,
            window=None,
            splits=splits,
            tuning=tuning,
            state=state,
        )


def _pool(shape: AttentionShape, layout: KVLayout) -> torch.Tensor:
    size = (2, layout.page_size, shape.num_kv_heads, shape.head_dim)
    pool = torch.empty(size, dtype=shape.kv_dtype, device=_META)
    return pool if layout.order == "NHD" else pool.transpose(1, 2)
