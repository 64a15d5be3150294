from threading import Event
from typing import Any, NoReturn

from tgi_contract_tests import BackendContract


class TestToyWithFaults(BackendContract):
    backend = "toy"
    end_prompt = (0,)

    def kill(self, backend: Any) -> None:
        def lost(_rows: object) -> NoReturn:
            raise RuntimeError("the device is lost")

        backend.step = lost

    def hang(self, backend: Any) -> None:
        backend.step = lambda _rows: Event().wait()
