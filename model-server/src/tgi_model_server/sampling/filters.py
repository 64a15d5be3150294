"""Filters: which tokens may be drawn. Each takes float32 logits [rows, vocabulary] and sets what it removes to -inf."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_REMOVED = float("-inf")
_CANDIDATES = 256
_BLOCK = 256


def top_k(logits: torch.Tensor, k: torch.Tensor, largest_k: int) -> torch.Tensor:
    """Keep the k largest, int64 [rows, 1], at least 1 and at most `largest_k`; ties with the last one stay."""
    best = logits.topk(min(largest_k, logits.shape[-1]), dim=-1).values
    smallest = best.gather(1, (k - 1).clamp(max=best.shape[-1] - 1))
    return logits.masked_fill(logits < smallest, _REMOVED)


def top_p(logits: torch.Tensor, p: torch.Tensor, *, peek: bool) -> torch.Tensor:
    """Holtzman et al. 2020 (nucleus): keep the most likely tokens that together reach `p`, float32 [rows, 1]; ties with
    the last one stay.
    """
    return logits.masked_fill(logits < _last_needed(logits, logits.softmax(-1), p, peek), _REMOVED)


def min_p(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Keep tokens at least `p` times as likely as the most likely one, float32 [rows, 1]."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + p.log(), _REMOVED)


def typical_p(logits: torch.Tensor, mass: torch.Tensor, *, peek: bool) -> torch.Tensor:
    """Meister et al. 2022 (locally typical): keep the tokens whose information is nearest the entropy, up to `mass`."""
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    entropy = -(log_probabilities * probabilities).nansum(-1, keepdim=True)
    nearness = -(log_probabilities + entropy).abs()
    return logits.masked_fill(nearness < _last_needed(nearness, probabilities, mass, peek), _REMOVED)


def _last_needed(score: torch.Tensor, probabilities: torch.Tensor, mass: torch.Tensor, peek: bool) -> torch.Tensor:
    """[rows, 1]: the score at which the tokens, highest score first, reach `mass` together.

    Sorting a vocabulary is slow, and a few hundred tokens mostly suffice; `peek` allows to look whether they do, which
    makes the host wait for the device. Each row goes its own way, so its result does not depend on the others.
    """
    if not peek or score.shape[-1] < 4 * _CANDIDATES:
        ordered, order = score.sort(dim=-1, descending=True, stable=True)
        return _at_mass(ordered, probabilities.gather(1, order), mass)[0]
    best = score.topk(_CANDIDATES, dim=-1)
    last, enough = _at_mass(best.values, probabilities.gather(1, best.indices), mass)
    rest = (~enough[:, 0]).nonzero()[:, 0]
    if len(rest):
        last[rest] = _last_needed(score[rest], probabilities[rest], mass[rest], peek=False)
    return last


def _at_mass(
    ordered: torch.Tensor, probabilities: torch.Tensor, mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of `ordered` at which the sum reaches `mass`, and whether it does, each [rows, 1]."""
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    last = (reached < mass).sum(-1, keepdim=True).clamp(max=ordered.shape[-1] - 1)
    return ordered.gather(1, last), reached[:, -1:] >= mass


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: the inverse of the distribution function, tokens in order of their ids, at float64 [rows, 1].

    First the block of tokens, then the token in it: a running sum in float64 over a whole vocabulary is slow.
    """
    rows, vocabulary = logits.shape
    blocks = F.pad(logits.softmax(-1), (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = uniform * sums[:, -1:]
    # Only a row of NaN gets past the end.
    block = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[-1] - 1)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    # Rounding must not carry the target past the block's last possible token.
    target = torch.minimum(target - F.pad(sums, (1, 0)).gather(1, block), within[:, -1:] * (1 - 2.0**-40))
    token = torch.searchsorted(within, target, right=True)
    return (block * _BLOCK + token)[:, 0].clamp(max=vocabulary - 1)
