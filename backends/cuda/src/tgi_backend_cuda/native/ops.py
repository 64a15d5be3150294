"""NativeOps: a decoder layer of few tokens in a few launches, each reading its weights while the one before it ends.

What is read before a kernel waits for the one ahead of it in the stream: weights, page tables, lengths, and the keys
and values of earlier tokens. So between whatever writes those and the first of these kernels there must be a kernel
that is not one of these, or a graph's beginning; every step has such.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tgi_backend_cuda.native.attention import Attention, AttentionTuning, DecodeRows, DecodeShape, tuning_for
from tgi_backend_cuda.native.compile import Kernel
from tgi_backend_cuda.native.launch import Launcher
from tgi_backend_cuda.native.linear import (
    MAX_TOKENS,
    NO_INBOXES,
    Arriving,
    Epilogue,
    Inboxes,
    Linear,
    LinearTunings,
)
from tgi_backend_cuda.native.wide import MAX_NORMED, Normalization, Wide, WideTunings, width_for
from tgi_model_server.device import HeadNorms

DEFAULT_TUNINGS = LinearTunings()
DEFAULT_WIDE_TUNINGS = WideTunings()
NORMED_EPILOGUES = (Epilogue.STORE, Epilogue.STORE_FLOAT, Epilogue.GATED)
PLAIN_EPILOGUES = (Epilogue.STORE, Epilogue.ADD)
"""Of which there are operations."""
WIDE_EPILOGUES = (Epilogue.STORE, Epilogue.STORE_FLOAT, Epilogue.ADD, Epilogue.GATED)
SENT_TOKENS = (1, 2)
"""Of products that send: every block of the next kernel reads all of the message, too long for more tokens."""


class NativeOps:
    """Operations on tensors that are contiguous: products of up to `MAX_TOKENS` rows, on Hopper of up to 64,
    attention of up to 64; `supports` and `supports_attention` say of which sizes. Results are rounded once,
    from float32 sums; a normalized x is rounded as `reference.ReferenceOps.rms_norm` does.
    """

    def __init__(
        self,
        launcher: Launcher,
        tunings: LinearTunings = DEFAULT_TUNINGS,
        attention: AttentionTuning | None = None,
        wide: WideTunings = DEFAULT_WIDE_TUNINGS,
    ) -> None:
        """Attention without a tuning has the one of its size."""
        self._launcher = launcher
        self._tunings = tunings
        self._wide = wide
        self._attention = attention
        self._attentions: dict[DecodeShape, Attention] = {}

    def supports(self, tokens: int, columns: int, dtype: torch.dtype, *, normed: bool, gated: int = 0) -> bool:
        """Whether products of x [tokens, columns] run here, and if `gated` a gated one of so many outputs: few tokens,
        16-bit numbers, rows of whole 16-byte pieces.
        """
        if columns < 8 or columns % 8 or dtype not in (torch.bfloat16, torch.float16):
            return False
        if not 1 <= tokens <= MAX_TOKENS:
            fits = width_for(tokens) is not None and gated % 8 == 0 and (not normed or columns <= MAX_NORMED)
            return fits and self._launcher.hopper
        # A normalized x stays in a block's shared memory.
        return all(
            self._product(tokens, columns, 1, dtype, normed, epilogue).shared_bytes <= self._launcher.shared_bytes
            for epilogue in (NORMED_EPILOGUES if normed else PLAIN_EPILOGUES)
        )

    def kernels(self, dtype: torch.dtype, tokens: Sequence[int], hidden_size: int, world_size: int = 1) -> list[Kernel]:
        """What a decoder starts for steps of these numbers of tokens, attention aside: for `CudaLauncher.prepare`;
        with several ranks also what sends and receives sums.
        """
        alone = [(1, True, NORMED_EPILOGUES), (1, False, PLAIN_EPILOGUES)]
        sums = [(world_size, True, NORMED_EPILOGUES), (world_size, False, (Epilogue.SEND,))] if world_size > 1 else []
        few = [
            self._product(number, hidden_size, 1, dtype, normed, epilogue, ranks).kernel
            for number in tokens
            for ranks, normed, epilogues in (alone + sums if number in SENT_TOKENS else alone)
            for epilogue in epilogues
            if number <= MAX_TOKENS and self.supports(number, hidden_size, dtype, normed=normed)
        ]
        widths = sorted({width_for(number) or 0 for number in tokens} - {0})
        if not widths or not self.supports(widths[0], hidden_size, dtype, normed=True):
            return few
        wide = [
            self._wide_product(width, 8, 8, dtype, epilogue).kernel for width in widths for epilogue in WIDE_EPILOGUES
        ]
        return [*few, Normalization(hidden_size, dtype).kernel, *wide]

    def attention_kernel(
        self, rows: int, heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, *, normed: bool
    ) -> Kernel:
        """What `rope_attention` starts."""
        return self._shape(rows, heads, kv_heads, head_dim, page_size, dtype, normed).kernel

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

    def linear_send(
        self, x: torch.Tensor, weight: torch.Tensor, inboxes: Inboxes, bias: torch.Tensor | None = None
    ) -> None:
        """This rank's part of a sum, [T, out] = `linear`, to all ranks; the next kernel is to receive it."""
        self._start(x, weight, bias, None, Epilogue.SEND, inboxes=inboxes)

    def norm_linear(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        arriving: Arriving | None = None,
    ) -> torch.Tensor:
        """`linear` of rms_norm(x); [T, out]. `arriving` is how x comes to be, if it is not there yet."""
        out = _result(x, weight.shape[0], x.dtype, out)
        self._start(x, weight, bias, out, Epilogue.STORE, norm_weight, eps, arriving=arriving)
        return out

    def norm_gated(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        gate_up: torch.Tensor,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        arriving: Arriving | None = None,
    ) -> torch.Tensor:
        """silu(gate) * up, where [gate, up] is `gate_up` [2n, in] x rms_norm(x); [T, n]. Neither half is rounded."""
        out = _result(x, gate_up.shape[0] // 2, x.dtype, out)
        self._start(x, gate_up, bias, out, Epilogue.GATED, norm_weight, eps, arriving=arriving)
        return out

    def norm_head(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        out: torch.Tensor | None = None,
        arriving: Arriving | None = None,
    ) -> torch.Tensor:
        """Logits: float32 [T, out], so that rounding makes no ties."""
        out = _result(x, weight.shape[0], torch.float32, out)
        self._start(x, weight, None, out, Epilogue.STORE_FLOAT, norm_weight, eps, arriving=arriving)
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
        shape = self._shape(qkv.shape[0], heads, kv_heads, head_dim, page_size, qkv.dtype, norms is not None)
        attention = self._attentions.get(shape)
        if attention is None:
            attention = self._attentions[shape] = Attention(self._launcher, shape, qkv.device)
        out = _result(qkv, heads * head_dim, qkv.dtype, out)
        attention(qkv, cos, sin, k_pool, v_pool, rows, scale=scale, window=window, norms=norms, out=out)
        return out

    def _start(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
        epilogue: Epilogue,
        norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
        *,
        inboxes: Inboxes | None = None,
        arriving: Arriving | None = None,
    ) -> None:
        """Into `out`, or to all `inboxes`."""
        total: torch.Tensor | None = None
        if arriving is not None:
            assert arriving.total is x
            total, x, inboxes = x, arriving.residual, arriving.inboxes
        (tokens, columns), outputs = x.shape, weight.shape[0] // (2 if epilogue == Epilogue.GATED else 1)
        assert weight.shape[1] == columns
        for tensor in (x, total, weight, out, bias, norm_weight):
            assert tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0)
        for tensor in (weight, bias, norm_weight):
            assert tensor is None or tensor.dtype == x.dtype
        if tokens <= MAX_TOKENS:
            argument, ranks = NO_INBOXES, 1
            if inboxes is not None:
                assert tokens * (columns if total is not None else outputs) <= inboxes.capacity
                argument, ranks = inboxes.argument(total), len(inboxes.addresses)
            product = self._product(tokens, columns, outputs, x.dtype, norm_weight is not None, epilogue, ranks)
            product.start(self._launcher, x, weight, bias, out, norm_weight, eps, argument)
            return
        assert out is not None
        assert inboxes is None
        if norm_weight is not None:
            normed = torch.empty_like(x)
            Normalization(columns, x.dtype).start(self._launcher, x, norm_weight, eps, normed)
            x = normed
        wide = self._wide_product(tokens, columns, outputs, x.dtype, epilogue)
        wide.start(self._launcher, x, weight, bias, out)

    def _product(
        self,
        tokens: int,
        columns: int,
        rows: int,
        dtype: torch.dtype,
        normed: bool,
        epilogue: Epilogue,
        world_size: int = 1,
    ) -> Linear:
        tuning = self._tunings.of(normed, epilogue, world_size)
        product = Linear(tokens, columns, rows, dtype, normed, epilogue, tuning, world_size)
        return product.fitted(self._launcher.shared_bytes)

    def _wide_product(self, tokens: int, columns: int, rows: int, dtype: torch.dtype, epilogue: Epilogue) -> Wide:
        width = width_for(tokens)
        assert width is not None
        wide = Wide(width, columns, rows, dtype, epilogue, self._wide.of(epilogue))
        return wide.fitted(self._launcher.shared_bytes)

    def _shape(
        self, rows: int, heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, normed: bool
    ) -> DecodeShape:
        tuning = self._attention or tuning_for(rows * kv_heads, self._launcher.multiprocessors)
        shape = DecodeShape(kv_heads, heads // kv_heads, head_dim, page_size, dtype, normed, tuning)
        return shape.fitted(self._launcher.shared_bytes)


def _result(x: torch.Tensor, columns: int, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return torch.empty((x.shape[0], columns), dtype=dtype, device=x.device)
    assert out.shape == (x.shape[0], columns)
    assert out.dtype == dtype
    return out
