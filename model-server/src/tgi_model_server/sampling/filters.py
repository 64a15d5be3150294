"""Filters: which tokens may be drawn. Each takes float32 logits [rows, vocabulary] and sets what it removes to -inf."""

from __future__ import annotations

import torch

_REMOVED = float("-inf")


def top_k(logits: torch.Tensor, k: torch.Tensor, largest_k: int) -> torch.Tensor:
    """Keep the k largest, int64 [rows, 1], at least 1 and at most `largest_k`; ties with the last one stay."""
    best = logits.topk(min(largest_k, logits.shape[-1]), dim=-1).values
    smallest = best.gather(1, (k - 1).clamp(max=best.shape[-1] - 1))
    return logits.masked_fill(logits < smallest, _REMOVED)


def top_p(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Holtzman et al. 2020 (nucleus): keep the most likely tokens that together reach `p`, float32 [rows, 1]."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1, dtype=torch.float64) - probabilities
    removed = before >= p
    removed[:, 0] = False
    return logits.scatter(1, order, ordered.masked_fill(removed, _REMOVED))


def min_p(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Keep tokens at least `p` times as likely as the most likely one, float32 [rows, 1]."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + p.log(), _REMOVED)


def typical_p(logits: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Meister et al. 2022 (locally typical): keep the tokens whose information is nearest the entropy, up to `mass`."""
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    entropy = -(log_probabilities * probabilities).nansum(-1, keepdim=True)
    distance = (log_probabilities + entropy).abs()
    ordered, order = distance.sort(dim=-1, stable=True)
    reached = probabilities.gather(1, order).cumsum(-1, dtype=torch.float64)
    last = (reached < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > ordered.gather(1, last), _REMOVED)


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: the inverse of the distribution function, tokens in order of their ids, at float64 [rows, 1]."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    # Only a row of NaN gets past the end.
    return chosen[:, 0].clamp(max=logits.shape[-1] - 1)
