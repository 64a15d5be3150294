"""The Device protocol: the part of the PyTorch engine that differs per chip.

Three levels. Level 1: `ops`, a table of operations; what a device leaves alone runs in `reference`. Level 2: the KV
layout and `plan_attention`. Level 3: `buckets` and `capture`, for chips that replay graphs or compile ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from tgi_model_server.parallel import Group, Shard
from tgi_model_server.step import AttentionPlan, StepInput, StepPlan


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """Bytes of the memory that holds weights and KV."""

    total: int
    free: int
    used: int = 0
    """By this process, of `total`; 0 where that is not known."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one layer's KV pool as this device's kernels want it.

    "NHD": two tensors (keys, values) ``[num_pages, page_size, num_kv_heads, head_dim]``.
    "HND": two tensors ``[num_pages, num_kv_heads, page_size, head_dim]``.
    """

    page_size: int
    order: Literal["NHD", "HND"] = "NHD"


@dataclass(frozen=True, slots=True)
class Bucket:
    """A static step shape: at most `num_tokens` new tokens in `num_rows` rows."""

    num_rows: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step the engine will ever ask for."""

    max_rows: int
    max_tokens: int
    max_kv_len: int
    decode_sizes: tuple[int, ...] | None = None
    """Numbers of decode rows that the user wants captured; None leaves it to the device."""


@dataclass(frozen=True, slots=True)
class StepDefaults:
    """How large this kind of chip wants its steps where the user says nothing."""

    max_rows: int = 128
    prefill_tokens: int = 4096
    """New prompt tokens of a step that has nothing else."""
    mixed_tokens: int | None = None
    """All tokens of a step in which sequences decode: more make these wait longer for their next token, and a few of
    them wait for twice as many. None: prompts may fill such a step too.
    """


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention of this model looks like on this rank, the same for all layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm's weight and the number added to the mean square."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norm of single heads before the rotation, as in Qwen3; weights [head_dim]."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float


