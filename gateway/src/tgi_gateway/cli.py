"""The command `tgi-gateway`: serve, or one of a few small commands; errors without a traceback."""

from __future__ import annotations

# Only what costs nothing: everything else is imported inside `main`, where Ctrl-C is quiet.
import os
import sys
from collections.abc import Sequence

HELP = ("-h", "--help")
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        from tgi_gateway.errors import GatewayError, StartError
    except KeyboardInterrupt:
        return INTERRUPTED
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except GatewayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output (head, less) has enough; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str]) -> int:
    match argv:
        case ["--version" | "-V", *_]:
            return _version()
        case ["backends", *rest]:
            return _backends(rest)
        case ["doctor", *rest]:
            return _doctor(rest)
        case ["download", *rest]:
            return _download(rest)
        case ["top", *rest]:
            return _top(rest)
        case ["convert", *rest]:
            from tgi_gateway.convert import run

            return run(rest)
        case ["serve", *rest]:
            return _serve(rest)
    return _serve(argv)


def _version() -> int:
    from importlib.metadata import version

    print(f"tgi-gateway {version('tgi-gateway')}")
    return 0


def _serve(argv: list[str]) -> int:
    from tgi_gateway.settings import Settings

    settings = Settings.parse(argv, os.environ)
    from tgi_gateway.launcher.supervisor import serve

    return serve(settings)


def _backends(argv: list[str]) -> int:
    from tgi_gateway import doctor, plugins
    from tgi_gateway.errors import SettingsError

    if any(argument in HELP for argument in argv):
        print(
            "usage: tgi-gateway backends [--verbose]\n\nList the installed backends and what they can do, "
            "without loading their runtimes; --verbose adds their flags and what they lack here."
        )
        return 0
    if set(argv) - {"-v", "--verbose"}:
        raise SettingsError(f"`tgi-gateway backends` knows only --verbose, not {' '.join(argv)}")
    found = plugins.installed()
    rows = [("NAME", "VERSION", "DISTRIBUTION", "STATUS", "SUMMARY")]
    for item in found:
        if item.plugin is None:
            status = "broken"
        else:
            status = "ready" if doctor.missing_here(item.plugin) is None else "not on this machine"
        rows.append(
            (
                item.name,
                item.version,
                item.distribution,
                status,
                item.plugin.summary if item.plugin else "see below",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))
    if not found:
        print(f"no backend is installed. Install one: {plugins.pip_command('cpu')}")
    for item in found:
        print(f"\n{item.name}")
        for line in _details(item, verbose=bool(argv)):
            print(f"  {line}")
    return 0


def _doctor(argv: list[str]) -> int:
    from tgi_gateway import doctor, plugins
    from tgi_gateway.errors import SettingsError

    if not argv or argv[0] in HELP:
        print(
            "usage: tgi-gateway doctor NAME\n\nSay whether backend NAME can run on this machine: what it needs, what "
            "was found, and what to install."
        )
        return 0 if argv else 2
    if len(argv) > 1:
        raise SettingsError(f"`tgi-gateway doctor` takes one backend, got {' '.join(argv)}")
    plugin = plugins.load(argv[0])
    print(f"{plugin.name}: {plugin.summary}")
    checks = doctor.examine(plugin, plugins.distribution_of(plugin.name))
    width = max(len(check.name) for check in checks)
    for check in checks:
        status = "MISSING" if check.problem else "could" if check.advice else "ok"
        print(f"  {status:7}  {check.name.ljust(width)}  {check.found}")
        for line in filter(None, (check.problem, check.advice)):
            print(f"           {line}")
    problems = sum(check.problem is not None for check in checks)
    print(f"cannot run here: {problems} of {len(checks)} checks failed" if problems else "can run here")
    return 1 if problems else 0


def _download(argv: list[str]) -> int:
    if not argv or argv[0] in HELP:
        print(
            "usage: tgi-gateway download MODEL [--backend NAME] [--revision NAME] [--huggingface-hub-cache PATH]\n\n"
            "Fetch a model from the hub, or go on with a download that broke off, and print its folder. MODEL:FILE or\n"
            "MODEL:Q4_K_M fetches that GGUF file; --backend llamacpp fetches what it can serve.\n"
            "Variables: HF_TOKEN for gated and private models, HF_ENDPOINT for another hub."
        )
        return 0 if argv else 2
    from tgi_gateway import hub, plugins
    from tgi_gateway.convert import resolve_shown
    from tgi_gateway.gguf_choice import split_model_id
    from tgi_gateway.settings import Settings

    settings = Settings.parse(["--model-id", *argv], os.environ, flags_of=lambda _: ())
    if "backend" in settings.given:
        needs = hub.Needs.of(plugins.load(settings.backend), {})
    elif split_model_id(settings.model_id or "")[1]:
        needs = hub.Needs(("gguf",), tokenizer=False)
    else:
        needs = hub.SAFETENSORS
    print(resolve_shown(settings, needs))
    return 0


def _top(argv: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="tgi-gateway top",
        description="Show what a running server does, from its /metrics.",
        epilog="The variable API_KEY is sent as the server's key.",
        exit_on_error=False,
    )
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="The server. [default: %(default)s]")
    parser.add_argument("--every", type=float, default=2.0, help="Seconds between two looks. [default: %(default)s]")
    parser.add_argument("--once", action="store_true", help="Look once and end.")
    from tgi_gateway.errors import SettingsError

    if any(argument in HELP for argument in argv):
        parser.print_help()
        return 0
    try:
        told, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise SettingsError(f"Invalid argument: {error}") from None
    if unknown:
        raise SettingsError(f"`tgi-gateway top` knows --url, --every and --once, not {' '.join(unknown)}")
    from tgi_gateway.telemetry import top

    top.run(told.url, os.environ.get("API_KEY"), every_s=max(told.every, 0.05), once=told.once)
    return 0


def _details(item: object, *, verbose: bool) -> list[str]:
    from tgi_gateway import doctor
    from tgi_gateway.plugins import Installed

    assert isinstance(item, Installed)
    if item.plugin is None:
        return [item.problem or ""]
    able = item.plugin.capabilities
    capabilities = [
        f"features: {', '.join(sorted(able.features)) or 'none'}",
        f"prefix cache: {'yes' if able.prefix_cache else 'no'}; batching: {'yes' if able.batching else 'no'}; "
        f"top_n_tokens up to {able.max_top_n_tokens}; needs a model: {'yes' if item.plugin.needs_model else 'no'}",
    ]
    if not verbose:
        return capabilities
    return [
        *capabilities,
        f"missing here: {doctor.missing_here(item.plugin) or 'nothing'}",
        *(f"flag: {flag.name} ({flag.help} Default: {flag.default})" for flag in item.plugin.flags),
    ]
