"""The class that `tgi-contract NAME --device MODULE:CLASS` runs besides; `cli` sets its attribute first."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from tgi_contract_tests.device import DeviceContract
from tgi_model_server.device import Device
from tgi_model_server.rank_task import device_of


class TestInstalledDevice(DeviceContract):
    """The contract over the device that the command line named."""

    device_name: ClassVar[str]

    def make_device(self) -> Device:
        return device_of(self.device_name)

    def rank_device(self) -> Callable[[], Device]:
        return type(self.make_device())
