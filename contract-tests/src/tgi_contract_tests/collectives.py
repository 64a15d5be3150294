"""What a device's ranks exchange, at each world size: part of DeviceContract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest

from tgi_contract_tests.known import KnownFailures
from tgi_contract_tests.ranks import CHECKS, Report, run
from tgi_contract_tests.rules import broken_device
from tgi_model_server.device import Device

_reports: dict[tuple[type, int], Report] = {}
"""Ranks are started once for each class and world size: that takes seconds."""


class Collectives(KnownFailures):
    """The class under test says how many ranks; each is a process that makes its own device, as with --num-shard."""

    dtypes: ClassVar[tuple[str, ...]]
    tolerances: ClassVar[Mapping[str, float]]
    world_sizes: ClassVar[tuple[int, ...]] = (1, 2)
    """1 shows that `collective_backend` works at all; a size for which `join` finds too few chips is skipped."""
    ranks_patience_s: ClassVar[float] = 180.0
    """How long all ranks together may take, start-up included."""

    def make_device(self) -> Device:
        raise NotImplementedError("override make_device")

    def rank_device(self) -> Callable[[], Device]:
        """What makes the device of a rank: importable by its name, as `TorchBackend` needs it. The device's class."""
        return type(self.make_device())

    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_ranks_exchange(self, world_size: int, check: str) -> None:
        if world_size not in self.world_sizes:
            pytest.skip(f"not among the class's `world_sizes`: {world_size}")
        key = (type(self), world_size)
        if key not in _reports:
            tolerances = {dtype: self.tolerances[dtype] for dtype in self.dtypes}
            _reports[key] = run(self.rank_device(), world_size, tolerances, self.ranks_patience_s)
        report = _reports[key]
        if report.unavailable:
            pytest.skip(f"too few chips here for {world_size} ranks: {report.unavailable}")
        assert report.problems is not None
        problem = report.problems.get(check) or report.problems.get("all")
        if problem is not None:
            broken_device("collectives", f"`{check}` of {world_size} ranks: {problem}")
