"""The values of the Backend protocol: every field says what it means, and options that would be ignored are refused."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from tgi_gateway import backend, stepping, types
from tgi_gateway.backend import OPTIONS, EngineOptions, flag_of, refuse_options
from tgi_gateway.errors import StartError
from tgi_gateway.settings import Settings


@pytest.mark.parametrize("module", [backend, types, stepping], ids=lambda module: module.__name__)
def test_every_field_of_a_public_value_says_what_it_means(module: Any) -> None:
    silent = []
    for owner in ast.parse(Path(module.__file__).read_text("utf-8")).body:
        if not isinstance(owner, ast.ClassDef):
            continue
        for statement, after in zip(owner.body, [*owner.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                silent += [] if told else [f"{owner.name}.{statement.target.id}"]
    assert silent == []


def test_every_option_of_an_engine_is_a_flag() -> None:
    for name in OPTIONS:
        assert flag_of(name).removeprefix("--").replace("-", "_") in Settings().public()


def refused(honoured: set[str], **given: Any) -> str:
    with pytest.raises(StartError) as error:
        refuse_options(EngineOptions(Path("m"), "m", **given), honoured)
    return str(error.value)


def test_options_that_an_engine_would_ignore_are_named_as_they_were_typed() -> None:
    told = refused({"max_total_tokens"}, dtype="bfloat16", quantize="gptq", max_total_tokens=9, memory_fraction=0.5)
    assert told == (
        "this engine does not support --dtype bfloat16, --cuda-memory-fraction 0.5, --quantize gptq. Leave that out"
    )
    assert "--lora-adapters a,b=/c." in refused(set(), lora_adapters=("a", "b=/c"))


def test_what_is_honoured_or_switches_something_off_is_not_refused() -> None:
    given: dict[str, Any] = {"dtype": "float32", "prefix_caching": False, "cuda_graphs": (), "trust_remote_code": True}
    refuse_options(EngineOptions(Path("m"), "m", extra={"n_threads": 4}, **given), {"dtype"})
    refuse_options(EngineOptions(Path("m"), "m"), ())
