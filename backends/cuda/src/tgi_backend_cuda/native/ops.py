"""NativeOps: a decoder layer of few tokens in five launches, each reading its weights while the one before it ends.

What is read before a kernel waits for the one ahead of it in the stream: weights, page tables, lengths, and the keys
and values of earlier tokens. So between whatever writes those and the first of these kernels there must be a kernel
that is not one of these, or a graph's beginning; every step has such.
"""

from __future__ import annotations

import torch

from tgi_backend_cuda.native.launch import Launcher
from tgi_backend_cuda.native.linear import Epilogue, Linear, LinearTuning, LinearTunings

DEFAULT_TUNINGS = LinearTunings()


class NativeOps:
    """Operations on tensors that are contiguous; `supports_linear` says of which sizes. Results are rounded once, from
    float32 sums; a normalized x is rounded as `reference.ReferenceOps.rms_norm` does.
    """

    def __init__(self, launcher: Launcher, tunings: LinearTunings = DEFAULT_TUNINGS) -> None:
        self._launcher = launcher
        self._tunings = tunings

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, in] x [out, in] (+ [out]) -> [T, out]; into `out` if given."""
        out = _result(x, weight.shape[0], x.dtype, out)
        self._start(x, weight, bias, out, Epilogue.STORE, self._tunings.linear)
        return out

    def linear_add(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`residual` [T, out] += [T, in] x [out, in] (+ [out]), in place."""
        assert residual.shape == (x.shape[0], weight.shape[0])
        self._start(x, weight, bias, residual, Epilogue.ADD, self._tunings.linear_add)
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
        self._start(x, weight, bias, out, Epilogue.STORE, self._tunings.norm_linear, norm_weight, eps)
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
        self._start(x, gate_up, bias, out, Epilogue.GATED, self._tunings.norm_gated, norm_weight, eps)
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
        self._start(x, weight, None, out, Epilogue.STORE_FLOAT, self._tunings.head, norm_weight, eps)
        return out

    def head(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of an x that is normalized already; float32 [T, out]."""
        out = _result(x, weight.shape[0], torch.float32, out)
        self._start(x, weight, None, out, Epilogue.STORE_FLOAT, self._tunings.head)
        return out

    def _start(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        epilogue: Epilogue,
        tuning: LinearTuning,
        norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        tokens, columns = x.shape
        assert weight.shape[1] == columns
        for tensor in (x, weight, out, bias, norm_weight):
            assert tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0)
        for tensor in (weight, bias, norm_weight):
            assert tensor is None or tensor.dtype == x.dtype
        Linear(
            tokens=tokens,
            columns=columns,
            rows=out.shape[1],
            dtype=x.dtype,
            normed=norm_weight is not None,
            epilogue=epilogue,
            tuning=tuning,
        ).start(self._launcher, x, weight, bias, out, norm_weight, eps)


def _result(x: torch.Tensor, columns: int, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return torch.empty((x.shape[0], columns), dtype=dtype, device=x.device)
    assert out.shape == (x.shape[0], columns)
    assert out.dtype == dtype
    return out
