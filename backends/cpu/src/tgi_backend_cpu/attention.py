"""Paged attention on a CPU: gather each group's pages once per layer, then torch's fused attention over the group.

A token's result must not depend on who shares its step, on how its prompt was cut into chunks, or on whether it was
decoded or prefilled again. Every group therefore goes through the same kernel in the same form: query heads that share
a KV head are rows of one matrix, lengths are padded by `padded_len`, and the mask says what is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tgi_model_server.plan import StepPlan

PAGE_SIZE = 32
_BLOCK = 512
"""Keys that torch's kernel works on at a time. Sums are cut there, so lengths and window starts keep to it."""

_SHORT = (32, 64, 96, 128, 192, 256)


def padded_len(kv_len: int) -> int:
    """Keys to compute with for `kv_len` keys: few different lengths, and the same sums whatever the padding.

    Up to half a block the matrix library sums in one go. Above, only whole blocks give the same partial sums always.
    """
    for short in _SHORT:
        if kv_len <= short:
            return short
    return -(-kv_len // _BLOCK) * _BLOCK


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows with one new token each and the same padded length."""

    tokens: torch.Tensor | None
    """int64 [rows]: which new tokens; None: all of the step, in order."""
    pages: torch.Tensor
    """int64 [rows * padded_len / PAGE_SIZE]"""
    mask: torch.Tensor
    """float32 [rows, 1, 1, padded_len]: 0 or -inf"""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One row's several new tokens."""

    first_token: int
    query_len: int
    first_position: int
    """Of the first new token, counted from the first gathered page."""
    pages: torch.Tensor
    """int64 [padded_len / PAGE_SIZE]"""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the step's rows are computed in layers of one sliding window."""

    groups: Sequence[DecodeGroup]
    chunks: Sequence[Chunk]


class CpuAttentionPlan:
    """One step's rows; arranged once for each kind of layer, at its first layer."""

    def __init__(self, plan: StepPlan) -> None:
        self.cache_slots = torch.tensor(plan.cache_slots(PAGE_SIZE), dtype=torch.int64)
        self._rows = list(zip(plan.query_lens, plan.kv_lens, [list(pages) for pages in plan.pages], strict=True))
        self._arrangements: dict[int | None, Arrangement] = {}

    def arrange(self, window: int | None) -> Arrangement:
        """The arrangement of layers with this sliding window."""
        found = self._arrangements.get(window)
        if found is None:
            found = self._arrangements[window] = self._arrange(window)
        return found

    def _arrange(self, window: int | None) -> Arrangement:
        chunks: list[Chunk] = []
        by_len: dict[int, list[tuple[int, int, list[int]]]] = {}
        token = 0
        for query_len, kv_len, pages in self._rows:
            base = _first_block(kv_len - query_len, window)
            length = kv_len - base
            padded = padded_len(length)
            used = pages[base // PAGE_SIZE : -(-kv_len // PAGE_SIZE)]
            used += [0] * (padded // PAGE_SIZE - len(used))
            if query_len == 1:
                by_len.setdefault(padded, []).append((token, length, used))
            else:
                chunks.append(Chunk(token, query_len, length - query_len, torch.tensor(used, dtype=torch.int64)))
            token += query_len
        alone = not chunks and len(by_len) == 1
        groups = [self._group(padded, rows, window, alone) for padded, rows in sorted(by_len.items())]
        return Arrangement(groups, chunks)

    def _group(
        self, padded: int, rows: list[tuple[int, int, list[int]]], window: int | None, alone: bool
    ) -> DecodeGroup:
        lengths = torch.tensor([length for _, length, _ in rows], dtype=torch.int64)[:, None]
        keys = torch.arange(padded)[None, :]
        hidden = keys >= lengths
        if window is not None:
            hidden |= keys < lengths - window
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        return DecodeGroup(
            tokens=None if alone else torch.tensor([token for token, _, _ in rows], dtype=torch.int64),
            pages=torch.tensor([page for _, _, pages in rows for page in pages], dtype=torch.int64),
            mask=mask[:, None, None, :],
        )


def _first_block(first_position: int, window: int | None) -> int:
    """First key, at a block's border, that the token at `first_position` or a later one can see."""
    if window is None:
        return 0
    return max(0, first_position - window + 1) // _BLOCK * _BLOCK


@dataclass(frozen=True, slots=True)
class _Band:
    """Column ``origin + d`` of row r is the key d positions after the block's first token."""

    origin: int
    values: torch.Tensor


class CausalMasks:
    """Masks of prefill chunks as views into one band matrix per kind of layer, so that no step builds any."""

    def __init__(self) -> None:
        self._bands: dict[tuple[int, int, int | None], _Band] = {}

    def view(self, tokens: int, group: int, first_position: int, keys: int, window: int | None) -> torch.Tensor:
        """float32 [tokens * group, keys] of 0 and -inf: row r is the token at ``first_position + r // group``."""
        block = block_tokens(first_position + tokens, group)
        name = (block, group, window)
        band = self._bands.get(name)
        if band is None or band.origin < first_position:
            band = self._bands[name] = _band(block, group, first_position, window)
        start = band.origin - first_position
        return band.values[: tokens * group, start : start + keys]


def block_tokens(kv_len: int, group: int) -> int:
    """New tokens of a chunk to compute at a time: fewer when they see many keys, to bound the mask."""
    rows = 256 if kv_len <= 8192 else 64 if kv_len <= 32768 else 16
    return max(1, rows // group)


def _band(block: int, group: int, first_position: int, window: int | None) -> _Band:
    origin = max(_BLOCK, 1 << (first_position - 1).bit_length())
    # Keys are padded past the block's last token by less than a kernel's block.
    columns = torch.arange(-origin, block + _BLOCK)[None, :]
    rows = (torch.arange(block * group) // group)[:, None]
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return _Band(origin, torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """q [B, kv_heads, R, D] over k, v [B, kv_heads, L, D] with mask [B, 1, R or 1, L]; [B, kv_heads, R, D].

    In float32 whatever the dtype: in half precision the kernel's rounding depends on the number of rows.
    """
    out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=scale)
    return out.to(q.dtype)
