"""ModelConfig: config.json read once, checked, and made explicit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgi_gateway.errors import ModelError
from tgi_model_server.layers.rope import RopeConfig, parse_rope

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # What transformers assumes where config.json is silent. A key absent here is required.
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": None,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": None},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
SUPPORTED = tuple(_DEFAULTS)
_ANY = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family. Sizes are the whole model's, before any sharding."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_positions: int
    """Longest sequence, after rope scaling."""
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    """Per layer: how many tokens a token sees, itself included; None: all before it."""
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: str
    """As named in config.json, ``float32`` where it is silent."""

    @property
    def num_parameters(self) -> int:
        """Norms and biases left out."""
        vocabularies = 1 if self.tie_word_embeddings else 2
        return self.num_layers * self._layer_parameters + vocabularies * self.vocab_size * self.hidden_size

    @property
    def even_context(self) -> int | None:
        """Context at which a token's attention takes as many operations as its products with the layers' weights.

        2 for each weight; 4 for each channel of each head and token before it, in layers that see all. None: none does.
        """
        unbounded = self.sliding_windows.count(None)
        attention = 2 * unbounded * self.num_heads * self.head_dim
        return self.num_layers * self._layer_parameters // attention if unbounded else None

    @property
    def _layer_parameters(self) -> int:
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (attention + 3 * self.intermediate_size)


def load_config(folder: Path, *, rope_scaling: str | None = None, rope_factor: float | None = None) -> ModelConfig:
    """Read `folder`/config.json; `rope_scaling` and `rope_factor` replace what it says. Raises `ModelError`."""
    path = folder / "config.json"
    raw = read_json(path)
    if raw is None:
        raise ModelError(f"{path} is missing. A model folder holds config.json, tokenizer.json and *.safetensors.")
    return parse_config(raw, str(path), rope_scaling=rope_scaling, rope_factor=rope_factor)


def parse_config(
    raw: Mapping[str, Any], where: str, *, rope_scaling: str | None = None, rope_factor: float | None = None
) -> ModelConfig:
    """Check `raw`, the content of the file `where`. Raises `ModelError` naming the key that is wrong."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise ModelError(f"{where}: model_type is {model_type!r}; supported are {', '.join(SUPPORTED)}.")
    if raw.get("quantization_config") or raw.get("compression_config"):
        raise ModelError(f"{where}: quantization_config is set; this engine cannot read quantized checkpoints.")
    read = _Reader({**_ANY, **_DEFAULTS[model_type], **raw}, where)
    if read.values["hidden_act"] != "silu":
        raise ModelError(
            f"{where}: hidden_act is {read.values['hidden_act']!r}; {model_type} is supported with 'silu'."
        )

    hidden_size, num_heads = read.size("hidden_size"), read.size("num_attention_heads")
    num_kv_heads = read.size("num_key_value_heads", if_null=num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"{where}: {num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly.")
    if read.values["head_dim"] is None and hidden_size % num_heads:
        raise ModelError(f"{where}: hidden_size {hidden_size} is not divisible by {num_heads} attention heads.")
    num_layers = read.size("num_hidden_layers")
    head_dim = read.size("head_dim", if_null=hidden_size // num_heads)
    max_positions = read.size("max_position_embeddings")
    rope = parse_rope(
        raw,
        where,
        head_dim=head_dim,
        max_positions=max_positions,
        override_kind=rope_scaling,
        override_factor=rope_factor,
    )
    attention_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        model_type=model_type,
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps"),
        rope=rope,
        max_positions=rope.extended_positions(max_positions),
        tie_word_embeddings=bool(read.values["tie_word_embeddings"]),
        qkv_bias=model_type == "qwen2" or (model_type != "mistral" and attention_bias),
        o_bias=model_type in ("llama", "qwen3") and attention_bias,
        mlp_bias=model_type == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=model_type == "qwen3",
        sliding_windows=_sliding_windows(read, model_type, num_layers),
        eos_token_ids=token_ids(raw.get("eos_token_id"), f"{where}: eos_token_id"),
        checkpoint_dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "float32").removeprefix("torch."),
    )


def _sliding_windows(read: _Reader, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    values = read.values
    if model_type == "llama" or values.get("sliding_window") is None:
        return (None,) * num_layers
    if model_type != "mistral" and not values.get("use_sliding_window", False):
        return (None,) * num_layers
    window = read.size("sliding_window")
    if model_type == "mistral":
        return (window,) * num_layers
    kinds = values.get("layer_types")
    if kinds is None:
        first = int(values.get("max_window_layers", 28))
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"{read.where}: layer_types must name full_attention or sliding_attention for each of {num_layers} layers; "
            f"got {kinds!r}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


@dataclass(frozen=True, slots=True)
class _Reader:
    values: Mapping[str, Any]
    where: str

    def size(self, key: str, *, if_null: int | None = None) -> int:
        value = self._get(key, if_null)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self.where}: {key} is {value!r}; a whole number of at least 1 is needed.")
        return value

    def number(self, key: str) -> float:
        value = self._get(key, None)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ModelError(f"{self.where}: {key} is {value!r}; a number is needed.")
        return float(value)

    def _get(self, key: str, if_null: int | None) -> Any:
        if key not in self.values:
            raise ModelError(f"{self.where}: {key} is missing.")
        value = self.values[key]
        return if_null if value is None else value


def read_json(path: Path) -> Mapping[str, Any] | None:
    """The JSON object in `path`, or None if there is no such file. Raises `ModelError` where it is not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object is needed, got {type(content).__name__}.")
    return content


def token_ids(value: object, what: str) -> tuple[int, ...]:
    """An id, a list of ids or nothing, as config files write them."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise ModelError(f"{what} is {value!r}; a token id or a list of them is needed.")
    return tuple(items)


def find_eos(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json, else config.json, else the tokenizer's. May be empty."""
    path = folder / "generation_config.json"
    generation = read_json(path) or {}
    ids = token_ids(generation.get("eos_token_id"), f"{path}: eos_token_id") or config.eos_token_ids
    if ids:
        return ids
    tokenizer_config = read_json(folder / "tokenizer_config.json") or {}
    token = tokenizer_config.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    for added in (read_json(folder / "tokenizer.json") or {}).get("added_tokens", []):
        if text is not None and added.get("content") == text:
            return (int(added["id"]),)
    return ()
