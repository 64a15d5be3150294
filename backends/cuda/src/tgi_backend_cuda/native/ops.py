"""NativeOps: a decoder layer of few tokens in five launches, each reading its weights while the one before it ends.

What is read before a kernel waits for the one ahead of it in the stream: weights, page tables, lengths, and the keys
and values of earlier tokens. So between whatever writes those and the first of these kernels there must be a kernel
that is not one of these, or a graph's beginning; every step has such.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tgi_backend_cuda.native.attention import Attention, AttentionTuning, DecodeRows, DecodeShape
from tgi_backend_cuda.native.compile import Kernel
from tgi_backend_cuda.native.launch import Launcher
from tgi_backend_cuda.native.linear import MAX_TOKENS, Epilogue, Linear, LinearTunings
from tgi_model_server.device import HeadNorms

DEFAULT_TUNINGS = LinearTunings()
DEFAULT_ATTENTION = AttentionTuning()
NORMED_EPILOGUES = (Epilogue.STORE, Epilogue.STORE_FLOAT, Epilogue.GATED)
PLAIN_EPILOGUES = (Epilogue.STORE, Epilogue.ADD)
"""Of which there are operations."""


class NativeOps:
    """Operations on tensors that are contiguous, for at most `MAX_TOKENS` rows; `supports` and
    `supports_attention` say of which sizes. Results are rounded once, from float32 sums; a normalized x is rounded as
    `reference.ReferenceOps.rms_norm` does.
    """

    def __init__(
        self,
        launcher: Launcher,
        tunings: LinearTunings = DEFAULT_TUNINGS,
        attention: AttentionTuning = DEFAULT_ATTENTION,
    ) -> None:
        self._launcher = launcher
        self._tunings = tunings
        self._attention = attention
        self._attentions: dict[DecodeShape, Attention] = {}

    def supports(self, tokens: int, columns: int, dtype: torch.dtype, *, normed: bool) -> bool:
        """Whether products of x [tokens, columns] run here: few tokens, 16-bit numbers, rows of whole 16-byte pieces. A
        normalized x must fit a block's shared memory.
        """
        if not 1 <= tokens <= MAX_TOKENS or columns < 8 or columns % 8 or dtype not in (torch.bfloat16, torch.float16):
            return False
        return all(
            self._product(tokens, columns, 1, dtype, normed, epilogue).shared_bytes <= self._launcher.shared_bytes
            for epilogue in (NORMED_EPILOGUES if normed else PLAIN_EPILOGUES)
        )

    def kernels(self, dtype: torch.dtype, tokens: Iterable[int], hidden_size: int) -> list[Kernel]:
        """What a decoder starts for steps of these numbers of tokens, attention aside: for `CudaLauncher.prepare`."""
        return [
            self._product(number, hidden_size, 1, dtype, normed, epilogue).kernel
            for number in tokens
            for normed, epilogues in ((True, NORMED_EPILOGUES), (False, PLAIN_EPILOGUES))
            for epilogue in epilogues
            if self.supports(number, hidden_size, dtype, normed=normed)
        ]

    def attention_kernel(
        self, heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, *, normed: bool
    ) -> Kernel:
        """What `rope_attention` starts, for every number of rows."""
        return self._shape(heads, kv_heads, head_dim, page_size, dtype, normed).kernel

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, in] x [out, in] (+ [out]) -> [T, out]; into `out` if given."""
        out = _result(x, weight.shape[0], x.dtype, out)
        self._start(x, weight, bias, out, Epilogue.STORE)
        return out

    def linear_add(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`residual` [T, out] += [T, in] x [out, in] (+ [out]), in place."""
        assert residual.shape == (x.shape[0], weight.shape[0])
        self._start(x, weight, bias, residual, Epilogue.ADD)
        return residual

    def norm_linear(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`linear` of rms_norm(x); [T, out]."""
        out = _result(x, weight.shape[0], x.dtype, out)
        self._start(x, weight, bias, out, Epilogue.STORE, norm_weight, eps)
        return out

    def norm_gated(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        gate_up: torch.Tensor,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """silu(gate) * up, where [gate, up] is `gate_up` [2n, in] x rms_norm(x); [T, n]. Neither half is rounded."""
        out = _result(x, gate_up.shape[0] // 2, x.dtype, out)
        self._start(x, gate_up, bias, out, Epilogue.GATED, norm_weight, eps)
        return out

    def norm_head(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits: float32 [T, out], so that rounding makes no ties."""
        out = _result(x, weight.shape[0], torch.float32, out)
        self._start(x, weight, None, out, Epilogue.STORE_FLOAT, norm_weight, eps)
        return out

    def rope_attention(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        rows: DecodeRows,
        *,
        scale: float,
        window: int | None = None,
        norms: HeadNorms | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One new token in each row: `rope` and `write_kv` of it, then `attention`; [T, heads * head_dim].

        qkv [T, (heads + 2 * kv_heads) * head_dim]; cos, sin float32 [T, rotary_dim / 2], halves convention; pools
        [num_pages, page_size, kv_heads, head_dim], which may be views. `window` w lets a token see itself and the
        w - 1 tokens before it. Call it once before a graph is captured.
        """
        _, page_size, kv_heads, head_dim = k_pool.shape
        heads = qkv.shape[1] // head_dim - 2 * kv_heads
        assert qkv.dtype == k_pool.dtype == v_pool.dtype
        for tensor in (qkv, cos, sin, rows.page_table, rows.kv_lens, rows.cache_slots):
            assert tensor.is_contiguous()
        shape = self._shape(heads, kv_heads, head_dim, page_size, qkv.dtype, norms is not None)
        attention = self._attentions.get(shape)
        if attention is None:
            attention = self._attentions[shape] = Attention(self._launcher, shape, MAX_TOKENS, qkv.device)
        out = _result(qkv, heads * head_dim, qkv.dtype, out)
        attention(qkv, cos, sin, k_pool, v_pool, rows, scale=scale, window=window, norms=norms, out=out)
        return out

    def _start(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        epilogue: Epilogue,
        norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        tokens, columns = x.shape
        assert weight.shape[1] == columns
        for tensor in (x, weight, out, bias, norm_weight):
            assert tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0)
        for tensor in (weight, bias, norm_weight):
            assert tensor is None or tensor.dtype == x.dtype
        product = self._product(tokens, columns, out.shape[1], x.dtype, norm_weight is not None, epilogue)
        product.start(self._launcher, x, weight, bias, out, norm_weight, eps)

    def _product(
        self, tokens: int, columns: int, rows: int, dtype: torch.dtype, normed: bool, epilogue: Epilogue
    ) -> Linear:
        tuning = self._tunings.of(normed, epilogue)
        return Linear(tokens, columns, rows, dtype, normed, epilogue, tuning).fitted(self._launcher.shared_bytes)

    def _shape(
        self, heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, normed: bool
    ) -> DecodeShape:
        shape = DecodeShape(kv_heads, heads // kv_heads, head_dim, page_size, dtype, normed, self._attention)
        return shape.fitted(self._launcher.shared_bytes)


def _result(x: torch.Tensor, columns: int, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return torch.empty((x.shape[0], columns), dtype=dtype, device=x.device)
    assert out.shape == (x.shape[0], columns)
    assert out.dtype == dtype
    return out
