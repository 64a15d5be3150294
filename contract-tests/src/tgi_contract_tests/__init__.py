"""The contract of backends and devices, as tests to inherit.

`tgi_contract_tests.device` holds DeviceContract; it needs torch and the model server.
"""

from tgi_contract_tests.contract import BackendContract

__all__ = ["BackendContract"]
