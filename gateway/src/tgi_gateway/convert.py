"""`tgi-gateway convert`: a model in another format, written by the installed backend that knows how."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tgi_gateway import hub, plugins
from tgi_gateway.errors import PluginError, SettingsError
from tgi_gateway.launcher.display import Display
from tgi_gateway.settings import Settings
from tgi_gateway.telemetry import logs

_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise SettingsError(f"{message}. `tgi-gateway convert --help` tells more")


def run(argv: Sequence[str]) -> int:
    """Convert one model; returns the exit code. Raises `StartError`."""
    parser = _Parser(prog="tgi-gateway convert", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id, with safetensors weights")
    parser.add_argument("file", metavar="FILE", type=Path, help="where to write; must not exist")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="gguf")
    parser.add_argument(
        "--type", metavar="TYPE", help="type of the weights, such as f16, q8_0 or q4_k_m (default q8_0)"
    )
    parser.add_argument("--revision", metavar="REVISION", help="hub revision: branch, tag or commit")
    arguments = parser.parse_args(list(argv))
    able = [item.plugin for item in plugins.installed() if item.plugin and arguments.to in item.plugin.converters]
    if not able:
        raise PluginError(
            f"no installed backend writes `{arguments.to}`. GGUF files are written by {plugins.pip_command('llamacpp')}"
        )
    target: Path = arguments.file
    if target.exists():
        raise SettingsError(f"{target} exists. Remove it, or name another file")
    revision = ["--revision", arguments.revision] if arguments.revision else []
    settings = Settings.parse(["--model-id", arguments.model, *revision], os.environ, flags_of=lambda _: ())
    source = resolve_shown(settings, hub.SAFETENSORS)
    part = target.with_name(f"{target.name}.part")
    try:
        able[0].converters[arguments.to](source, part, arguments.type)
        part.replace(target)
    except OSError as error:
        raise SettingsError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    print(target)
    return 0


def resolve_shown(settings: Settings, needs: hub.Needs) -> Path:
    """`hub.resolve` for a command: progress on standard error, and Ctrl-C ends it at once."""
    log = logs.configure(settings.log_level, json_output=settings.json_output, stream=sys.stderr)
    with Display(log, stream=sys.stderr) as display:

        def interrupted(*_: object) -> None:
            # The hub's library would first wait for its threads, which may wait for a silent server.
            display.__exit__(None, None, None)
            os._exit(_INTERRUPTED)

        before = signal.signal(signal.SIGINT, interrupted)
        try:
            return hub.resolve(settings, needs=needs, report=display.bytes(f"Downloading {settings.model_id}"))
        finally:
            signal.signal(signal.SIGINT, before)
