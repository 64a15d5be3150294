"""The operations of a step on a CPU, each with results that do not depend on the other rows of the step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tgi_backend_cpu.attention import PAGE_SIZE, CausalMasks, Chunk, CpuAttentionPlan, attend, block_tokens, padded_len
from tgi_model_server.kv.pool import to_kept
from tgi_model_server.reference import ReferenceOps
from tgi_model_server.step import AttentionPlan

_FIXED_ROWS = 16
_LONG_SUM = 1024
"""oneDNN splits longer sums among threads where there is only one row."""


def _always() -> bool:
    return True


# Half precision needs instructions that not every processor has.
_ONEDNN_TAKES: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
}


class CpuOps(ReferenceOps):
    """oneDNN for products, because MKL's change their rounding with the number of rows; torch's fused attention."""

    def __init__(self) -> None:
        self._masks = CausalMasks()
        self._angles: _Angles | None = None
        self._scratch = (_Scratch(), _Scratch())
        self._onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

    def pack_linear(self, weight: torch.Tensor) -> torch.Tensor:
        if not self._onednn or not _ONEDNN_TAKES.get(weight.dtype, _always)():
            return weight
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return packed

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty(0, weight.shape[0])
        if not weight.is_mkldnn:
            return _in_fixed_blocks(x, weight, bias)
        lonely = rows == 1 and x.shape[1] > _LONG_SUM
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x.expand(2, -1).contiguous() if lonely else x, weight, bias, "none", [], ""
        )
        return out[:1] if lonely else out

    def linear_add(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor:
        return residual.add_(self.linear(x, weight, bias))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if q.shape[-1] != 2 * cos.shape[-1]:
            return super().rope(q, k, cos, sin)
        angles = self._angles
        if angles is None or angles.cos is not cos or angles.sin is not sin:
            angles = self._angles = _Angles(cos, sin)
        return angles.rotate(q), angles.rotate(k)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def write_kv(
        self, k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, plan: AttentionPlan
    ) -> None:
        assert isinstance(plan, CpuAttentionPlan)
        for new, pool in ((k, k_pool), (v, v_pool)):
            _bits(pool).flatten(0, 1).index_copy_(0, plan.cache_slots, _bits(to_kept(new, pool.dtype)))

    def attention(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        plan: AttentionPlan,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        assert isinstance(plan, CpuAttentionPlan)
        arrangement = plan.arrange(sliding_window)
        heads, kv_heads, head_dim = q.shape[1], k_pool.shape[2], q.shape[2]
        grouped = (kv_heads, heads // kv_heads, head_dim)
        out: torch.Tensor | None = None
        for group in arrangement.groups:
            mask, rows = group.mask, group.mask.shape[0]
            queries = q if group.tokens is None else q.index_select(0, group.tokens)
            keys, values = self._gather_kv(k_pool, v_pool, group.pages, rows, q.dtype)
            attended = attend(queries.view(rows, *grouped), keys, values, mask, scale).reshape(rows, heads, head_dim)
            if group.tokens is None:
                return attended
            out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
            out.index_copy_(0, group.tokens, attended)
        out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
        for chunk in arrangement.chunks:
            new = slice(chunk.first_token, chunk.first_token + chunk.query_len)
            keys, values = self._gather_kv(k_pool, v_pool, chunk.pages, 1, q.dtype)
            self._attend_chunk(q[new], keys, values, chunk, scale, sliding_window, out[new])
        return out

    def _gather_kv(
        self, k_pool: torch.Tensor, v_pool: torch.Tensor, pages: torch.Tensor, rows: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Twice [num_pages, PAGE_SIZE, kv_heads, D] -> [rows, kv_heads, padded_len, D], the rows' pages in order."""
        size = (rows, pages.shape[0] // rows * PAGE_SIZE, *k_pool.shape[2:])
        keys, values = (
            scratch.gather(_bits(pool), pages).view(pool.dtype).view(size).transpose(1, 2).to(dtype)
            for scratch, pool in zip(self._scratch, (k_pool, v_pool), strict=True)
        )
        return keys, values

    def _attend_chunk(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        chunk: Chunk,
        scale: float,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """q, out [query_len, heads, D]; keys, values [1, kv_heads, padded, D]. In blocks, to skip what none can see."""
        kv_heads, head_dim = keys.shape[1], q.shape[2]
        group = q.shape[1] // kv_heads
        step = block_tokens(chunk.first_position + chunk.query_len, group)
        for start in range(0, chunk.query_len, step):
            tokens = min(step, chunk.query_len - start)
            first = chunk.first_position + start
            length = padded_len(first + tokens)
            queries = q[start : start + tokens].view(tokens, kv_heads, group, head_dim).transpose(0, 1)
            mask = self._masks.view(tokens, group, first, length, window)
            attended = attend(
                queries.reshape(1, kv_heads, tokens * group, head_dim),
                keys[:, :, :length],
                values[:, :, :length],
                mask[None, None],
                scale,
            )
            into = out[start : start + tokens].view(tokens, kv_heads, group, head_dim)
            into.copy_(attended.view(kv_heads, tokens, group, head_dim).transpose(0, 1))


def _bits(pool: torch.Tensor) -> torch.Tensor:
    """`pool` as what torch can index whatever it means: 8-bit floats as bytes."""
    return pool.view(torch.uint8) if pool.dtype.itemsize == 1 else pool


class _Angles:
    """One step's cosines and sines in the form that turns whole heads; every layer of the step has the same."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self.cos, self.sin = cos, sin
        self._half = cos.shape[-1]
        self._cos = torch.cat((cos, cos), dim=-1)[:, None]
        self._sin = torch.cat((-sin, sin), dim=-1)[:, None]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads, 2 * half]: each half times cos, plus the other one times the signed sin."""
        return torch.addcmul(x * self._cos, x.roll(self._half, -1), self._sin).to(x.dtype)


class _Scratch:
    """Memory for gathered pages, kept from layer to layer: fresh pages from the system cost more than the copy."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def gather(self, pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """[num_pages, ...] -> [pages, numbers of a page], valid until the next call."""
        flat = pool.flatten(1)
        size = pages.shape[0] * flat.shape[1]
        if self._memory is None or self._memory.dtype is not pool.dtype or self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=pool.dtype)
        out = self._memory[:size].view(pages.shape[0], flat.shape[1])
        return torch.index_select(flat, 0, pages, out=out)


def _in_fixed_blocks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Without oneDNN: always the same number of rows at a time, so always the same rounding."""
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % _FIXED_ROWS))
    starts = range(0, padded.shape[0], _FIXED_ROWS)
    return torch.cat([F.linear(padded[start : start + _FIXED_ROWS], weight, bias) for start in starts])[:rows]
