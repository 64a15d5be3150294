"""Attention of prompts through FlashInfer, where it is installed and its kernels are compiled already.

FlashInfer (Ye et al. 2025) compiles for a shape at its first use, which takes a minute. No server waits for that: the
first one compiles beside its work, once it has started, and uses Triton's kernels; later ones find FlashInfer's.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from tgi_model_server.device import AttentionShape, KVLayout
from tgi_model_server.kernels.plan import Ints
from tgi_model_server.kernels.shared import SharedKeys, SharedState
from tgi_model_server.kernels.sharing import tiles_of
from tgi_model_server.plan import StepPlan

log = logging.getLogger(__name__)

_WORKSPACE_BYTES = 256 << 20
_HEAD_DIMS = (64, 128, 256)
_FULL = 0.75
"""Of the chip's cores that must have work on keys that rows share, if it is not to be shared out among more programs.
"""
_COMPILE_AFTER_S = 30.0
"""By then the server has started: before, the compilers would take its cores."""
_COMPILE = (
    "import os, sys; os.nice(19); from tgi_backend_cuda.prefill import compile_module; compile_module(*sys.argv[1:])"
)


class PromptAttention:
    """Plans and runs the attention of a step's rows with several new tokens. For one shape of attention."""

    def __init__(self, shape: AttentionShape, layout: KVLayout, device: torch.device, in_flight: int) -> None:
        """`in_flight`: steps that may be planned before the oldest of them is done."""
        from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper as Wrapper

        self._shape, self._layout, self._device = shape, layout, device
        self._cores = torch.cuda.get_device_properties(device).multi_processor_count
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # A plan is copied from pinned memory in the order of the device's work: it must not be overwritten before.
        # A step has two: of the keys that rows share, and of their own.
        self._wrappers: list[Any] = [
            Wrapper(workspace, layout.order, backend=_kind(device)) for _ in range(2 * (in_flight + 1))
        ]
        self._next = 0

    @property
    def per_tile(self) -> int:
        """Tokens of a tile, which has those of one head."""
        return 192 if self._shape.head_dim == 64 else 128

    def plan(self, plan: StepPlan, pages: Sequence[Ints], shared: SharedKeys | None) -> PlannedPrompts:
        """Of a step in which some row has several new tokens, with the plan's pages as arrays, and what rows share."""
        rows = [row for row, query_len in enumerate(plan.query_lens) if query_len > 1]
        # Queries lie in one piece; a row of one token between the others comes along.
        part = range(rows[0], rows[-1] + 1)
        known = {} if shared is None else {row: group.keys for group in shared.groups for row in group.rows}
        own = self._plan(
            [plan.query_lens[row] for row in part],
            [(pages[row], known.get(row, 0), plan.kv_lens[row]) for row in part],
            causal=True,
        )
        first = sum(plan.query_lens[: rows[0]])
        tokens = slice(first, first + sum(plan.query_lens[row] for row in part))
        return PlannedPrompts(own, tokens, self._shape.head_dim**-0.5, self._plan_shared(plan, pages, shared))

    def _plan_shared(self, plan: StepPlan, pages: Sequence[Ints], shared: SharedKeys | None) -> Any:
        """None where tiles are too few for the chip: nobody else here shares a tile's keys among programs."""
        if shared is None:
            return None
        per_tile = shared.tokens.shape[0] // shared.tiles.shape[0]
        places = [tiles_of(plan, group, per_tile) * per_tile for group in shared.groups]
        work = sum(-(-count // self.per_tile) for count in places) * self._shape.num_heads
        if work < _FULL * self._cores * -(-work // self._cores):
            return None
        keys = [(pages[group.rows[0]], 0, group.keys) for group in shared.groups]
        return self._plan(places, keys, causal=False)

    def _plan(self, query_lens: list[int], keys: list[tuple[Ints, int, int]], *, causal: bool) -> Any:
        """A wrapper for pieces of queries, each with its pages, the first key, which begins a page, and their end."""
        size, shape = self._layout.page_size, self._shape
        used = [(begin // size, -(-end // size)) for _, begin, end in keys]
        pages = np.concatenate([own[first:last] for (own, _, _), (first, last) in zip(keys, used, strict=True)])
        wrapper = self._wrappers[self._next]
        self._next = (self._next + 1) % len(self._wrappers)
        wrapper.plan(
            _ints([0, *accumulate(query_lens)]),
            _ints([0, *accumulate(last - first for first, last in used)]),
            torch.from_numpy(pages).pin_memory().to(self._device, non_blocking=True),
            _ints([(end - 1) % size + 1 for _, _, end in keys]),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            size,
            causal=causal,
            sm_scale=shape.head_dim**-0.5,
            q_data_type=shape.dtype,
            kv_data_type=shape.kv_dtype,
        )
        return wrapper


class PlannedPrompts:
    """One step's plan: `tokens` are the new tokens that it covers, `scale` what their scores are multiplied by."""

    def __init__(self, own: Any, tokens: slice, scale: float, shared: Any = None) -> None:
        self._own, self._shared = own, shared
        self.tokens = tokens
        self.scale = scale

    def run(
        self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        """q, out [T, heads, head_dim] of the whole step; pools as the layout has them. lse float32 [tokens, heads] gets
        log2 of the sums of weights.
        """
        self._own.run(q[self.tokens], (k_pool, v_pool), out=out[self.tokens], lse=lse, return_lse=lse is not None)

    def run_shared(
        self, q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, shared: SharedKeys
    ) -> SharedState | None:
        """None where this way does not pay."""
        if self._shared is None:
            return None
        out, lse = self._shared.run(q.index_select(0, shared.tokens), (k_pool, v_pool), return_lse=True)
        return SharedState(shared.starts, shared.lens, out, lse)


def prompt_attention(
    shape: AttentionShape, layout: KVLayout, device: torch.device, in_flight: int
) -> PromptAttention | None:
    """FlashInfer's attention, if it is installed, can do this shape, and needs no compiler now."""
    usual = shape.dtype in (torch.float16, torch.bfloat16) and shape.kv_dtype == shape.dtype
    if not usual or shape.head_dim not in _HEAD_DIMS or find_spec("flashinfer") is None:
        return None
    try:
        if not _is_compiled(shape.dtype, shape.head_dim, device):
            _compile_beside(shape, device)
            return None
        made = PromptAttention(shape, layout, device, in_flight)
    except Exception as error:
        log.warning("FlashInfer cannot be used, Triton's kernels stand in: %s: %s", type(error).__name__, error)
        return None
    log.info("prompts use FlashInfer's attention (%s)", _kind(device))
    return made


def compiled_head_dims() -> list[int]:
    """Those whose kernels in bfloat16 are there, for the first GPU."""
    device = torch.device("cuda", 0)
    return [head_dim for head_dim in _HEAD_DIMS if _is_compiled(torch.bfloat16, head_dim, device)]


def _is_compiled(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    from flashinfer.prefill import gen_batch_prefill_module

    return bool(gen_batch_prefill_module(_kind(device), *_module(dtype, head_dim)).is_compiled)


def _module(dtype: torch.dtype, head_dim: int) -> tuple[object, ...]:
    """What `BatchPrefillWithPagedKVCacheWrapper.plan` compiles: dtypes of queries, keys, results, page ids; head
    dimensions; no rotation, window, cap or half-precision sums.
    """
    return (dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False, False)


def compile_module(dtype: str, head_dim: str, kind: str) -> None:
    """In a process of its own: see `_compile_beside`."""
    from flashinfer.prefill import gen_batch_prefill_module

    gen_batch_prefill_module(kind, *_module(getattr(torch, dtype), int(head_dim))).build_and_load()


def _kind(device: torch.device) -> str:
    """FlashAttention-3's way (Shah et al. 2024) needs Hopper's instructions."""
    return "fa3" if torch.cuda.get_device_capability(device)[0] == 9 else "fa2"


def _compile_beside(shape: AttentionShape, device: torch.device) -> None:
    if device.index:
        return  # the first rank's compilation serves all
    dtype = str(shape.dtype).removeprefix("torch.")
    command = [sys.executable, "-c", _COMPILE, dtype, str(shape.head_dim), _kind(device)]
    log.info("FlashInfer's kernels will be compiled beside the server's work; its next start will use them")

    def run() -> None:
        time.sleep(_COMPILE_AFTER_S)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            log.warning("FlashInfer's kernels could not be compiled: %s", done.stderr.strip()[-500:])
        else:
            log.info("FlashInfer's kernels are compiled")

    threading.Thread(target=run, name="flashinfer-compile", daemon=True).start()


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
