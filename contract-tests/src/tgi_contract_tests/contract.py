"""BackendContract: every rule of the Backend protocol, as tests to inherit."""

from __future__ import annotations

from tgi_contract_tests.groups.cancels import Cancels
from tgi_contract_tests.groups.events import Events, Threads
from tgi_contract_tests.groups.grammars import Grammars
from tgi_contract_tests.groups.lifecycle import Health, Lifecycle
from tgi_contract_tests.groups.limits import CapacityAndOverload, Limits
from tgi_contract_tests.groups.logprobs import Logprobs
from tgi_contract_tests.groups.refusals import Refusals
from tgi_contract_tests.groups.sampling import Isolation, Sampling
from tgi_contract_tests.groups.stops import Stops


class BackendContract(
    Lifecycle,
    Health,
    Events,
    Threads,
    Limits,
    CapacityAndOverload,
    Stops,
    Sampling,
    Isolation,
    Cancels,
    Refusals,
    Grammars,
    Logprobs,
):
    """Inherit, name the class ``Test...``, and set `backend` or override `make`::

    class TestMine(BackendContract):
        backend = "mine"
        model = Path("/models/small")
    """
