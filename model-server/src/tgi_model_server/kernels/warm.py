"""Kernels that continue what another library made of shared keys, compiled before a step waits for them."""

from __future__ import annotations

import torch

from tgi_model_server.device import AttentionShape, KVLayout
from tgi_model_server.kernels.decode import decode
from tgi_model_server.kernels.launch import Tuning
from tgi_model_server.kernels.plan import aligned
from tgi_model_server.kernels.shared import SharedState, merge_shared


def compile_states(shape: AttentionShape, layout: KVLayout, device: torch.device, tuning: Tuning) -> None:
    """`merge_shared` for states of float32 and of the shape's dtype, and `decode`, with one split and with more, for
    the latter: our own kernels leave states of float32. Nothing is computed: there are no tiles and no keys.
    """
    zeros = torch.zeros(1, dtype=torch.int32, device=device)
    no_tile = torch.tensor([[-1, 0]], dtype=torch.int32, device=device)
    lse = torch.zeros((1, shape.num_heads), device=device)
    out = torch.zeros((1, shape.num_heads, shape.head_dim), dtype=shape.dtype, device=device)
    state = SharedState(zeros, zeros, out, lse)
    for each in (state, SharedState(zeros, zeros, out.float(), lse)):
        merge_shared(out, lse, 0, each, no_tile, zeros, zeros, kv_heads=shape.num_kv_heads, tuning=tuning)
    pool = torch.zeros((1, layout.page_size, shape.num_kv_heads, shape.head_dim), dtype=shape.kv_dtype, device=device)
    table = torch.zeros((1, aligned(1)), dtype=torch.int32, device=device)
    for splits in (1, 2):
        decode(
            *(out, pool, pool, out, table, zeros, zeros),
            scale=1.0,
            window=None,
            splits=splits,
            tuning=tuning,
            state=state,
        )
