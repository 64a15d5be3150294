"""BackendContract: every rule of the Backend protocol, as tests to inherit."""

from __future__ import annotations

from tgi_contract_tests.groups.cancels import Cancels
from tgi_contract_tests.groups.events import Events, Threads
from tgi_contract_tests.groups.grammars import Grammars
from tgi_contract_tests.groups.http import Http
from tgi_contract_tests.groups.lifecycle import Health, Lifecycle
from tgi_contract_tests.groups.limits import CapacityAndOverload, Limits
from tgi_contract_tests.groups.logprobs import Logprobs
from tgi_contract_tests.groups.loras import Loras
from tgi_contract_tests.groups.prefixes import Prefixes
from tgi_contract_tests.groups.processes import Processes
from tgi_contract_tests.groups.refusals import Refusals
from tgi_contract_tests.groups.sampling import Isolation, Sampling
from tgi_contract_tests.groups.stops import Stops
from tgi_contract_tests.groups.streams import Streams


class BackendContract(
    Lifecycle,
    Health,
    Processes,
    Events,
    Streams,
    Threads,
    Limits,
    CapacityAndOverload,
    Stops,
    Sampling,
    Isolation,
    Prefixes,
    Cancels,
    Refusals,
    Grammars,
    Loras,
    Logprobs,
    Http,
):
    """Inherit, name the class ``Test...``, and set `backend` or override `make`::

    class TestMine(BackendContract):
        backend = "mine"
        model = Path("/models/small")
    """
