"""How prompts share the budget of a step."""

from __future__ import annotations

import random

import pytest

from tgi_model_server.shares import prefill_shares


@pytest.mark.parametrize(
    ("remaining", "budget", "shares"),
    [
        ([], 16, []),
        ([5], 16, [5]),
        ([50], 16, [16]),
        ([5, 6], 16, [5, 6]),
        ([100_000, 20], 2048, [2028, 20]),
        ([100_000, 3000], 2048, [1024, 1024]),
        ([100, 100, 100], 64, [64, 0, 0]),
        ([36, 100, 100], 64, [36, 28, 0]),
        ([100, 7, 5, 9], 15, [8, 2, 5, 0]),
        ([4, 4], 0, [0, 0]),
        ([4, 4], -3, [0, 0]),
        ([4, 1], 1, [1, 0]),
    ],
)
def test_half_goes_to_the_oldest_and_the_rest_to_the_nearest(
    remaining: list[int], budget: int, shares: list[int]
) -> None:
    assert prefill_shares(remaining, budget) == shares


def test_the_whole_budget_is_used_and_nobody_gets_more_than_is_left() -> None:
    dice = random.Random(3)
    for _ in range(500):
        remaining = [dice.randint(1, 200) for _ in range(dice.randint(1, 12))]
        budget = dice.randint(0, 300)
        shares = prefill_shares(remaining, budget)
        assert sum(shares) == min(budget, sum(remaining))
        assert all(0 <= share <= left for share, left in zip(shares, remaining, strict=True))
        assert shares[0] >= min(remaining[0], budget // 2)
