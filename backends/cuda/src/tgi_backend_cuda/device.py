"""CudaDevice: one NVIDIA GPU. Steps are CUDA graphs, but for those with long prompts, which run as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import torch

from tgi_backend_cuda.checks import OLDEST
from tgi_backend_cuda.collectives import CudaGroup, fast_group, set_environment
from tgi_backend_cuda.graphs import Recorder, graph_sizes, mixed_sizes
from tgi_backend_cuda.native.launch import CudaLauncher
from tgi_backend_cuda.native.ops import NativeOps
from tgi_backend_cuda.ops import CudaAttentionPlan, CudaOps
from tgi_backend_cuda.prefill import PromptAttention, prompt_attention
from tgi_gateway.errors import StartError
from tgi_model_server.device import (
    AttentionShape,
    Bucket,
    Forward,
    KVLayout,
    MemoryFigures,
    StepDefaults,
    StepLimits,
)
from tgi_model_server.kernels.launch import Tuning
from tgi_model_server.kernels.plan import FixedPlan, PageLists, TritonAttentionPlan, triton_plan
from tgi_model_server.kernels.warm import compile_attention
from tgi_model_server.parallel import Group, Shard
from tgi_model_server.plan import StepPlan
from tgi_model_server.step import StepInput

PAGE_SIZE = 32
_FEWEST_SHARING = 4
"""Smaller batches never read shared keys together."""
_LONG_PROMPTS = 1 << 22
"""Pairs of a new token and a key of a step's prompts, from which on their attention is worth FlashInfer's launches."""
_MANY_TOKENS = 1024
"""New tokens of a step's prompts, from which on the chip is busy for longer than those launches take."""


