"""Filters: which tokens may be drawn. Each sets what it removes from float32 logits [vocabulary] to -inf, in place.

The same rules as those of the torch engine (`tgi_model_server.sampling.filters`), which tests compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Row: TypeAlias = npt.NDArray[np.float32]
Logits: TypeAlias = npt.NDArray[np.float32]
"""[rows, vocabulary]"""

_CANDIDATES = 256
_BLOCK = 256


def top_k(logits: Row, k: int) -> None:
    """Keep the k largest; ties with the last one stay."""
    if k < len(logits):
        logits[logits < np.partition(logits, -k)[-k]] = -np.inf


def top_p(logits: Row, p: float) -> None:
    """Holtzman et al. 2020 (nucleus): keep the most likely that together reach `p`; ties with the last one stay."""
    logits[logits < _last_needed(logits, softmax(logits), p)] = -np.inf


def min_p(logits: Row, p: float) -> None:
    """Keep tokens at least `p` times as likely as the most likely one."""
    logits[logits < logits.max() + np.log(np.float32(p))] = -np.inf


def typical_p(logits: Row, mass: float) -> None:
    """Meister et al. 2022 (locally typical): keep the tokens whose information is nearest the entropy, up to `mass`."""
    scores = log_softmax(logits)
    probabilities = np.exp(scores)
    with np.errstate(invalid="ignore"):  # 0 times -inf
        entropy = -np.nansum(scores * probabilities, dtype=np.float32)
    nearness = -np.abs(scores + entropy)
    logits[nearness < _last_needed(nearness, probabilities, mass)] = -np.inf


def most_likely(logits: Row, wanted: int, whole: float) -> tuple[tuple[int, float], ...]:
    """Up to `wanted` tokens with their log-probabilities, most likely first; `whole` is of `log_sums`."""
    wanted = min(wanted, len(logits))
    top = np.argpartition(-logits, wanted - 1)[:wanted]
    top = top[np.argsort(-logits[top], kind="stable")]
    return tuple(zip(top.tolist(), (logits[top] - np.float32(whole)).tolist(), strict=True))


def draw(logits: Row, uniform: float) -> int:
    """The inverse of the distribution function at `uniform`, tokens in order of their ids.

    First the block of tokens, then the token in it: a running sum in float64 over a whole vocabulary is slow.
    """
    probabilities = softmax(logits)
    blocks = np.pad(probabilities, (0, -len(logits) % _BLOCK)).reshape(-1, _BLOCK)
    sums = blocks.sum(1).cumsum(dtype=np.float64)
    target = uniform * sums[-1]
    # Only a row of NaN gets past the end.
    block = min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)
    within = blocks[block].cumsum(dtype=np.float64)
    # Rounding must not carry the target past the block's last possible token.
    target = min(target - (sums[block - 1] if block else 0.0), within[-1] * (1 - 2.0**-40))
    token = block * _BLOCK + int(np.searchsorted(within, target, side="right"))
    return min(token, len(logits) - 1)


def softmax(logits: Row) -> Row:
    shifted: Row = np.exp(logits - logits.max())
    shifted /= shifted.sum()
    return shifted


def log_softmax(logits: Row) -> Row:
    (whole,) = log_sums(logits[None], [logits.max().item()])
    return logits - np.float32(whole)


def log_sums(logits: Logits, highest: Sequence[float]) -> list[float]:
    """Of each row of float32 logits [rows, vocabulary]: the logarithm of the sum of exponentials, by its `highest`.

    Few calls into NumPy: after a step nothing of it is in the processor's caches, and each costs more than the
    arithmetic.
    """
    shifted = np.subtract(logits, np.array(highest, np.float32)[:, None])
    np.exp(shifted, shifted)
    sums: list[float] = np.add.reduce(shifted, 1).tolist()
    return [most + log(one) for most, one in zip(highest, sums, strict=True)]


def _last_needed(score: Row, probabilities: Row, mass: float) -> np.float32:
    """The score at which the tokens, highest score first, reach `mass` together.

    Sorting a vocabulary is slow, and a few hundred tokens mostly suffice.
    """
    if len(score) >= 4 * _CANDIDATES:
        best = np.argpartition(score, -_CANDIDATES)[-_CANDIDATES:]
        best = best[np.argsort(-score[best], kind="stable")]
        reached = probabilities[best].cumsum(dtype=np.float64)
        if reached[-1] >= mass:
            return np.float32(score[best[int(np.searchsorted(reached, mass))]])
    order = np.argsort(-score, kind="stable")
    reached = probabilities[order].cumsum(dtype=np.float64)
    return np.float32(score[order[min(int(np.searchsorted(reached, mass)), len(order) - 1)]])
