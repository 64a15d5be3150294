"""Every native kernel compiled for chips that are not here, and what the machine code looks like."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tgi_backend_cuda.native.compile import Kernel, build
from tgi_backend_cuda.native.linear import Epilogue
from tgi_backend_cuda.native.ops import SENT_TOKENS, WIDE_EPILOGUES, NativeOps
from tgi_backend_cuda.native.tensor_map import TensorMap, Tiling
from tgi_backend_cuda.native.wide import WIDTHS
from tgi_gateway.errors import StartError

NVRTC = next(iter(distributions(name="nvidia-cuda-nvrtc")), None)
pytestmark = [
    pytest.mark.skipif(NVRTC is None, reason="NVRTC (nvidia-cuda-nvrtc) is not installed"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
BF16 = torch.bfloat16


class Nowhere:
    """The launcher of a chip that is not here."""

    multiprocessors = 132

    def __init__(self, shared_kib: int, *, hopper: bool) -> None:
        self.shared_bytes = shared_kib * 1024
        self.hopper = hopper

    def tensor_map(self, _: Tiling) -> TensorMap:
        raise AssertionError("nothing runs here")

    def launch(self, *_: object) -> None:
        raise AssertionError("nothing runs here")


def delivered(
    tokens: list[int], shared_kib: int = 227, dtype: torch.dtype = BF16, *, hopper: bool = True, world_size: int = 1
) -> list[Kernel]:
    ops = NativeOps(Nowhere(shared_kib, hopper=hopper))
    return [
        *ops.kernels(dtype, tokens, 4096, world_size),
        ops.attention_kernel(tokens[0], 32, 8, 128, 16, dtype, normed=False),
    ]


def disassemble(code: bytes, folder: Path) -> str:
    triton = find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    file = folder / "code.cubin"
    file.write_bytes(code)
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("arch", "shared_kib", "dtype"), [("sm_80", 163, BF16), ("sm_100", 227, torch.float16)])
def test_kernels_compile_for_other_chips(tmp_path: Path, arch: str, shared_kib: int, dtype: torch.dtype) -> None:
    for kernel in delivered([4, 32], shared_kib, dtype, hopper=False):
        assert build(kernel, arch, tmp_path)


@pytest.mark.skipif(find_spec("triton") is None, reason="the disassembler comes with Triton")
def test_code_for_hopper_copies_16_bytes_at_a_time_and_keeps_descriptors_whole(tmp_path: Path) -> None:
    """ptxas 13.0 can break the descriptor of a copy with a cache policy, which ends in an illegal instruction: half of
    a pair, UR1 of UR0 and UR1, then stands where a pair should.
    """
    for kernel in delivered([1, 2, 4, 8]):
        code = disassemble(build(kernel, "sm_90a", tmp_path), tmp_path)
        copies = re.findall(r"\bLDGSTS\S* .*", code)
        assert copies, kernel
        assert all(".128" in copy for copy in copies), kernel
        broken = [copy for copy in copies if re.search(r"desc\[UR\d*[13579]\]|\[R\d+\+UR", copy)]
        assert not broken, (kernel, broken[:2])
        assert len(re.findall(r"\b(?:STL|LDL)\b", code)) <= 16, kernel  # registers in memory, outside of loops
        assert "HMMA" in code, kernel
        assert "ACQBULK" in code, f"{kernel} does not wait for the kernel before it"


@pytest.mark.skipif(find_spec("triton") is None, reason="the disassembler comes with Triton")
def test_products_that_send_wait_before_the_next_may_start_and_those_that_receive_poll_past_every_cache(
    tmp_path: Path,
) -> None:
    kernels = [kernel for kernel in delivered([1, 2], world_size=2) if dict(kernel.constants).get("WORLD", 1) > 1]
    assert len(kernels) == 4 * len(SENT_TOKENS)
    for kernel in kernels:
        code = disassemble(build(kernel, "sm_90a", tmp_path), tmp_path)
        waits, next_starts = code.index("ACQBULK"), code.index("PREEXIT")
        if dict(kernel.constants)["EPILOGUE"] == Epilogue.SEND:
            assert waits < next_starts, kernel
            assert "STG.E.U16.STRONG.SYS" in code, kernel
        else:
            assert next_starts < waits < code.index("LDG.E.128.STRONG.SYS"), kernel
        assert not re.search(r"\b(?:STL|LDL)\b", code), f"{kernel} keeps registers in memory"


@pytest.mark.skipif(find_spec("triton") is None, reason="the disassembler comes with Triton")
def test_products_of_many_rows_copy_by_the_engine_and_multiply_by_four_warps_at_once(tmp_path: Path) -> None:
    kernels = [kernel for kernel in delivered(list(WIDTHS)) if kernel.name == "wide"]
    assert len(kernels) == len(WIDTHS) * len(WIDE_EPILOGUES)
    # Of each number of rows one, of each epilogue at least one.
    for kernel in kernels[:: len(WIDE_EPILOGUES) + 1]:
        code = disassemble(build(kernel, "sm_90a", tmp_path), tmp_path)
        width = dict(kernel.constants)["N"]
        assert f"HGMMA.64x{width}x16" in code, kernel
        assert "UTMALDG" in code, kernel
        assert "ACQBULK" in code, f"{kernel} does not wait for the kernel before it"
        assert not re.search(r"\b(?:STL|LDL)\b", code), f"{kernel} keeps registers in memory"


def test_a_kernel_is_compiled_once_for_a_chip(tmp_path: Path) -> None:
    kernel = delivered([1])[0]
    code = build(kernel, "sm_90a", tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"kept")
    assert build(kernel, "sm_90a", tmp_path) == b"kept"
    assert build(kernel, "sm_90a", tmp_path / "other") == code


def test_an_error_of_the_compiler_is_told_in_its_own_words(tmp_path: Path) -> None:
    broken = Kernel("linear", (("BF16", 1), ("WARPS", 16)))
    with pytest.raises(StartError, match=r'linear \(BF16=1, WARPS=16\) does not compile for sm_90a: (?s:.*)"TOKENS"'):
        build(broken, "sm_90a", tmp_path)
