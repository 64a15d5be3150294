"""When those that are refused are told to come again."""

from __future__ import annotations

import pytest

from tgi_gateway.host.pace import LONGEST_S, UNKNOWN_S, WINDOW_S, Pace


def test_before_anything_ended_a_guess_is_told() -> None:
    assert Pace().retry_after_s(100.0, 50) == UNKNOWN_S


@pytest.mark.parametrize(("ahead", "seconds"), [(1, 1.0), (20, 10.0), (1000, LONGEST_S)])
def test_the_time_in_which_so_many_have_ended_lately(ahead: int, seconds: float) -> None:
    pace = Pace()
    for half_second in range(41):
        pace.ended(half_second / 2)
    assert pace.retry_after_s(20.0, ahead) == pytest.approx(seconds, rel=0.05)


def test_what_was_long_ago_is_forgotten() -> None:
    pace = Pace()
    pace.ended(0.0, 1000)
    pace.ended(WINDOW_S + 5.0)
    assert pace.retry_after_s(WINDOW_S + 15.0, 2) == pytest.approx(20.0)
    assert pace.retry_after_s(WINDOW_S * 3, 2) == UNKNOWN_S
