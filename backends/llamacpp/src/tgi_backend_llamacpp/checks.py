"""For `tgi-gateway doctor llamacpp`: whether llama.cpp loads here, and whether it was compiled for this machine."""

from __future__ import annotations

import ctypes.util
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from tgi_gateway import doctor
from tgi_gateway.backend import Check

_AGAIN = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
_NATIVE = f'CMAKE_ARGS="-DGGML_NATIVE=ON" {_AGAIN}'
_CUDA = f'CMAKE_ARGS="-DGGML_CUDA=on" {_AGAIN}'
_ASK = """
import json
import llama_cpp
import llama_cpp.llama_cpp as api
api.llama_backend_init()
print(json.dumps({
    "version": llama_cpp.__version__,
    "system": api.llama_print_system_info().decode(),
    "gpu": api.llama_supports_gpu_offload(),
    "mmap": api.llama_supports_mmap(),
    "mlock": api.llama_supports_mlock(),
}))
"""
FEATURES: Final[Mapping[str, str]] = {
    "AVX2": "avx2", "FMA": "fma", "F16C": "f16c", "BMI2": "bmi2", "AVX_VNNI": "avx_vnni", "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16", "AMX_INT8": "amx_int8",
    "NEON": "asimd", "DOTPROD": "asimddp", "MATMUL_INT8": "i8mm", "SVE": "sve",
}  # fmt: skip
"""What llama.cpp calls a feature of a processor that it was compiled for -> what Linux calls it."""


def checks() -> Sequence[Check]:
    """The compiler where llama-cpp-python is to be installed yet, else what the installed one says of itself."""
    if find_spec("llama_cpp") is None:
        return [doctor.program("c++", "compiling llama-cpp-python", "apt-get install g++")]
    lines, failure = doctor.python_says(_ASK)
    if failure is not None:
        return [_broken(failure)]
    told: dict[str, Any] = json.loads(lines[-1])
    return [
        Check("llama.cpp", f"llama-cpp-python {told['version']}, loads"),
        processor_check(told["system"], cpu_features(Path("/proc/cpuinfo"))),
        gpu_check(bool(told["gpu"]), nvidia=ctypes.util.find_library("cuda") is not None),
        Check("memory mapping", f"mmap: {_yes(told['mmap'])}, mlock: {_yes(told['mlock'])}"),
    ]


def _broken(failure: str) -> Check:
    if "SIGILL" in failure:
        why = "it was compiled for a processor that can do more than this one. Compile it here"
        return Check("llama.cpp", "does not run", f"{why}: {_NATIVE}")
    return Check("llama.cpp", "does not load", f"{failure}. Compile it again: {_AGAIN}")


def processor_check(system: str, here: frozenset[str]) -> Check:
    """`system`: llama_print_system_info; `here`: what Linux says of this processor, empty where it is not known."""
    built = {
        name.strip().rpartition(" ")[2]
        for part in system.split("|")
        for name, equals, value in [part.rpartition(":")[2].partition("=")]
        if equals and value.strip() == "1"
    }
    used = [name for name in FEATURES if name in built]
    unused = [name for name, flag in FEATURES.items() if flag in here and name not in built]
    found = f"{platform.machine()}, compiled for {', '.join(used) or 'any'}"
    if not unused:
        return Check("processor", found)
    able = f"this processor also has {', '.join(unused)}, which speed up products. To use them, compile it here"
    return Check("processor", found, advice=f"{able}: {_NATIVE}")


def gpu_check(offload: bool, *, nvidia: bool) -> Check:
    """`offload`: whether llama.cpp was compiled for a GPU; `nvidia`: whether there is a driver of NVIDIA's."""
    if offload:
        return Check("GPU", "compiled in; --n-gpu-layers -1 puts all layers there")
    found = "not compiled in: layers run on the processor"
    if not nvidia:
        return Check("GPU", found)
    return Check(
        "GPU", found, advice=f'there is an NVIDIA driver. To use its GPU: CMAKE_ARGS="-DGGML_CUDA=on" {_AGAIN}'
    )


def cpu_features(cpuinfo: Path) -> frozenset[str]:
    """Flags of the first processor as Linux names them; empty where there is no such file."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), ())
    )


def _yes(value: object) -> str:
    return "yes" if value else "no"
