"""Sizing: what an engine computes in, how large its steps and sequences may be, how many pages its memory holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tgi_gateway.backend import EngineOptions
from tgi_gateway.errors import SettingsError
from tgi_model_server.device import AttentionShape, Device, StepLimits
from tgi_model_server.kv.pool import page_bytes
from tgi_model_server.models.config import ModelConfig
from tgi_model_server.parallel import Shard

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


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


def refuse_unsupported(options: EngineOptions) -> None:
    """Raises `SettingsError` for an option that would otherwise be ignored."""
    for flag, value in (
        ("--quantize", options.quantize),
        ("--kv-cache-dtype", options.kv_cache_dtype),
        ("--lora-adapters", options.lora_adapters),
        ("--speculate", options.speculate),
    ):
        if value:
            raise SettingsError(f"{flag} is {value!r}; this engine does not support it yet. Leave it out.")


def attention_shape(config: ModelConfig, shard: Shard, dtype: torch.dtype) -> AttentionShape:
    """A rank's part of the attention. Raises `SettingsError` where the model cannot be split among so many ranks."""
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
        kv_dtype=dtype,
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


def num_pages(
    device: Device, options: EngineOptions, config: ModelConfig, shape: AttentionShape, limits: StepLimits
) -> int:
    """Pages of the pool, page 0 included. Raises `SettingsError` where memory holds not even one full sequence."""
    layout = device.kv_layout(shape)
    each = page_bytes(config.num_layers, layout, shape)
    memory = device.memory()
    if options.max_batch_total_tokens is not None:
        pages = -(-options.max_batch_total_tokens // layout.page_size)
        if pages * each > memory.total:
            raise SettingsError(
                f"max_batch_total_tokens is {options.max_batch_total_tokens}, which needs {pages * each >> 20} MiB for "
                f"keys and values; {device.name} has {memory.total >> 20} MiB. Lower it."
            )
        return pages + 1
    usable = int(memory.free * options.memory_fraction) - _activation_bytes(config, shape, limits)
    per_sequence = -(-limits.max_kv_len // layout.page_size)
    pages = min(usable // each, limits.max_rows * per_sequence)
    if pages < per_sequence:
        raise SettingsError(
            f"A sequence of max_total_tokens {limits.max_kv_len} needs {per_sequence * each >> 20} MiB for keys and "
            f"values; {max(usable, 0) >> 20} MiB of {device.name} memory can be used. Lower --max-total-tokens."
        )
    return pages + 1


def _activation_bytes(config: ModelConfig, shape: AttentionShape, limits: StepLimits) -> int:
    """What the largest step holds beside weights and pages, rounded up."""
    attention = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    per_token = (6 * config.hidden_size + 3 * attention + 3 * config.intermediate_size) * shape.dtype.itemsize
    per_row = 6 * config.vocab_size * torch.float32.itemsize
    return limits.max_tokens * per_token + limits.max_rows * per_row
