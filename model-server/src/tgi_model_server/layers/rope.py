"""Rotary position embedding (Su et al. 2021): the frequencies of each scaling kind, and their cosines and sines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from tgi_gateway.errors import ModelError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Parameters of all kinds; each kind reads its own."""

    rotary_dim: int
    theta: float
    original_positions: int
    """Positions that the model was trained on before scaling."""
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cosines and sines (yarn)."""
    truncate: bool = True
    """yarn: round the correction range to whole dimensions."""

    def extended_positions(self, max_positions: int) -> int:
        """How far the scaling carries a model whose configuration says `max_positions`."""
        if self.kind in ("linear", "dynamic", "yarn"):
            return max(max_positions, int(self.original_positions * self.factor))
        return max_positions


def parse_rope(
    raw: Mapping[str, Any],
    where: str,
    *,
    head_dim: int,
    max_positions: int,
    override_kind: str | None = None,
    override_factor: float | None = None,
) -> RopeConfig:
    """Read `rope_scaling` or `rope_parameters` of config.json; the overrides replace them. Raises `ModelError`."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"{where}: rope_scaling is {scaling!r}; an object is needed.")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ModelError(f"{where}: rope parameters that differ between kinds of layers are not supported.")
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if override_kind is not None:
        if override_factor is None and override_kind != "default":
            raise ModelError(f"Rope scaling {override_kind!r} needs a factor: set --rope-factor.")
        scaling = {"rope_type": override_kind, "factor": override_factor}
    elif override_factor is not None:
        raise ModelError("--rope-factor needs --rope-scaling.")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in get_args(RopeKind):
        raise ModelError(f"{where}: rope type is {kind!r}; supported are {', '.join(get_args(RopeKind))}.")

    def number(key: str, default: float | None = None) -> float:
        value = scaling.get(key, default)
        if value is None:
            value = default
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ModelError(f"{where}: rope type {kind} needs the number {key}; got {value!r}.")
        return float(value)

    rotary_dim = int(head_dim * float(raw.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0))
    if kind == "default":
        return RopeConfig(rotary_dim, theta, max_positions)
    factor = number("factor")
    if factor < 1:
        raise ModelError(f"{where}: rope factor is {factor:g}; at least 1 is needed.")
    if kind == "llama3":
        if number("high_freq_factor") <= number("low_freq_factor"):
            raise ModelError(f"{where}: rope type llama3 needs high_freq_factor above low_freq_factor.")
        return RopeConfig(
            rotary_dim,
            theta,
            int(number("original_max_position_embeddings")),
            "llama3",
            factor,
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
        )
    if kind == "yarn":
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            implied = _yarn_mscale(factor, float(mscale)) / _yarn_mscale(factor, float(mscale_all_dim))
        else:
            implied = _yarn_mscale(factor, 1.0)
        return RopeConfig(
            rotary_dim,
            theta,
            int(number("original_max_position_embeddings", max_positions)),
            "yarn",
            factor,
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            attention_factor=number("attention_factor", implied),
            truncate=bool(scaling.get("truncate", True)),
        )
    return RopeConfig(rotary_dim, theta, max_positions, "linear" if kind == "linear" else "dynamic", factor)


def _yarn_mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def inverse_frequencies(config: RopeConfig) -> torch.Tensor:
    """float32 [rotary_dim / 2], radians per position. For `dynamic`, those up to `original_positions`."""
    dim = config.rotary_dim
    plain = 1.0 / config.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3(config, plain)
    if config.kind == "yarn":
        return _yarn(config, plain)
    return plain


def _llama3(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / plain
    turns = config.original_positions / wavelength
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / config.factor + blend * plain


def _yarn(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Peng et al. 2023 (YaRN), section 3.2: interpolate dimensions that turn seldom, keep those that turn often."""
    dim, last = config.rotary_dim, config.rotary_dim - 1

    def dimension_of(turns: float) -> float:
        return dim * math.log(config.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, last)
    if low == high:
        high += 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return plain / config.factor * interpolated + plain * (1 - interpolated)


class Rope:
    """Cosines and sines of positions ``0 .. max_positions - 1``, computed once.

    `dynamic` (NTK-aware) scaling depends on the length of the sequence. Here a position beyond the trained ones takes
    the frequencies of a sequence that ends with it, which is what generation token by token does; so a token's keys
    depend on its position only, and cached pages fit every sequence.
    """

    def __init__(self, config: RopeConfig, max_positions: int, device: torch.device) -> None:
        frequencies = inverse_frequencies(config)
        positions = torch.arange(max_positions, dtype=torch.float32)
        if config.kind == "dynamic":
            angles = positions[:, None] * _dynamic(config, positions)
        else:
            angles = positions[:, None] * frequencies
        self._cos = (angles.cos() * config.attention_factor).to(device)
        self._sin = (angles.sin() * config.attention_factor).to(device)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 or int64 [T] -> cos, sin, float32 [T, rotary_dim / 2]."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def _dynamic(config: RopeConfig, positions: torch.Tensor) -> torch.Tensor:
    """Inverse frequencies per position, float32 [positions, rotary_dim / 2]."""
    dim = config.rotary_dim
    length = (positions + 1).clamp(min=config.original_positions)
    stretch = config.factor * length / config.original_positions - (config.factor - 1)
    theta = config.theta * stretch ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / theta[:, None] ** exponents
