"""The oracle's devices keep the device contract: the eager one in both KV layouts, and one of static shapes."""

from __future__ import annotations

from tgi_contract_tests.device import DeviceContract
from tgi_model_server.device import Device, KVLayout
from tgi_model_server.testing.devices import ReferenceDevice, StaticDevice


class TestReferenceDevice(DeviceContract):
    longest = 150
    dtypes = ("float32", "bfloat16")

    def make_device(self) -> Device:
        return ReferenceDevice(KVLayout(4, "HND"))


class TestStaticDevice(DeviceContract):
    longest = 150
    dtypes = ("float32", "float16")

    def make_device(self) -> Device:
        return StaticDevice(KVLayout(16, "NHD"))
