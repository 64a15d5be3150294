"""When a process that ended is started again."""

from __future__ import annotations

from tgi_gateway.launcher.restarts import ENDS, FAILED_STARTS, LONGEST_S, SETTLED_S, Restarts


def test_the_first_end_is_mended_at_once_and_later_ones_ever_later() -> None:
    restarts = Restarts()
    delays = [restarts.delay_s(1.0) for _ in range(10)]
    assert delays[:5] == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == LONGEST_S
    assert restarts.total == 10


def test_who_has_served_for_long_begins_anew() -> None:
    restarts = Restarts()
    for _ in range(5):
        restarts.delay_s(1.0)
    assert restarts.delay_s(SETTLED_S) == 0.0
    assert restarts.total == 6


def test_who_never_comes_up_is_given_up_soon_and_who_never_stays_up_late() -> None:
    restarts = Restarts()
    assert [restarts.delay_s(None) is None for _ in range(FAILED_STARTS)] == [False] * (FAILED_STARTS - 1) + [True]
    restarts = Restarts()
    assert [restarts.delay_s(1.0) is None for _ in range(ENDS)] == [False] * (ENDS - 1) + [True]


def test_a_start_that_failed_is_forgiven_by_one_that_did_not() -> None:
    restarts = Restarts()
    for _ in range(4):
        assert restarts.delay_s(None) is not None
        assert restarts.delay_s(2.0) is not None
