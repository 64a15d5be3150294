"""Random numbers by counting: the n-th draw of a seed is a pure function, whoever shares the batch."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15


def uniform(seed: int, index: int) -> float:
    """The `index`-th number of `seed`, in [0, 1): upper half of SplitMix64 (Steele et al. 2014) of a mixed seed."""
    return (_mix(_mix(seed + _STEP) + (index + 1) * _STEP) >> 32) * 2.0**-32


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
