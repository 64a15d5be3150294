"""`tgi-gateway doctor cuda`: each thing that is missing, in plain words with the way out, told without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tgi_backend_cuda import checks
from tgi_backend_cuda.plugin import checks as plugin_checks
from tgi_gateway import cli
from tgi_gateway.backend import Check

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
GPU = ["NVIDIA H200", 9, 0, 150 * 2**30]


def told(found: dict[str, Any]) -> list[Check]:
    usual: dict[str, Any] = {"torch": "2.13.0", "cuda": "13.0", "gpus": [GPU], "error": None}
    return checks.torch_checks(usual | found)


def problem(found: list[Check]) -> str:
    problems = [check.problem for check in found if check.problem]
    assert len(problems) == 1
    return problems[0]


def test_a_gpu_that_will_do_is_named_with_its_capability_and_memory() -> None:
    build, gpu = told({})
    assert build == Check("torch's build", "2.13.0, built for CUDA 13.0")
    assert gpu == Check("GPU 0", "NVIDIA H200, compute capability 9.0, 150 GiB")


def test_what_is_wrong_with_torch_or_the_gpu_is_told_with_the_way_out() -> None:
    assert "this build of torch is for CPUs. Install one with CUDA" in problem(told({"cuda": None}))
    assert "CUDA_VISIBLE_DEVICES" in problem(told({"gpus": []}))
    assert "upgrade it" in problem(told({"gpus": [], "error": "The NVIDIA driver on your system is too old"}))
    assert "needs 8.0 or newer" in problem(told({"gpus": [GPU, ["Tesla V100", 7, 0, 16 * 2**30]]}))


def test_flashinfer_is_advice_and_never_a_problem() -> None:
    (compiled,) = checks.flashinfer_checks([64, 128], None)
    assert compiled == Check("FlashInfer", "compiled for heads of 64, 128 in bfloat16")
    (broken,) = checks.flashinfer_checks([], "ImportError: no symbol")
    assert "no symbol. Triton's kernels stand in" in str(broken.advice)
    found = list(checks.flashinfer_checks([], None))
    assert [check.name for check in found] == ["FlashInfer", "nvcc", "ninja"]
    assert all(check.problem is None for check in found)


def test_without_a_compiler_it_says_which_and_for_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "apt-get install gcc" in str(checks.c_compiler_check().problem)
    monkeypatch.setenv("CC", "/no/such/cc")
    assert "Triton" in str(checks.c_compiler_check().problem)


@WITHOUT_GPU
def test_on_a_machine_without_a_gpu_the_real_checks_say_what_is_missing() -> None:
    found = {check.name: check for check in plugin_checks()}
    driver = found["NVIDIA driver"]
    assert driver.problem is None or "--gpus all" in driver.problem
    assert found["torch's build"].problem if torch.version.cuda is None else found["GPU"].problem
    assert found["gcc" if "gcc" in found else "cc"].problem is None  # what this project itself needs
    assert found["FlashInfer"].problem is None


@WITHOUT_GPU
def test_doctor_tells_it_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "cuda"]) == 1
    out = capsys.readouterr().out
    assert "MISSING" in out
    assert "ok       triton" in out  # an extra of the model server's, which this backend asks for
    assert "cannot run here" in out
