"""A safetensors model of the Llama family as one GGUF file.

Names and layout are those of llama.cpp's own converter: halves of rotary heads interleaved for `llama`, norms and
biases in float32. Types that need more than rounding (the k-quants) are made by llama.cpp from a float file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_backend_llamacpp.safetensors_file import Entry, open_model
from tgi_backend_llamacpp.vocabulary_entries import add_vocabulary
from tgi_gateway.errors import ModelError

Array = npt.NDArray[np.float32]

PLAIN_TYPES = ("f32", "f16", "bf16", "q8_0")
"""Written here. File type numbers (LLAMA_FTYPE_*) are in `FILE_TYPES`."""
FILE_TYPES: Mapping[str, int] = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11,
    "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25,
    "iq4_xs": 30,
}  # fmt: skip
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_NEEDED = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
_SKIPPED = ("rotary_emb.inv_freq",)


def convert(source: Path, target: Path, kind: str | None = None) -> None:
    """Write the model in folder `source` to `target`, its weights as `kind` (q8_0 if None). Raises `ModelError`."""
    kind = (kind or "q8_0").lower()
    if kind not in FILE_TYPES:
        raise ModelError(f"there is no GGUF type `{kind}`; allowed: {', '.join(FILE_TYPES)}")
    if kind in PLAIN_TYPES:
        _write(source, target, kind)
        return
    from tgi_backend_llamacpp.native import quantize
    from tgi_model_server import machine

    floats = target.with_name(f"{target.name}.{os.getpid()}.f32")
    try:
        _write(source, floats, "f32")
        quantize(floats, target, FILE_TYPES[kind], machine.usable_cores())
    finally:
        floats.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the file to be: read and changed only when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Array]


def _write(source: Path, target: Path, kind: str) -> None:
    import gguf

    config = _read_config(source)
    tensors = list(_tensors(config, open_model(source)))
    writer = gguf.GGUFWriter(target, _ARCHITECTURES[config["model_type"]])
    try:
        _add_metadata(writer, source, config, kind)
        vocab_size = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
        add_vocabulary(writer, source, vocab_size)
        types = [_type_of(tensor, kind, gguf) for tensor in tensors]
        for tensor, chosen in zip(tensors, types, strict=True):
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, chosen) if chosen.value > 1 else tensor.shape
            code = {0: np.float32, 1: np.float16}.get(chosen.value, np.uint8)
            size = math.prod(shape) * np.dtype(code).itemsize
            writer.add_tensor_info(tensor.name, shape, np.dtype(code), size, raw_dtype=chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, chosen in zip(tensors, types, strict=True):
            writer.write_tensor_data(gguf.quants.quantize(tensor.make(), chosen))
    finally:
        writer.close()


def _type_of(tensor: _Tensor, kind: str, gguf: Any) -> Any:
    """Vectors stay float32, as do rows that no block fits into: those become f16."""
    types = gguf.GGMLQuantizationType
    if len(tensor.shape) == 1 or kind == "f32":
        return types.F32
    if kind == "q8_0" and tensor.shape[-1] % 32:
        return types.F16
    return types[kind.upper()]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from error
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ModelError(
            f"{folder}: models of the type `{kind}` cannot be converted here, only {', '.join(_ARCHITECTURES)}. Name a "
            "GGUF file instead"
        )
    missing = [name for name in _NEEDED if not isinstance(config.get(name), int)]
    if missing:
        raise ModelError(f"{folder / 'config.json'} has no {', no '.join(missing)}")
    return config


def _add_metadata(writer: Any, source: Path, config: Mapping[str, Any], kind: str) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name(source.resolve().name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(2)
    writer.add_context_length(config.get("max_position_embeddings", 2048))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count(head_dim)
    scaling = _rope_scaling(config)
    writer.add_rope_freq_base(float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0))
    match scaling.get("rope_type") or scaling.get("type"):
        case None | "default" | "llama3":  # llama3: see `_frequency_factors`
            pass
        case "linear":
            import gguf

            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(scaling["factor"]))
        case other:
            raise ModelError(f"{source}: rope scaling of the type `{other}` cannot be converted")
    if config.get("sliding_window") and config.get("use_sliding_window", True) and config["model_type"] == "mistral":
        raise ModelError(f"{source}: attention within a sliding window cannot be converted for this architecture")


def _rope_scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return scaling if isinstance(scaling, dict) else {}


def _tensors(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> Iterator[_Tensor]:
    """Every tensor under its new name. Raises `ModelError` for one that has none."""
    interleaves = _ARCHITECTURES[config["model_type"]] == "llama"
    heads = config["num_attention_heads"]
    turned = {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads} if interleaves else {}
    for name, entry in sorted(entries.items(), key=lambda item: _order(item[0])):
        if name.endswith(_SKIPPED) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        stem, _, suffix = name.rpartition(".")
        layer, part = _place(stem)
        new = _WHOLE.get(stem) if layer is None else _PARTS.get(part)
        if new is None or suffix not in ("weight", "bias"):
            raise ModelError(f"{entry.path}: tensor {name} has no place in a GGUF file of this architecture")
        groups = turned.get(new)
        full = f"{new}.{suffix}" if layer is None else f"blk.{layer}.{new}.{suffix}"
        yield _Tensor(full, entry.shape, entry.read if groups is None else _turned(entry, groups))
    factors = _frequency_factors(config)
    if factors is not None:
        yield _Tensor("rope_freqs.weight", factors.shape, lambda: factors)


def _place(stem: str) -> tuple[int | None, str]:
    """Layer and part of ``model.layers.3.mlp.up_proj``."""
    pieces = stem.split(".", 3)
    if len(pieces) == 4 and pieces[:2] == ["model", "layers"] and pieces[2].isdigit():
        return int(pieces[2]), pieces[3]
    return None, stem


def _order(name: str) -> tuple[int, str]:
    layer, _ = _place(name)
    return (-1 if layer is None else layer, name)


def _turned(entry: Entry, heads: int) -> Callable[[], Array]:
    """llama.cpp turns neighbouring elements of a head, the checkpoint's model those of its two halves."""

    def make() -> Array:
        rows = entry.read()
        return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)

    return make


def _frequency_factors(config: Mapping[str, Any]) -> Array | None:
    """What each rotary frequency is divided by under Llama 3's scaling; None: nothing."""
    scaling = _rope_scaling(config)
    if (scaling.get("rope_type") or scaling.get("type")) != "llama3":
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    wavelength = 2 * math.pi * base ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    factor, low, high = (float(scaling[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(scaling["original_max_position_embeddings"])
    smooth = (trained / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelength < trained / high, 1.0, np.where(wavelength > trained / low, factor, between))
    return factors.astype(np.float32)