class Ops(Protocol):
    """The operations of a transformer step. T is the number of new tokens. Tensors are contiguous, but for q, k and v,
    which are views into the stacked projection: only their last dimension is.

    A device subclasses `reference.ReferenceOps` and overrides what it does faster. The model calls the whole pieces
    (`norm_linear`, `linear_add`, `linear_reduce`, `norm_gated`, `rope_attention`, `logits`), which the reference makes
    of the single ones: a device may speed up either. Every override is tested against the reference in float32 by
    DeviceContract.
    """

    def pack_linear(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [out, in] laid out as `linear` reads it fastest; once, at load. The result is opaque."""
        ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in] x packed [out, in] (+ [out]) -> [T, out], accumulated in float32."""
        ...

    def linear_add(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor:
        """residual [T, out] + linear(x). May overwrite `residual`."""
        ...

    def linear_reduce(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        group: Group,
        *,
        normed_next: bool,
    ) -> torch.Tensor:
        """residual [T, out] plus the sum of linear(x) of all ranks of `group`, the same bits on all; by
        `Group.all_reduce_add`, where nothing is faster. May overwrite `residual`.

        `normed_next` is the caller's promise that the next operation is `norm_linear`, `norm_gated` or `logits` of just
        this result: a device may leave the sum to that one, which fills the result in.
        """
        ...

    def norm_linear(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """linear(rms_norm(x))"""
        ...

    def norm_gated(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """silu_mul(norm_linear(x)) of packed gate and up projections, stacked [2n, in]; [T, n]."""
        ...

    def logits(self, x: torch.Tensor, norm: Norm, weight: torch.Tensor) -> torch.Tensor:
        """norm_linear(x) with packed [vocabulary, in], as float32 [rows, vocabulary]."""
        ...

    def greedy(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [rows, vocabulary] -> int64 [rows], the first of the largest; float32 [rows], the logarithm of the
        sum of exponentials, which log-probabilities are relative to.
        """
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Zhang and Sennrich 2019 over the last dimension; statistics in float32, result in x's dtype."""
        ...

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate q [T, heads, head_dim] and k [T, kv_heads, head_dim] by cos, sin [T, rotary_dim / 2] (float32).

        Halves convention (Llama in transformers): pairs are (i, i + rotary_dim / 2). Su et al. 2021.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2n] -> silu(first half) * second half, [T, n]. Shazeer 2020 (SwiGLU)."""
        ...

    def write_kv(
        self, k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, plan: AttentionPlan
    ) -> None:
        """Store k, v [T, kv_heads, head_dim] of the new tokens in one layer's pools, in place."""
        ...

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
        """Causal attention of q [T, heads, head_dim] over each row's pages, after `write_kv`; [T, heads, head_dim].

        Grouped queries: head h reads KV head ``h * kv_heads // heads``. `sliding_window` w lets a token see itself and
        the w - 1 tokens before it.
        """
        ...

    def rope_attention(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        plan: AttentionPlan,
        shape: AttentionShape,
        *,
        norms: HeadNorms | None,
        scale: float,
        sliding_window: int | None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """All that lies between two projections: the norms of single heads, `rope`, `write_kv` and `attention`.

        qkv [T, (heads + 2 * kv_heads) * head_dim], stacked, -> [T, heads * head_dim]. `last_only`: of each row only the
        last new token's result is used, as in a model's last layer; the others' may be anything. All keys and values
        are stored.
        """
        ...


Forward = Callable[[StepInput], torch.Tensor]
"""StepInput -> float32 logits [sampled rows, vocabulary]."""


class Device(Protocol):
    """One kind of chip as the engine sees it. One instance per process."""

    @property
    def name(self) -> str: ...

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def ops(self) -> Ops: ...

    @property
    def pipeline_depth(self) -> int:
        """Steps in flight: 1 where a step runs in the caller's thread, 2 where the host can plan ahead of the chip."""
        ...

    @property
    def defaults(self) -> StepDefaults: ...

    @property
    def kv_dtypes(self) -> Sequence[torch.dtype]:
        """8-bit floats that `ops` can keep keys and values in, besides the dtype of the model."""
        ...

    @property
    def collective_backend(self) -> str:
        """torch.distributed backend: ``gloo``, ``nccl``, ``xla``, ..."""
        ...

    def join(self, shard: Shard) -> None:
        """This process is one of several ranks: choose the rank's chip, or its share of what all have. Comes first."""
        ...

    def collectives(self, group: Group) -> Group:
        """`group`, of several ranks, as this chip exchanges values fastest; itself where torch.distributed is.

        Called once, by all ranks together, so that it may exchange what it needs through `group`.
        """
        ...

    def default_dtype(self, checkpoint_dtype: torch.dtype, num_parameters: int) -> torch.dtype:
        """The dtype to compute in when the user named none."""
        ...

    def memory(self) -> MemoryFigures:
        """`free` is what the engine may still take: less than all where other programs share the memory."""
        ...

    def peak(self, work: Callable[[], None]) -> int | None:
        """Run `work` and return the bytes that it needed beyond what is in use, at its worst.

        None, without running it, where that cannot be told or memory is not what limits; it is then estimated.
        """
        ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor for the KV pool. Where memory can be mapped at its first use, an idle pool costs none."""
        ...

    def kv_layout(self, shape: AttentionShape) -> KVLayout: ...

    def plan_attention(
        self, plan: StepPlan, shape: AttentionShape, layout: KVLayout, bucket: Bucket | None = None
    ) -> AttentionPlan:
        """Everything that `write_kv` and `attention` of every layer need for this step, moved to the device once.

        With `bucket` the plan is padded to it and the step runs in its captured form: a device may return the same
        buffers each time, filled again in the order of its work.
        """
        ...

    def buckets(self, limits: StepLimits) -> Sequence[Bucket]:
        """Static shapes to compile or capture at start; empty where shapes may vary freely."""
        ...

    def prefers_captured(self, plan: StepPlan) -> bool:
        """Whether a step that fits a bucket should run in its captured form; it may run as it is, too."""
        ...

    def capture(self, forward: Forward, example: StepInput, bucket: Bucket) -> Forward:
        """`forward` made fast for `bucket`; an eager device returns it as it is.

        It is called with `example`'s own tensors, filled anew for each step, and with what `plan_attention` returns for
        the bucket. What it returns is used before it is called again.
        """
        ...
