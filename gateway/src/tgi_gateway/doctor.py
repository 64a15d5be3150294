"""`tgi-gateway doctor NAME`: what a backend needs of this machine, what was found, and what to install.

The Python version and the whole tree of required packages are read from the metadata of the backend's distribution.
Compiler, driver and the like are the backend's own `BackendPlugin.checks`, for which there are `program` and `library`.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata as metadata
import platform
import shutil
import subprocess
from collections import deque
from collections.abc import Iterator, Sequence

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from tgi_gateway.backend import BackendPlugin, Check

_PROBE_S = 10.0


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


def _python(distribution: str) -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    wanted = ", ".join(metadata.metadata(distribution).get_all("Requires-Python") or ())
    if wanted and not Requirement(f"python{wanted}").specifier.contains(platform.python_version(), prereleases=True):
        return Check("Python", found, f"{distribution} needs Python {wanted}. Make an environment with one of these")
    return Check("Python", f"{found} (needed: {wanted or 'any'})")


def _packages(distribution: str) -> Iterator[Check]:
    """The distribution and the whole tree below it. Of packages that are required by none of ours only the problems."""
    yield Check(distribution, metadata.version(distribution))
    seen, left = {canonicalize_name(distribution)}, deque([distribution])
    while left:
        parent = left.popleft()
        for requirement in _requirements(parent):
            name = canonicalize_name(requirement.name)
            check = _package(requirement, parent)
            if check.problem is not None or (
                name not in seen and (parent == distribution or parent.startswith("tgi-"))
            ):
                yield check
            if name not in seen:
                seen.add(name)
                left.append(name)


def _requirements(distribution: str) -> Iterator[Requirement]:
    """What applies on this machine, without extras."""
    try:
        texts = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # a foreign package's defect, which pip will have told of
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
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
