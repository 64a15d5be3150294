"""For `tgi-gateway doctor cuda`: driver, torch, GPUs, compilers, and what makes it faster."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tgi_gateway import doctor
from tgi_gateway.backend import Check

OLDEST = (8, 0)
"""Compute capability that has bfloat16 and asynchronous copies."""
_DRIVER = "Install it from your distribution or from nvidia.com/drivers, or pass the GPU to the container (--gpus all)"
_TORCH = "pip install --force-reinstall torch, with the index that pytorch.org/get-started names for your CUDA"
_ASK = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "error": None}
if torch.version.cuda:
    try:
        torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            its = torch.cuda.get_device_properties(index)
            found["gpus"].append([its.name, its.major, its.minor, its.total_memory])
    except Exception as error:
        found["error"] = str(error).splitlines()[0]
print(json.dumps(found))
"""
_ASK_NVRTC = "from tgi_backend_cuda.native.compile import compiler_version; print(compiler_version())"
_ASK_FLASHINFER = """
import json
from tgi_backend_cuda.prefill import compiled_head_dims
print(json.dumps(compiled_head_dims()))
"""


def checks() -> Sequence[Check]:
    """Each in plain words, in the order in which to mend them."""
    return [driver_check(), *_torch_checks(), c_compiler_check(), python_headers_check(), nvrtc_check(), *_flashinfer()]


def driver_check() -> Check:
    """libcuda, which comes with the driver and not with CUDA."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Check("NVIDIA driver", "libcuda.so.1 not found", f"every GPU needs it. {_DRIVER}")
    version = ctypes.c_int()
    status = library.cuDriverGetVersion(ctypes.byref(version))
    if status:
        return Check("NVIDIA driver", "does not answer", f"cuDriverGetVersion returned {status}. {_DRIVER}")
    return Check("NVIDIA driver", f"for CUDA {version.value // 1000}.{version.value % 1000 // 10} and older")


def _torch_checks() -> list[Check]:
    if find_spec("torch") is None:
        return []  # the list of packages says so
    lines, failure = doctor.python_says(_ASK)
    if failure is not None:
        return [Check("torch's build", "does not load", f"{failure}. Install it again: {_TORCH}")]
    return torch_checks(json.loads(lines[-1]))


def torch_checks(found: dict[str, Any]) -> list[Check]:
    """`found`: torch and cuda (versions, cuda None for a build without), gpus ([name, major, minor, bytes]), error."""
    if found["cuda"] is None:
        return [
            Check("torch's build", found["torch"], f"this build of torch is for CPUs. Install one with CUDA: {_TORCH}")
        ]
    build = Check("torch's build", f"{found['torch']}, built for CUDA {found['cuda']}")
    if found["error"] is not None:
        why = f"torch cannot use the GPU: {found['error']}. A driver that is older than its CUDA does this: upgrade it"
        return [build, Check("GPU", "none can be used", why)]
    if not found["gpus"]:
        return [build, Check("GPU", "none", f"torch finds none. Check nvidia-smi and CUDA_VISIBLE_DEVICES. {_DRIVER}")]
    return [build, *(_gpu_check(index, *gpu) for index, gpu in enumerate(found["gpus"]))]


def _gpu_check(index: int, name: str, major: int, minor: int, size: int) -> Check:
    told = f"{name}, compute capability {major}.{minor}, {size / 2**30:.0f} GiB"
    if (major, minor) < OLDEST:
        return Check(f"GPU {index}", told, f"this backend needs {OLDEST[0]}.{OLDEST[1]} or newer. Choose another GPU")
    return Check(f"GPU {index}", told)


def c_compiler_check() -> Check:
    """Triton compiles a launcher in C for each of its kernels."""
    chosen = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    name = next((name for name in chosen if shutil.which(name)), chosen[0])
    return doctor.program(name, "the launchers that Triton compiles at the first start", "apt-get install gcc")


def python_headers_check() -> Check:
    """Those launchers are Python extensions."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if header.is_file():
        return Check("Python headers", str(header.parent))
    install = f"Install them: apt-get install python{sysconfig.get_python_version()}-dev"
    return Check("Python headers", "Python.h not found", f"Triton's launchers need them. {install}")


def nvrtc_check() -> Check:
    """The compiler of the native kernels, which comes with torch's CUDA packages."""
    lines, failure = doctor.python_says(_ASK_NVRTC)
    if failure is not None:
        return Check("NVRTC", "not found", f"the native kernels are compiled with it: {failure}. Install: {_TORCH}")
    return Check("NVRTC", lines[-1])


def _flashinfer() -> Iterator[Check]:
    """It makes long prompts faster; Triton's kernels stand in for it."""
    if find_spec("flashinfer") is None:
        install = "pip install 'tgi-backend-cuda[flashinfer]'"
        yield Check("FlashInfer", "not installed", advice=f"long prompts are read faster with it: {install}")
        return
    lines, failure = doctor.python_says(_ASK_FLASHINFER)
    yield from flashinfer_checks([] if failure else json.loads(lines[-1]), failure)


def flashinfer_checks(compiled: list[int], failure: str | None) -> Iterator[Check]:
    """`compiled`: head dimensions whose kernels in bfloat16 are there."""
    if failure is not None:
        yield Check("FlashInfer", "cannot be used", advice=f"{failure}. Triton's kernels stand in for it")
        return
    if compiled:
        yield Check("FlashInfer", f"compiled for heads of {', '.join(map(str, compiled))} in bfloat16")
        return
    later = "the first start compiles them beside its work, for the next one to use, which needs nvcc and ninja"
    yield Check("FlashInfer", "installed, its kernels are not compiled", advice=later)
    for name, install in (("nvcc", "the CUDA toolkit of torch's version"), ("ninja", "pip install ninja")):
        yield doctor.optional(doctor.program(name, "compiling FlashInfer's kernels", install))
