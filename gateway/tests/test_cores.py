"""How many cores there are, and what HTTP workers get of them."""

from __future__ import annotations

from pathlib import Path

from tgi_gateway.cores import cpu_quota, default_http_workers, logical_cores
from tgi_gateway.settings import Settings


def test_a_laptop_gets_one_http_worker_and_a_server_four() -> None:
    assert [default_http_workers(cores) for cores in (1, 2, 4, 8, 12, 16, 128)] == [1, 1, 1, 2, 3, 4, 4]


def test_the_control_groups_quota_counts_whole_cores(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert cpu_quota(tmp_path) == 2
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cpu_quota(tmp_path) == 1


def test_what_the_user_says_is_what_is_started() -> None:
    assert Settings(http_workers=7).resolved().http_workers == 7
    assert Settings().resolved().http_workers == default_http_workers(logical_cores())
