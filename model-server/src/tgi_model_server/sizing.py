"""Sizing: what an engine computes in, how large its steps and sequences may be, how many pages its memory holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import SettingsError
from tgi_model_server.device import AttentionShape, Device, MemoryFigures, StepLimits
from tgi_model_server.kv.pool import page_bytes
from tgi_model_server.models.config import ModelConfig
from tgi_model_server.parallel import Shard

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
KV_DTYPES: Mapping[str, torch.dtype] = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_SPARE = 0.01
"""Part of a device's memory that stays free where the largest steps were measured: for graphs, and for what the driver
takes when it likes."""


def step_limits(device: Device, options: EngineOptions, config: ModelConfig) -> StepLimits:
    """The largest step: what the options say, else what suits the device and the model. Raises `SettingsError`."""
    max_kv_len = options.max_total_tokens or config.max_positions
    if max_kv_len > config.max_positions:
        raise SettingsError(
            f"max_total_tokens is {max_kv_len}; this model allows {config.max_positions}. "
            "Lower it or extend the model with --rope-scaling and --rope-factor."
        )
    max_rows = options.max_batch_size or device.defaults.max_rows
    prefill = options.max_batch_prefill_tokens or min(device.defaults.prefill_tokens, max_kv_len)
    return StepLimits(
        max_rows=max_rows, max_tokens=prefill + max_rows, max_kv_len=max_kv_len, decode_sizes=options.cuda_graphs
    )


def attention_shape(
    config: ModelConfig, shard: Shard, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> AttentionShape:
    """A rank's part of the attention; keys and values are kept in `dtype` unless `kv_dtype` says otherwise.

    Raises `SettingsError` where the model cannot be split among so many ranks.
    """
    if not _can_split(config, shard.world_size):
        allowed = [count for count in range(1, config.num_heads + 1) if _can_split(config, count)]
        raise SettingsError(
            f"--num-shard is {shard.world_size}; this model has {config.num_heads} attention heads, "
            f"{config.num_kv_heads} key-value heads and {config.intermediate_size} intermediate columns, which can be "
            f"split among {', '.join(map(str, allowed))}. Choose one of these."
        )
    return AttentionShape(
        num_heads=config.num_heads // shard.world_size,
        # Where there are fewer than ranks, neighbouring ranks hold the same one.
        num_kv_heads=max(config.num_kv_heads // shard.world_size, 1),
        head_dim=config.head_dim,
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
    )


def _can_split(config: ModelConfig, ranks: int) -> bool:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    evenly = heads % ranks == 0 and config.intermediate_size % ranks == 0
    return evenly and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def compute_dtype(device: Device, options: EngineOptions, config: ModelConfig) -> torch.dtype:
    """What weights, activations and KV are kept in. Raises `SettingsError`."""
    if options.dtype is None:
        return device.default_dtype(DTYPES.get(config.checkpoint_dtype, torch.float32), config.num_parameters)
    if options.dtype not in DTYPES:
        raise SettingsError(f"--dtype is {options.dtype!r}; allowed are {', '.join(DTYPES)}.")
    return DTYPES[options.dtype]


def kept_dtype(device: Device, options: EngineOptions, dtype: torch.dtype) -> torch.dtype:
    """What keys and values are kept in where the model computes in `dtype`. Raises `SettingsError`."""
    name = options.kv_cache_dtype
    if name is None or name == "auto":
        return dtype
    known = {each: KV_DTYPES[each] for each in KV_DTYPES if KV_DTYPES[each] in device.kv_dtypes}
    if name not in known:
        raise SettingsError(
            f"--kv-cache-dtype is {name!r}; {device.name} can keep keys and values in {', '.join(('auto', *known))}."
        )
    return known[name]


def num_pages(
    device: Device,
    options: EngineOptions,
    config: ModelConfig,
    shape: AttentionShape,
    limits: StepLimits,
    largest_steps: Callable[[StepLimits, bool], None],
) -> int:
    """Pages of the pool, page 0 included: what remains once weights and the largest steps have their memory.

    `largest_steps` runs those within some limits, for the device to measure them, plain ones if the second argument
    says so. Raises `SettingsError` for options that memory cannot satisfy.
    """
    layout = device.kv_layout(shape)
    each = page_bytes(config.num_layers, layout, shape)
    measured = device.peak(lambda: largest_steps(limits, False))
    if measured is not None and (buckets := device.buckets(limits)):
        # Captured steps keep what they need to themselves; all of them share it.
        rows = min(max(bucket.num_rows for bucket in buckets), limits.max_rows)
        captured = replace(limits, max_rows=rows, max_tokens=max(bucket.num_tokens for bucket in buckets))
        measured += device.peak(lambda: largest_steps(captured, True)) or 0
    steps = _activation_bytes(config, shape, limits) if measured is None else measured
    memory = device.memory()
    allowed = int(memory.total * options.memory_fraction)
    usable = max(min(memory.free, allowed - memory.used) - steps, 0)
    if measured is not None:
        usable = max(usable - int(memory.total * _SPARE), 0)
    if options.max_batch_total_tokens is not None:
        pages = -(-options.max_batch_total_tokens // layout.page_size)
        # What is free now is no limit where it is only a share of what could be.
        if (pages + 1) * each > (memory.total if measured is None else usable):
            raise SettingsError(
                f"max_batch_total_tokens is {options.max_batch_total_tokens}, which needs {pages * each >> 20} MiB for "
                f"keys and values; {_of(device, memory, usable, steps, options)}, enough for "
                f"{max(usable // each - 1, 0) * layout.page_size} tokens. Lower it."
            )
        return pages + 1
    per_sequence = -(-limits.max_kv_len // layout.page_size)
    pages = min(usable // each - 1, limits.max_rows * per_sequence)
    if pages < (1 if options.max_total_tokens is None else per_sequence):
        needs = f"A sequence of max_total_tokens {limits.max_kv_len} needs {per_sequence * each >> 20} MiB"
        raise SettingsError(
            f"{needs} for keys and values; {_of(device, memory, usable, steps, options)}. Lower --max-total-tokens, "
            "--max-batch-prefill-tokens or --max-batch-size."
        )
    return pages + 1


def _of(device: Device, memory: MemoryFigures, usable: int, steps: int, options: EngineOptions) -> str:
    share = "" if options.memory_fraction == 1.0 else f", {options.memory_fraction:g} of it allowed"
    return (
        f"of {memory.total >> 20} MiB of {device.name} memory{share}, {usable >> 20} MiB remain beside the weights and "
        f"{steps >> 20} MiB for the largest step"
    )


def _activation_bytes(config: ModelConfig, shape: AttentionShape, limits: StepLimits) -> int:
    """What the largest step holds beside weights and pages, rounded up."""
    attention = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    per_token = (6 * config.hidden_size + 3 * attention + 3 * config.intermediate_size) * shape.dtype.itemsize
    per_row = 6 * config.vocab_size * torch.float32.itemsize
    return limits.max_tokens * per_token + limits.max_rows * per_row
