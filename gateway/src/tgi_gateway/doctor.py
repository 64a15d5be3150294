"""`tgi-gateway doctor NAME`: what a backend needs of this machine, what was found, and what to install.

The Python version and the whole tree of required packages are read from the metadata of the backend's distribution.
Compiler, driver and the like are the backend's own `BackendPlugin.checks`, for which there are `program`, `library`,
`optional` and `python_says`.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata as metadata
import platform
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from tgi_gateway.backend import BackendPlugin, Check

_PROBE_S = 10.0
_IMPORT_S = 120.0
"""A runtime's first import reads hundreds of megabytes."""


def examine(plugin: BackendPlugin, distribution: str) -> list[Check]:
    """Everything that `plugin` of the installed `distribution` needs, the general before the particular."""
    return [_python(distribution), *_packages(distribution), *_own(plugin)]


def program(name: str, needed_for: str, install: str, version_flag: str = "--version") -> Check:
    """Whether `name` is on the path, and what it says of itself. `install`: the command that brings it."""
    path = shutil.which(name)
    if path is None:
        return Check(name, "not found", f"it is needed for {needed_for}. Install it: {install}")
    try:
        done = subprocess.run([path, version_flag], capture_output=True, text=True, timeout=_PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name, path, f"it does not run: {type(error).__name__}. Install it again: {install}")
    lines = (done.stdout or done.stderr).strip().splitlines()
    return Check(name, lines[0] if lines else path)


def library(name: str, needed_for: str, install: str) -> Check:
    """Whether the loader knows the shared library `name`, as in ``lib{name}.so``."""
    found = ctypes.util.find_library(name)
    problem = None if found else f"it is needed for {needed_for}. Install it: {install}"
    return Check(f"lib{name}", found or "not found", problem)


def optional(check: Check) -> Check:
    """The same as advice: the backend runs without."""
    return replace(check, problem=None, advice=check.problem)


def python_says(code: str) -> tuple[list[str], str | None]:
    """The lines that `code` prints, and why it failed if it did: in a process of its own, which native code may end."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_IMPORT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], f"it did not answer within {_IMPORT_S:.0f} s"
    if done.returncode == 0:
        return done.stdout.strip().splitlines(), None
    if done.returncode < 0:
        return [], f"it was ended by {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines()
    return [], lines[-1] if lines else f"it ended with code {done.returncode}"


def _python(distribution: str) -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    wanted = ", ".join(metadata.metadata(distribution).get_all("Requires-Python") or ())
    if wanted and not Requirement(f"python{wanted}").specifier.contains(platform.python_version(), prereleases=True):
        return Check("Python", found, f"{distribution} needs Python {wanted}. Make an environment with one of these")
    return Check("Python", f"{found} (needed: {wanted or 'any'})")


def _packages(distribution: str) -> Iterator[Check]:
    """The distribution and the whole tree below it. Of packages that are required by none of ours only the problems."""
    yield Check(distribution, metadata.version(distribution))
    told = {canonicalize_name(distribution)}
    left: deque[tuple[str, frozenset[str]]] = deque([(distribution, frozenset())])
    seen = set(left)
    while left:
        parent, extras = left.popleft()
        for requirement in _requirements(parent, extras):
            name = canonicalize_name(requirement.name)
            check = _package(requirement, parent)
            if check.problem is not None or (
                name not in told and (parent == distribution or parent.startswith("tgi-"))
            ):
                yield check
            told.add(name)
            below = (name, frozenset(requirement.extras))
            if below not in seen:
                seen.add(below)
                left.append(below)


def _requirements(distribution: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What applies on this machine, with these extras."""
    try:
        texts = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # a foreign package's defect, which pip will have told of
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            yield requirement


def _package(requirement: Requirement, needed_by: str) -> Check:
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, "not installed", f'{needed_by} needs it. Install it: pip install "{wanted}"')
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(requirement.name, found, f'{needed_by} needs {wanted}. Install it: pip install "{wanted}"')
    return Check(requirement.name, f"{found} (needed: {requirement.specifier or 'any'})")


def _own(plugin: BackendPlugin) -> Sequence[Check]:
    """The plug-in's own checks. One that fails is an answer too: third-party code that probes hardware may raise."""
    try:
        checks = list(plugin.checks())
    except Exception as error:
        checks = [Check("its own checks", "failed", f"{type(error).__name__}: {error}")]
    missing = missing_here(plugin)
    if missing is not None and all(check.problem is None for check in checks):
        checks.append(Check("this machine", "not enough", missing))
    return checks


def missing_here(plugin: BackendPlugin) -> str | None:
    """What the plug-in says is missing here; a check that fails is an answer too."""
    try:
        return plugin.missing()
    except Exception as error:
        return f"its check failed: {type(error).__name__}: {error}"