class CudaDevice:
    """The GPU of this rank. `device.Device` says what each member means."""

    pipeline_depth = 2
    collective_backend = "nccl"
    defaults = StepDefaults(max_rows=256, prefill_tokens=8192, mixed_tokens=2048)

    def __init__(self) -> None:
        """Raises `StartError` where there is no GPU that the kernels can run on."""
        if not torch.cuda.is_available():
            raise StartError("no NVIDIA GPU can be used: torch finds none. Check nvidia-smi and CUDA_VISIBLE_DEVICES.")
        self._choose(0)
        # Sums in bfloat16, which the library takes for some shapes, cost a digit and gain nothing that was measured.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self._recorder = Recorder()
        self._limits: StepLimits | None = None
        self._fixed: dict[Bucket, FixedPlan] = {}
        self._pages = PageLists()
        self._prompts: dict[AttentionShape, PromptAttention | None] = {}

    def _choose(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        if index:  # the first is chosen already, and another rank must not take memory there
            torch.cuda.set_device(self.torch_device)
        properties = torch.cuda.get_device_properties(index)
        if (properties.major, properties.minor) < OLDEST:
            raise StartError(
                f"{properties.name} has compute capability {properties.major}.{properties.minor}; this backend needs "
                f"{OLDEST[0]}.{OLDEST[1]} or newer."
            )
        self.name = properties.name
        # float8_e4m3fn needs instructions that older chips lack; the other is the upper half of a float16.
        newer = (properties.major, properties.minor) >= (8, 9)
        self.kv_dtypes = (torch.float8_e4m3fn, torch.float8_e5m2) if newer else (torch.float8_e5m2,)
        self._cores = properties.multi_processor_count
        self.tuning = _tuning((properties.major, properties.minor))

    @cached_property
    def ops(self) -> CudaOps:
        """Made when it is first wanted: before `join` it would take memory of a GPU that another rank has."""
        launcher = CudaLauncher(self.torch_device)
        return CudaOps(self.tuning, NativeOps(launcher), launcher.prepare)

    def join(self, shard: Shard) -> None:
        """One GPU for each rank, in the order that torch lists them."""
        found = torch.cuda.device_count()
        if shard.world_size > found:
            raise StartError(f"--num-shard is {shard.world_size}, but torch finds {found} GPUs. Lower it.")
        set_environment()
        self._choose(shard.rank)

    def collectives(self, group: Group) -> Group:
        fast = fast_group(group, self.torch_device)
        if isinstance(fast, CudaGroup) and fast.inboxes is not None:
            self.ops.world_size = fast.world_size
        return fast

    def default_dtype(self, checkpoint_dtype: torch.dtype, num_parameters: int) -> torch.dtype:  # noqa: ARG002
        """The checkpoint's, where it is one of 16 bits; else bfloat16, which holds every float32's range."""
        return checkpoint_dtype if checkpoint_dtype in (torch.float16, torch.bfloat16) else torch.bfloat16

    def memory(self) -> MemoryFigures:
        """What torch keeps for itself but does not use is free, too."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        kept = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        used = torch.cuda.memory_allocated(self.torch_device)
        return MemoryFigures(total=total, free=min(free + kept, total), used=used)

    def peak(self, work: Callable[[], None]) -> int | None:
        """As torch's allocator keeps it, gaps between tensors included. What the driver takes shows in `memory`."""
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_reserved(self.torch_device)
        work()
        torch.cuda.synchronize(self.torch_device)
        needed = torch.cuda.max_memory_reserved(self.torch_device) - before
        torch.cuda.empty_cache()
        return needed

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def kv_layout(self, shape: AttentionShape) -> KVLayout:  # noqa: ARG002
        return KVLayout(PAGE_SIZE)

    def plan_attention(
        self, plan: StepPlan, shape: AttentionShape, layout: KVLayout, bucket: Bucket | None = None
    ) -> TritonAttentionPlan:
        if bucket is None:
            prompts = None if plan.is_decode else self._prompt_attention(plan, shape, layout)
            pages = self._pages.arrays(plan.pages)
            made = triton_plan(
                plan,
                shape,
                layout,
                device=self.torch_device,
                cores=self._cores,
                tuning=self.tuning,
                pages=pages,
                per_tile=None if prompts is None else prompts.per_tile,
            )
            if prompts is None:
                return made
            return CudaAttentionPlan(**_fields(made), prompts=prompts.plan(plan, pages, made.shared))
        fixed = self._fixed.get(bucket)
        if fixed is None:
            if bucket.num_tokens > bucket.num_rows:
                self._prompt_attention(plan, shape, layout)  # `prefers_captured` wants to know
            assert self._limits is not None, "buckets() comes first"
            fixed = self._fixed[bucket] = FixedPlan(
                bucket,
                self._limits.max_kv_len,
                shape,
                layout,
                device=self.torch_device,
                cores=self._cores,
                tuning=self.tuning,
                pages=self._pages,
                share=bucket.num_rows >= _FEWEST_SHARING,
            )
        return fixed.update(plan)

    def _prompt_attention(self, plan: StepPlan, shape: AttentionShape, layout: KVLayout) -> PromptAttention | None:
        """Made for the first step with prompts, which is the largest there will be."""
        if shape not in self._prompts:
            made = prompt_attention(shape, layout, self.torch_device, self.pipeline_depth)
            largest = StepLimits(len(plan.slots), plan.num_tokens, max(plan.kv_lens))
            compile_attention(shape, layout, largest, cores=self._cores, tuning=self.tuning, states=made is not None)
            self._prompts[shape] = made
        return self._prompts[shape]

    def buckets(self, limits: StepLimits) -> Sequence[Bucket]:
        self._limits = limits
        decodes = [Bucket(rows, rows) for rows in graph_sizes(limits.max_rows, limits.decode_sizes)]
        if limits.decode_sizes is not None and not decodes:
            return []  # no graphs are wanted
        most = min(limits.max_tokens, self.defaults.mixed_tokens or limits.max_tokens)
        return [Bucket(*sizes) for sizes in mixed_sizes(limits.max_rows, most)] + decodes

    def prefers_captured(self, plan: StepPlan) -> bool:
        """Not where FlashInfer's attention, which graphs lack, saves more than starting launch by launch costs."""
        if plan.is_decode or not any(self._prompts.values()):
            return True
        prompts = [
            (query_len, kv_len)
            for query_len, kv_len in zip(plan.query_lens, plan.kv_lens, strict=True)
            if query_len > 1
        ]
        pairs = sum(query_len * kv_len for query_len, kv_len in prompts)
        return pairs < _LONG_PROMPTS or sum(query_len for query_len, _ in prompts) < _MANY_TOKENS

    def capture(self, forward: Forward, example: StepInput, bucket: Bucket) -> Forward:
        """One graph for rows that each read their own keys; from a few rows on, one more for those that share some."""
        fixed = self._fixed[bucket]
        alone = self._recorder.record(forward, replace(example, attention=fixed.alone))
        if bucket.num_rows < _FEWEST_SHARING:
            return alone
        together = self._recorder.record(forward, replace(example, attention=fixed.together))
        return lambda step: (together if step.attention is fixed.together else alone)(step)


def _tuning(capability: tuple[int, int]) -> Tuning:
    """Measured on H200, TFLOP/s of 8,000-token prompts: tiles of 128 queries give 291, of 256 give 400."""
    return Tuning(prefill_queries=256) if capability[0] == 9 else Tuning()


def _fields(plan: TritonAttentionPlan) -> dict[str, Any]:
    return {field.name: getattr(plan, field.name) for field in fields(plan)}
