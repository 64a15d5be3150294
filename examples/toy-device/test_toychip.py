from tgi_backend_toychip.device import ToyDevice
from tgi_contract_tests.device import DeviceContract
from tgi_model_server.device import Device


class TestToyDevice(DeviceContract):
    def make_device(self) -> Device:
        return ToyDevice()
