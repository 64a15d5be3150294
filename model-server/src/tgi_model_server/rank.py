"""A rank other than the first: a process that runs every step that rank 0 runs, with its own part of the model.

It ends when rank 0 closes the pipe of plans, and at once when rank 0 is gone.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
from typing import BinaryIO

from tgi_gateway.errors import StartError
from tgi_gateway.launcher.child import Reporter
from tgi_gateway.telemetry import logs
from tgi_model_server.engine import load_engine
from tgi_model_server.plan_wire import PlanDecoder
from tgi_model_server.rank_task import RankTask, connect, device_of, open_store, read_plan

logger = logging.getLogger("tgi_model_server.rank")  # not __name__, which is __main__ here


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what Ctrl-C means
    faulthandler.enable()
    task = RankTask.decode(sys.stdin.buffer.readline())
    logs.configure_child(task.log_level, f"rank {task.shard.rank}")
    threading.Thread(target=_die_with_rank_0, name="rank-0-watch", daemon=True).start()
    reporter = Reporter(task.report_fd)
    try:
        with os.fdopen(task.plans_fd, "rb") as plans:
            _follow(task, reporter, plans)
    except StartError as error:
        reporter.failed(str(error), error.exit_code)
        return 1
    except Exception as error:
        logger.debug("rank %d failed", task.shard.rank, exc_info=True)
        reporter.failed(f"{type(error).__name__}: {error}", 1)
        return 1
    return 0


def _follow(task: RankTask, reporter: Reporter, plans: BinaryIO) -> None:
    device = device_of(task.device)
    device.join(task.shard)
    reporter.ready()
    group = connect(device, task.shard, open_store(task.port, task.shard.world_size))
    engine = load_engine(device, task.options, group=group)
    decoder = PlanDecoder()
    while (body := read_plan(plans)) is not None:
        engine.run(decoder.decode(body))
    engine.close()


def _die_with_rank_0() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    # Not through the interpreter's end: after a failure a library's threads may wait for other ranks for ever.
    os._exit(code)
