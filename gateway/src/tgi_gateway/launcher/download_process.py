"""The download, in a process of its own: Ctrl-C ends it at any moment, and nothing of it stays in memory."""

from __future__ import annotations

import logging
import sys

from tgi_gateway import hub, plugins
from tgi_gateway.launcher import child
from tgi_gateway.telemetry import logs

logger = logging.getLogger("tgi_gateway.launcher.download")  # not __name__, which is __main__ here


async def main(assignment: child.Assignment, reporter: child.Reporter) -> None:
    settings = assignment.settings
    needs_weights = plugins.load(settings.backend).needs_model

    def report(here: int, total: int) -> None:
        logs.progress(logger, f"Downloading {settings.model_id}", here / max(total, 1))

    # Blocking is fine: this loop has nothing else to do, and SIGTERM still ends the process.
    reporter.ready(str(hub.resolve(settings, needs_weights=needs_weights, report=report)))


if __name__ == "__main__":
    sys.exit(child.run(main))
