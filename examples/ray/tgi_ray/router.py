"""Which replica gets a request: the one that has its prefix, unless that is much busier; else the better of two."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from tgi_ray.messages import Asked
from tgi_ray.prefixes import Prefixes


class PrefixRouter(RequestRouter):
    """Ray Serve's extension point. Each ingress replica has one of its own, which knows what it has routed itself."""

    def initialize_state(self, *, max_blocks: int, slack: int, factor: float) -> None:
        """`max_blocks` that are remembered of each replica; for the rest see `Prefixes.favourite`."""
        self._prefixes: Prefixes[ReplicaID] = Prefixes(max_blocks)
        self._slack, self._factor = slack, factor

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks: of each, Serve takes the least loaded that has room."""
        asked = _asked(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        usable = candidate_replicas
        if asked is not None:
            usable = [each for each in usable if each.replica_id.unique_id not in asked.avoid] or usable
        two = random.sample(usable, min(len(usable), 2))
        if asked is None or not asked.blocks:
            return [two]
        by_id = {replica.replica_id: replica for replica in usable}
        loads = {name: self.replica_queue_len_cache.get(name) or 0 for name in by_id}
        favourite = self._prefixes.favourite(asked.blocks, loads, slack=self._slack, factor=self._factor)
        return [two] if favourite is None else [[by_id[favourite]], two]

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: Any,  # noqa: ARG002
    ) -> None:
        asked = _asked(pending_request)
        if asked is not None:
            self._prefixes.add(replica_id, asked.blocks)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._prefixes.keep(self.curr_replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._prefixes.keep(self.curr_replicas)


def _asked(pending_request: PendingRequest | None) -> Asked | None:
    found = pending_request.args[0] if pending_request is not None and pending_request.args else None
    return found if isinstance(found, Asked) else None
