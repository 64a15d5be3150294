"""Kernels of this folder compiled for one chip by NVRTC, and kept on disk: the second start compiles nothing."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tgi_gateway.errors import StartError

_HERE = Path(__file__).parent
_OPTIONS = ("--std=c++17", "--use_fast_math", "--diag-suppress=177,550")
"""The warnings left out are of functions and results that a kernel has no use for."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One variant of a kernel: the name of its source and entry point, and the constants it is compiled with."""

    name: str
    constants: tuple[tuple[str, int], ...]

    def source(self, prelude: str | None = None) -> str:
        """Constants, what `ptx.cuh` has (or `prelude` in its place), and the kernel."""
        # Not as compiler options, which NVRTC's own header would see too.
        defines = "".join(f"#define {name} {value}\n" for name, value in self.constants)
        return defines + (prelude if prelude is not None else _text("ptx.cuh")) + _text(f"{self.name}.cu")


@lru_cache
def _text(file: str) -> str:
    """With what it includes, so that neither a path nor a header is needed to compile it."""
    return re.sub(r'^#include "(.+)"$', lambda line: _text(line[1]), (_HERE / file).read_text(), flags=re.MULTILINE)


def cache_folder() -> Path:
    """Where compiled kernels are kept, for this user."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tgi-gateway" / "cuda-kernels"


def build(kernel: Kernel, arch: str, folder: Path | None = None) -> bytes:
    """The machine code (cubin) of `kernel` for `arch`, as in ``sm_90a``; from `folder` if it was built before.

    Raises `StartError` with the compiler's own words. A folder that cannot be written costs the next start time.
    """
    folder = folder or cache_folder()
    source = kernel.source()
    key = hashlib.sha256("\0".join((compiler_version(), arch, *_OPTIONS, source)).encode()).hexdigest()
    file = folder / f"{kernel.name}-{arch}-{key[:32]}.cubin"
    try:
        return file.read_bytes()
    except OSError:
        code = _compile(kernel, source, arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            part.write(code)
        os.replace(part.name, file)  # whole or not at all, whoever else is writing it
    except OSError:
        pass
    return code


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as e:
        raise StartError(f"The CUDA kernels need the package cuda-bindings: {e}") from e
    return nvrtc


def compiler_version() -> str:
    """NVRTC's. Raises `StartError` where it cannot be loaded."""
    return ".".join(str(part) for part in _call("nvrtcVersion"))


def _call(name: str, *arguments: Any) -> tuple[Any, ...]:
    nvrtc = _nvrtc()
    try:
        error, *values = getattr(nvrtc, name)(*arguments)
    except RuntimeError as e:  # the library is not there
        raise StartError(f"NVRTC, which compiles the CUDA kernels, cannot be loaded: {e}") from e
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise StartError(f"{name}: {error.name}")
    return tuple(values)


def _compile(kernel: Kernel, source: str, arch: str) -> bytes:
    nvrtc = _nvrtc()
    (program,) = _call("nvrtcCreateProgram", source.encode(), f"{kernel.name}.cu".encode(), 0, [], [])
    try:
        options = [option.encode() for option in (f"--gpu-architecture={arch}", *_OPTIONS)]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            (size,) = _call("nvrtcGetProgramLogSize", program)
            log = bytearray(size)
            _call("nvrtcGetProgramLog", program, log)
            words = log.decode(errors="replace").strip("\0 \n")[:4000]
            constants = ", ".join(f"{name}={value}" for name, value in kernel.constants)
            raise StartError(f"Kernel {kernel.name} ({constants}) does not compile for {arch}: {words}")
        (size,) = _call("nvrtcGetCUBINSize", program)
        code = bytearray(size)
        _call("nvrtcGetCUBIN", program, code)
        return bytes(code)
    finally:
        _call("nvrtcDestroyProgram", program)
