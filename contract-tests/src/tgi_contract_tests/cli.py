"""`tgi-contract NAME`: run the contract against an installed backend and print what it declares and keeps."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest
from rich.console import Console

from tgi_contract_tests.installed import TestInstalled
from tgi_contract_tests.report import Outcome, Report, Result
from tgi_gateway import hub, plugins
from tgi_gateway.backend import BackendPlugin, EngineOptions
from tgi_gateway.errors import GatewayError, ModelError, PluginError, SettingsError
from tgi_gateway.settings import plugin_option

_NAMED = ("model_path", "model_id", "tokenizer_path", "extra")
"""Fields of EngineOptions that have an argument of their own."""
_INI = "[pytest]\npython_files = test_*.py\n"
_TEST_FILE = "from tgi_contract_tests.installed import TestInstalled\n"


@dataclass(slots=True)
class Results:
    """A pytest plug-in that keeps results and prints a line for each."""

    console: Console
    groups: dict[str, str] = field(default_factory=dict)
    """Test -> the class of the contract that defines it."""
    all: list[Result] = field(default_factory=list)

    @pytest.hookimpl(tryfirst=True)  # before -k selects
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            plain = getattr(item, "originalname", item.name)
            assert isinstance(item, pytest.Function)
            owner = next(owner for owner in item.cls.__mro__ if plain in vars(owner))
            self.groups[item.name] = owner.__name__
            item.extra_keyword_matches.add(owner.__name__)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._keep("collection", "failed", report.longreprtext, 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        if hasattr(report, "wasxfail") and report.skipped:
            self._keep(name, "known failure", report.wasxfail, report.duration)
        elif report.skipped:
            self._keep(name, "skipped", reason.removeprefix("Skipped: "), report.duration)
        elif report.failed:
            log = "\n".join(text for title, text in report.sections if title.startswith("Captured log"))
            self._keep(name, "failed", reason, report.duration, log)
        elif report.when == "call":
            self._keep(name, "passed", "", report.duration)

    def _keep(self, name: str, outcome: Outcome, reason: str, seconds: float, log: str = "") -> None:
        self.all.append(Result(name, self.groups.get(name, ""), outcome, reason, seconds, log))
        style = {"passed": "green", "failed": "bold red", "skipped": "dim", "known failure": "yellow"}[outcome]
        text = f"{outcome:>13}  {name}" + (f" ({reason})" if outcome in ("skipped", "known failure") else "")
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """0: every test passed or was skipped; 1: a test failed; 2: the contract could not be run."""
    arguments = _parser().parse_args(argv)
    console = Console()
    try:
        plugin = plugins.load(arguments.name)
        missing = plugin.missing()
        if missing is not None:
            raise PluginError(f"this machine cannot run backend `{plugin.name}`: {missing}")
        TestInstalled.backend = plugin.name
        TestInstalled.model = _model(plugin, arguments.model)
        TestInstalled.options = _options(plugin, arguments.set)
        TestInstalled.patience_s = arguments.patience
        TestInstalled.adapter = _adapter(arguments.adapter)
        TestInstalled.known_failures = dict(_pair(text) for text in arguments.known_failure)
        test_file = _TEST_FILE + (_device_test(arguments.device) if arguments.device else "")
    except GatewayError as error:
        console.print(f"tgi-contract: {error}", style="bold red", markup=False)
        return 2
    console.print(Report(plugin, "", "", ()).capability_table())
    results = Results(console)
    status = _run(results, arguments.k, test_file)
    distribution = plugins.distribution_of(plugin.name)
    report = Report(plugin, distribution, metadata.version(distribution), results.all)
    console.print(report.result_table())
    for reason, failed in report.by_reason("failed").items():
        console.rule(failed[0].name if len(failed) == 1 else f"{len(failed)} tests")
        told = [reason, f"in: {', '.join(each.name for each in failed)}" if len(failed) > 1 else "", failed[0].log]
        for text in filter(None, told):
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.document(), indent=1) + "\n", "utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(report.markdown(), "utf-8")
    if all(result.outcome == "skipped" for result in results.all):
        console.print("tgi-contract: no test was run", style="bold red")
        return 2
    return 1 if report.count("failed") or status not in (0, 1) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgi-contract", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="an installed backend: `tgi-gateway backends` lists them")
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder (or file) of a small model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here, for machines")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables here, to include in docs")
    parser.add_argument(
        "--device", metavar="MODULE:CLASS", help="a device of the PyTorch engine: run its contract as well"
    )
    parser.add_argument("--adapter", metavar="NAME=PATH", help="a LoRA adapter of the model, to test `lora`")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an engine option or a flag of the plug-in"
    )
    parser.add_argument(
        "--known-failure", action="append", default=[], metavar="TEST=REASON", help="this test must fail; repeatable"
    )
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="S", help="seconds an engine may make no progress (default 60)"
    )
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only these tests or groups, as in pytest")
    return parser


def _model(plugin: BackendPlugin, chosen: Path | None) -> Path | None:
    if chosen is not None and not chosen.exists():
        raise SettingsError(f"--model {chosen}: there is no such folder or file")
    if chosen is not None or not plugin.needs_model:
        return chosen
    try:
        return hub.demo_model()
    except ModelError as error:
        raise SettingsError(
            f"backend `{plugin.name}` needs a model. Add --model DIR with a small one that it can serve, or install "
            'the demo model: pip install "tgi-gateway[demo]"'
        ) from error


def _adapter(pair: str | None) -> tuple[str, Path] | None:
    if pair is None:
        return None
    name, path = _pair(pair)
    if not Path(path).exists():
        raise SettingsError(f"--adapter {pair}: there is no such folder or file")
    return name, Path(path)


def _device_test(name: str) -> str:
    """What the test file says of a device. Torch is imported for it, and for nothing else here."""
    try:
        from tgi_contract_tests.installed_device import TestInstalledDevice
    except ImportError as error:
        raise SettingsError(
            f'--device needs the model server: pip install "tgi-contract-tests[device]" ({error})'
        ) from error
    TestInstalledDevice.device_name = name
    try:
        TestInstalledDevice().make_device()
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"--device {name}: {error}. Write it as MODULE:CLASS") from error
    return "from tgi_contract_tests.installed_device import TestInstalledDevice\n"


def _options(plugin: BackendPlugin, pairs: Sequence[str]) -> Mapping[str, Any]:
    """A flag's value is read as on the command line of the server; an option's as JSON, or as text where it is none."""
    fields = {name: kind for name, kind in get_type_hints(EngineOptions).items() if name not in _NAMED}
    flags = {flag.key: flag for flag in plugin.flags}
    options: dict[str, Any] = {}
    extra: dict[str, object] = {name: flag.default for name, flag in flags.items()}
    for pair in pairs:
        name, text = _pair(pair)
        name = name.lstrip("-").replace("-", "_")
        if name in flags:
            extra[name] = plugin_option(flags[name], plugin.name).value(text, f"--set {name}")
        elif name in fields:
            options[name] = _value(text, fields[name], pair)
        else:
            raise SettingsError(f"--set {pair}: known are {', '.join(sorted(fields.keys() | flags.keys()))}")
    return options | {"extra": extra}


def _value(text: str, kind: Any, pair: str) -> Any:
    value: Any = text
    with contextlib.suppress(ValueError):
        value = json.loads(text)
    try:
        return msgspec.convert(value, kind, dec_hook=lambda wanted, given: wanted(given))
    except msgspec.ValidationError as error:
        raise SettingsError(f"--set {pair}: {error}") from None


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"`{text}` has no `=`: write NAME=VALUE")
    return name, value


def _run(results: Results, expression: str, test_file: str) -> int:
    """Collect the contract from a file of its own, away from whatever pytest settings lie around."""
    with tempfile.TemporaryDirectory(prefix="tgi-contract-") as name:
        folder = Path(name)
        (folder / "pytest.ini").write_text(_INI, "utf-8")
        (folder / "test_installed.py").write_text(test_file, "utf-8")
        arguments = ["-c", str(folder / "pytest.ini"), f"--rootdir={folder}", "--import-mode=importlib"]
        arguments += ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:asyncio", "-k", expression, str(folder)]
        return int(pytest.main(arguments, [results]))


if __name__ == "__main__":
    sys.exit(main())
