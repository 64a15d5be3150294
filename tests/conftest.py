"""Servers that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import Server, run_server


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The CPU engine with the bundled demo model."""
    with run_server(
        tmp_path_factory.mktemp("demo-server"), "--backend", "cpu", "--max-concurrent-requests", "256"
    ) as it:
        yield it
