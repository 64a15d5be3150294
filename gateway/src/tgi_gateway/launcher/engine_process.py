"""The engine host: one backend behind its queue, served to the HTTP workers over a Unix socket."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tgi_gateway import plugins
from tgi_gateway.backend import Backend, ReportsLoss
from tgi_gateway.errors import PluginError
from tgi_gateway.host.dispatch import Dispatch
from tgi_gateway.host.queue import Ticket
from tgi_gateway.launcher import child
from tgi_gateway.telemetry import logs
from tgi_gateway.telemetry.metrics import HostMetrics, Metrics
from tgi_gateway.telemetry.tracing import Attribute, Tracing
from tgi_gateway.wire.server import serve

logger = logging.getLogger("tgi_gateway.launcher.engine")  # not __name__, which is __main__ here

SWITCH_INTERVAL_S = 0.0002
"""How long a thread may keep the interpreter while another wants it. The engine's thread gives it up at every call into
its runtime; with Python's 5 ms it would wait so long at each of them while messages are read and written."""


async def main(assignment: child.Assignment, reporter: child.Reporter) -> int:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    settings = assignment.settings
    plugin = plugins.load(settings.backend)
    missing = plugin.missing()
    if missing is not None:
        raise PluginError(f"backend `{plugin.name}` cannot run on this machine: {missing}")
    options = settings.engine_options(Path(assignment.model_path), Path(assignment.tokenizer_path))
    backend = plugin.create(options)
    dispatch = Dispatch(
        backend,
        max_concurrent_requests=settings.max_concurrent_requests,
        max_concurrent_requests_per_key=settings.max_concurrent_requests_per_key,
        max_queued_tokens=settings.max_queued_tokens,
    )
    server = await serve(dispatch, Path(assignment.socket_path))
    dispatch.observe(
        HostMetrics(
            Metrics(assignment.process),
            max_batch_total_tokens=server.info.max_batch_total_tokens,
            capacity=dispatch.capacity,
            restarted=assignment.restarts > 0,
        )
    )
    tracing = Tracing.of(settings, assignment.process)
    if tracing is not None:
        dispatch.trace(partial(_trace, tracing))
    logger.info("Engine ready", extra=logs.fields(**asdict(server.info)))
    told_to_stop = child.stop_signal()
    reporter.ready()
    beats = asyncio.create_task(reporter.beat(dispatch.silent_s))
    why = await _loss(backend, told_to_stop)
    beats.cancel()
    if why is None:
        await server.stop(settings.shutdown_timeout)
        if tracing is not None:
            await asyncio.to_thread(tracing.flush)
        return 0
    logger.error("The engine is lost: %s", why)
    await server.stop(0.0)
    return 1


def _trace(tracing: Tracing, ticket: Ticket, ended: float) -> None:
    """The spans of a request that has ended in the host."""
    request = ticket.request
    if not request.traceparent:
        return
    facts: dict[str, Attribute] = {"request_id": request.name, "input_tokens": len(request.input_ids)}
    entered, first = ticket.entered_at or ended, ticket.first_token_at
    tracing.add("queue", request.traceparent, ticket.arrived_at, entered, facts)
    if ticket.entered_at:
        tracing.add("prefill", request.traceparent, entered, first or ended, facts)
    if first:
        tracing.add("decode", request.traceparent, first, ended, {"generated_tokens": ticket.generated_tokens})


async def _loss(backend: Backend, told_to_stop: asyncio.Event) -> str | None:
    """Why the engine can go on no longer; None when it was told to stop."""
    if not isinstance(backend, ReportsLoss):
        await told_to_stop.wait()
        return None
    stopping, losing = asyncio.create_task(told_to_stop.wait()), asyncio.create_task(backend.lost())
    ends: list[asyncio.Task[Any]] = [stopping, losing]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    return None if stopping.done() and not stopping.cancelled() else losing.result()


if __name__ == "__main__":
    sys.exit(child.run(main))
