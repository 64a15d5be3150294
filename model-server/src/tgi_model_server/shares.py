"""How prompts share a step: half of its budget goes to the oldest, the rest to whoever is nearest to a first token.

First come, first served alone would let one prompt of 100,000 tokens hold up every short one behind it; the shortest
first alone (SRPT, Schrage 1968) would never let it end. With half of each, a long prompt takes at most twice its time,
and a short one waits for other short ones only. Prompts of equal length are done in order of arrival.
"""

from __future__ import annotations

from collections.abc import Sequence


def prefill_shares(remaining: Sequence[int], budget: int) -> list[int]:
    """How many of its `remaining` tokens (at least 1) each prompt, oldest first, gets of `budget` tokens."""
    if not remaining or budget <= 0:
        return [0] * len(remaining)
    shares = [0] * len(remaining)
    shares[0] = min(remaining[0], -(-budget // 2))
    left = budget - shares[0]
    for place in sorted(range(len(remaining)), key=remaining.__getitem__):
        if not left:
            break
        more = min(remaining[place] - shares[place], left)
        shares[place] += more
        left -= more
    return shares
