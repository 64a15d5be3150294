"""Backends are plug-ins: found by entry point, loaded one at a time, only when named."""

from __future__ import annotations

import importlib.metadata
import traceback
from dataclasses import dataclass
from pathlib import Path

import pluggy

from tgi_gateway.backend import ALL_FEATURES, API_VERSION, BackendPlugin
from tgi_gateway.errors import PluginError
from tgi_gateway.hooks import ENTRY_POINT_GROUP, PROJECT, BackendHooks

PUBLISHED = ("cpu", "cuda", "rocm", "xpu", "neuron", "tpu", "trtllm", "llamacpp")
"""Backends that have an extra of this distribution: ``pip install "tgi-gateway[NAME]"``."""

_OURS = {"tgi_gateway", "importlib", "pluggy"}
"""Folders of the code that loads plug-ins."""


@dataclass(frozen=True, slots=True)
class Installed:
    """One registered backend. Exactly one of `plugin` and `problem` is set."""

    name: str
    distribution: str
    version: str
    plugin: BackendPlugin | None
    problem: str | None


def names() -> list[str]:
    """Names of the registered backends, sorted; imports none of them."""
    return sorted({point.name for point in _entry_points()})


def load(name: str) -> BackendPlugin:
    """Import the plug-in called `name`, and no other. Raises `PluginError` with the way out."""
    points = [point for point in _entry_points() if point.name == name]
    if not points:
        raise PluginError(_not_installed(name))
    return _load(points[0])


def distribution_of(name: str) -> str:
    """The distribution that registered the backend `name`."""
    point = next(point for point in _entry_points() if point.name == name)
    assert point.dist is not None, "importlib.metadata found it in a distribution"
    return point.dist.name


def installed() -> list[Installed]:
    """Every registered backend; a broken one is listed with its problem."""
    found = []
    for point in sorted(_entry_points(), key=lambda point: point.name):
        distribution = point.dist.name if point.dist else "?"
        version = point.dist.version if point.dist else "?"
        try:
            found.append(Installed(point.name, distribution, version, _load(point), None))
        except PluginError as error:
            found.append(Installed(point.name, distribution, version, None, str(error)))
    return found


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    """One per name: the first found wins, as with modules on the import path."""
    first: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        first.setdefault(point.name, point)
    return list(first.values())


def _load(point: importlib.metadata.EntryPoint) -> BackendPlugin:
    distribution = point.dist.name if point.dist else point.value
    hooks = pluggy.PluginManager(PROJECT)
    hooks.add_hookspecs(BackendHooks)
    try:
        hooks.register(point.load(), name=point.name)
        hooks.check_pending()
        plugin = hooks.hook.tgi_backend()
    except (
        Exception,
        SystemExit,
    ) as error:  # a foreign module may raise anything at import; every case gets the same way out
        raise PluginError(
            f"backend `{point.name}` (distribution {distribution}) cannot be loaded: {_told(error)}. "
            f"If it is not yours to mend, reinstall it: {pip_command(point.name, distribution)}"
        ) from error
    if not isinstance(plugin, BackendPlugin):
        raise PluginError(
            f"backend `{point.name}` (distribution {distribution}): `{point.value}` has no `tgi_backend` hook that "
            f"returns a BackendPlugin; got {type(plugin).__name__}. This is a defect of that distribution"
        )
    if plugin.name != point.name:
        raise PluginError(
            f"backend `{point.name}` (distribution {distribution}) calls itself `{plugin.name}`; the entry point and "
            "`BackendPlugin.name` must agree. This is a defect of that distribution"
        )
    if plugin.api_version not in (API_VERSION, API_VERSION - 1):
        raise PluginError(_wrong_version(plugin, distribution))
    unknown = sorted(plugin.capabilities.features - ALL_FEATURES)
    if unknown:
        raise PluginError(
            f"backend `{point.name}` (distribution {distribution}) declares features that do not exist: "
            f"{', '.join(unknown)}; known are {', '.join(sorted(ALL_FEATURES))}. This is a defect of that distribution"
        )
    return plugin


def _told(error: BaseException) -> str:
    """The error, with the place in foreign code that it comes from."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}, in line {error.lineno} of {error.filename}"
    places = [
        f", in line {frame.lineno} of {frame.filename}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not _OURS & set(Path(frame.filename).parts)
    ]
    return f"{type(error).__name__}: {error}{places[-1] if places else ''}"


def pip_command(name: str, distribution: str | None = None) -> str:
    """What a user types to get the backend `name`."""
    if name in PUBLISHED or distribution is None:
        return f'pip install "tgi-gateway[{name}]"'
    return f"pip install --upgrade --force-reinstall {distribution}"


def _not_installed(name: str) -> str:
    available = ", ".join(names()) or "none"
    if name in PUBLISHED:
        return f"backend `{name}` is not installed (installed: {available}). Install it: {pip_command(name)}"
    return (
        f"there is no backend `{name}`; installed: {available}. Choose one with --backend, or install its distribution"
    )


def _wrong_version(plugin: BackendPlugin, distribution: str) -> str:
    if plugin.api_version > API_VERSION:
        mend = "upgrade the gateway: pip install --upgrade tgi-gateway"
    else:
        mend = f"upgrade the backend: pip install --upgrade {distribution}"
    return (
        f"backend `{plugin.name}` (distribution {distribution}) was made for version {plugin.api_version} of the "
        f"backend interface; this gateway has version {API_VERSION} and accepts the one before. Next step: {mend}"
    )
