"""`tgi-gateway convert --to gguf`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgi_backend_llamacpp.gguf_file import read_gguf
from tgi_gateway.cli import main
from tgi_gateway.hub import demo_model


def test_the_command_writes_a_file_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "demo.gguf"
    assert main(["convert", "--to", "gguf", "--type", "bf16", str(demo_model()), str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert read_gguf(target).tensors["token_embd.weight"].type == "BF16"
    assert main(["convert", "--to", "gguf", str(demo_model()), str(target)]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_type_that_is_none_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--to", "gguf", "--type", "q9_9", str(demo_model()), str(tmp_path / "demo.gguf")]) == 1
    assert "there is no GGUF type `q9_9`; allowed: f32" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
