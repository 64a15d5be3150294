"""The pytest plug-in of the contract: its marker, `known_failures`, and the end of engines that tests shared."""

from __future__ import annotations

import pytest

from tgi_contract_tests.base import close_all
from tgi_contract_tests.known import KnownFailures


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*features): runs only if the engine declares these capabilities")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Known failures become strict xfails. A name that no test has is an error: the list must not grow old."""
    for item in items:
        owner = getattr(item, "cls", None)
        if owner is None or not issubclass(owner, KnownFailures):
            continue
        unknown = sorted(name for name in owner.known_failures if not hasattr(owner, name.split("[")[0]))
        if unknown:
            raise pytest.UsageError(f"{owner.__name__}.known_failures names tests that do not exist: {unknown}")
        for name in {item.name, getattr(item, "originalname", item.name)} & owner.known_failures.keys():
            item.add_marker(pytest.mark.xfail(reason=owner.known_failures[name], strict=True))


def pytest_sessionfinish() -> None:
    close_all()
