"""Getting the model ready, in a process of its own: Ctrl-C ends it at any moment, and nothing of it stays in memory."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec

from tgi_gateway import hub, plugins
from tgi_gateway.backend import ModelFiles
from tgi_gateway.launcher import child
from tgi_gateway.telemetry import logs

logger = logging.getLogger("tgi_gateway.launcher.model")  # not __name__, which is __main__ here


async def main(assignment: child.Assignment, reporter: child.Reporter) -> None:
    settings = assignment.settings
    plugin = plugins.load(settings.backend)

    def report(here: int, total: int) -> None:
        logs.progress(logger, f"Downloading {settings.model_id}", here / max(total, 1))

    # Blocking is fine: this loop has nothing else to do, and SIGTERM still ends the process.
    path = hub.resolve(settings, needs=hub.Needs.of(plugin, settings.extra), report=report)
    files = ModelFiles(path, path)
    if plugin.prepare is not None:
        logs.progress(logger, "Preparing the model", None)
        files = plugin.prepare(settings.without_secrets().engine_options(path), Path(assignment.runtime_folder))
    reporter.ready(msgspec.json.encode(files, enc_hook=str).decode())


if __name__ == "__main__":
    sys.exit(child.run(main))
