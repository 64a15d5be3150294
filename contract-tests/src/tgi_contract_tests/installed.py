"""The class that `tgi-contract NAME` runs; `cli` sets its attributes first."""

from __future__ import annotations

from tgi_contract_tests.contract import BackendContract


class TestInstalled(BackendContract):
    """The contract over the plug-in that the command line named."""
