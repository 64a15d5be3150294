"""Compiling kernels ahead of time, for chips that are not there: do they compile, and what do they take.

`launches` runs launchers on tensors of any device, "meta" included, and notes what they would have started; `build`
compiles one such launch. Not for a process in which kernels are interpreted, or run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int32: "i32",
    torch.int64: "i64",
}
_OPTIONS = ("num_warps", "num_stages", "launch_pdl")


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel as it would have been started, with everything that its compilation depends on."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    """Places of arguments that are multiples of 16."""
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True, slots=True)
class Built:
    """What a compiled kernel takes of the chip, per thread where not said otherwise."""

    assembly: str
    registers: int
    spilled_bytes: int
    """Of registers kept in memory: stores on NVIDIA, the whole scratch on AMD."""
    shared_bytes: int
    """Shared memory (LDS) of a program."""


def launches(call: Callable[[], object]) -> list[Launch]:
    """The launches of `call`, in order; nothing runs, so results are whatever the memory held."""
    seen: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: object, warmup: bool, **named: Any) -> None:
        del grid, warmup
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        seen.append(_launch(kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **named}, options))

    with patch.object(triton.runtime.JITFunction, "run", note):
        call()
    return seen


def _launch(kernel: Any, given: dict[str, Any], options: dict[str, int]) -> Launch:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_DTYPES[value.dtype]}"
            aligned.append(place)
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialized and value % 16 == 0:
                aligned.append(place)
        else:
            signature[parameter.name] = "fp32"
    return Launch(kernel, signature, constants, tuple(aligned), options)


def build(launch: Launch, target: str) -> Built:
    """Compile for one of `TARGETS`. Raises what Triton raises for code or tiles that do not fit the chip."""
    attributes = {(place,): [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    chip = TARGETS[target]
    compiled = triton.compile(source, target=chip, options=launch.options)
    shared = int(compiled.metadata.shared)
    if chip.backend == "hip":
        text = str(compiled.asm["amdgcn"])
        registers, scratch = r"\.vgpr_count: +(\d+)", r"\.private_segment_fixed_size: (\d+)"
        return Built(text, _number(registers, text), _number(scratch, text), shared)
    text = str(compiled.asm["ptx"])
    said = _assembler_report(text, chip.arch)
    return Built(text, _number(r"Used (\d+) registers", said), _number(r"(\d+) bytes spill stores", said), shared)


def _assembler_report(ptx: str, arch: int | str) -> str:
    """What ptxas, which comes with Triton, says of registers and spills."""
    import triton.backends.nvidia as nvidia

    ptxas = Path(str(nvidia.__file__)).parent / "bin" / "ptxas"
    suffix = "a" if arch == 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"-arch=sm_{arch}{suffix}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"the compiler's report has no {pattern}"
    return int(found[1])
