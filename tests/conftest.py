"""Servers that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Server, run_server

from tgi_gateway.testing.worker import write_byte_model


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of bytes, for the echo engine."""
    folder = tmp_path_factory.mktemp("byte-model")
    write_byte_model(folder)
    return folder


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The CPU engine with the bundled demo model."""
    with run_server(
        tmp_path_factory.mktemp("demo-server"), "--backend", "cpu", "--max-concurrent-requests", "256"
    ) as it:
        yield it
