"""`tgi-gateway doctor llamacpp`: does the library load, and was it compiled for this machine?"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tgi_backend_llamacpp import checks
from tgi_gateway import cli, doctor

SYSTEM = "CPU : SSE3 = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | AVX512 = 0 | LLAMAFILE = 1 | OPENMP = 1 | "


def test_what_the_processor_has_beyond_the_build_is_advice() -> None:
    same = checks.processor_check(SYSTEM, frozenset({"avx2", "fma", "f16c", "sse3"}))
    assert same.advice is None
    assert "compiled for AVX2, FMA, F16C" in same.found
    more = checks.processor_check(SYSTEM, frozenset({"avx2", "fma", "f16c", "avx512f", "avx512_vnni"}))
    assert "also has AVX512, AVX512_VNNI" in str(more.advice)
    assert "GGML_NATIVE=ON" in str(more.advice)
    assert more.problem is None
    assert checks.processor_check(SYSTEM, frozenset()).advice is None


def test_the_features_of_a_processor_are_read_of_linux(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert checks.cpu_features(path) == {"fpu", "avx2", "avx512f"}
    path.write_text("processor\t: 0\nFeatures\t: fp asimd i8mm\n")
    assert checks.cpu_features(path) == {"fp", "asimd", "i8mm"}
    assert checks.cpu_features(tmp_path / "absent") == frozenset()


def test_a_gpu_that_the_build_does_not_use_is_advice() -> None:
    assert checks.gpu_check(True, nvidia=True).advice is None
    assert checks.gpu_check(False, nvidia=False).advice is None
    assert "GGML_CUDA=on" in str(checks.gpu_check(False, nvidia=True).advice)


def test_a_library_of_another_processor_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda _: True)
    monkeypatch.setattr(checks, "_ASK", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    (check,) = checks.checks()
    assert "can do more than this one" in str(check.problem)
    monkeypatch.setattr(checks, "_ASK", "raise OSError('libgomp.so.1: cannot open shared object file')")
    (check,) = checks.checks()
    assert "libgomp.so.1" in str(check.problem)
    assert "Compile it again" in str(check.problem)


def test_without_it_the_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    (check,) = checks.checks()
    assert "apt-get install g++" in str(check.problem)


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: see `make test`")
def test_here_it_loads_and_the_command_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "llamacpp"]) == 0
    out = capsys.readouterr().out
    assert "loads" in out
    assert "compiled for" in out
    assert "can run here" in out


def test_a_process_that_hangs_or_dies_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.python_says("print(1); print(2)") == (["1", "2"], None)
    assert doctor.python_says("import sys; sys.exit(3)") == ([], "it ended with code 3")
    monkeypatch.setattr(doctor, "_IMPORT_S", 0.5)
    assert doctor.python_says("import time; time.sleep(60)")[1] == "it did not answer within 0 s"
