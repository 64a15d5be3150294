"""Fuzz targets, guided by coverage: python tests/fuzz/targets.py NAME [libFuzzer's options, such as -max_total_time=60]

Each takes what somebody else may send or publish, and allows the one error that is meant for it; anything else is a
find, whose input libFuzzer writes to a file.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tgi_gateway.prompt", "tgi_model_server.weights", "tgi_backend_llamacpp"]):
    from tgi_backend_llamacpp.gguf_file import read_gguf
    from tgi_gateway.errors import ModelError, TemplateError
    from tgi_gateway.prompt.answer import joined
    from tgi_gateway.prompt.chat_template import ChatTemplate, Limits
    from tgi_gateway.prompt.reasoning import REASONING
    from tgi_gateway.prompt.tools import FAMILIES, Tool, parser
    from tgi_model_server.weights.checkpoint import Checkpoint

TOOLS = (Tool("add", None, {"type": "object", "properties": {"a": {"type": "number"}}}),)
MARKS = [None, *REASONING.values()]
# What the inputs are made of, so that the fuzzer need not find them letter by letter.
ANSWERS = (
    *(text for marks in REASONING.values() for text in (marks.begin, marks.end)),
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<｜tool▁calls▁begin｜>", "<|channel|>"),
    *("<|message|>", '{"name": "add", "arguments": {"a": 1}}', '[{"name": "add"', "add(a=1)", "```json\n"),
    *('"', "\\", "{", "}", "[", "]"),
)
PHRASES = (
    *("{{ m.content }}", "{{ m }}", "{% if m %}", "{% endif %}", "{% set x = m %}", "{% set x = 'a' * 9 %}", "{{ x }}"),
    *("{{ m | tojson }}", "{{ x | upper }}", "{{ '%5d' % 1 }}", "{{ x[0:2] }}", "{% macro f(a) %}", "{% endmacro %}"),
    *("{{ f(1) }}", "{{ namespace(a=1) }}", "{% for y in range(9) %}", "{% endfor %}", "{{ raise_exception('no') }}"),
)
REAL_HEADERS = 0xC0
"""Inputs whose first byte is below begin as real files do; the others are files of nothing but the fuzzer's."""
FILE = Path(tempfile.mkdtemp()) / "fuzzed"


def compose(source: atheris.FuzzedDataProvider, phrases: Sequence[str]) -> str:
    """A text of some of the phrases and of anything else."""
    parts = []
    for _ in range(source.ConsumeIntInRange(1, 12)):
        known = source.ConsumeBool()
        parts.append(source.PickValueInList(list(phrases)) if known else source.ConsumeUnicodeNoSurrogates(6))
    return "".join(parts)


def answers(data: bytes) -> None:
    """An answer means the same however it is cut, and none makes a parser fail."""
    source = atheris.FuzzedDataProvider(data)
    family = source.PickValueInList([None, *FAMILIES.values()])
    marks = source.PickValueInList(MARKS)
    opened = source.ConsumeBool() and marks is not None
    text = compose(source, ANSWERS)
    whole = parser(family, TOOLS, marks, opened)
    wanted = joined(whole.push(text) + whole.flush())
    cut, draw, at = parser(family, TOOLS, marks, opened), random.Random(len(data)), 0
    parts = []
    while at < len(text):
        size = draw.randint(1, 4)
        parts += cut.push(text[at : at + size])
        at += size
    assert joined(parts + cut.flush()) == wanted


def templates(data: bytes) -> None:
    """A model's template renders, or fails as a template, within its limits."""
    text = compose(atheris.FuzzedDataProvider(data), PHRASES)
    source = "{% for m in messages %}" + text + "{% endfor %}"
    with suppress(TemplateError):
        ChatTemplate({"default": source}, {}, Limits(seconds=1.0)).render([{"role": "user", "content": "a"}])


def safetensors(data: bytes) -> None:
    """A file is sound or refused."""
    if data and data[0] < REAL_HEADERS:
        header = b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}' + data[1:]
        data = len(header).to_bytes(8, "little") + header + bytes(4)
    FILE.write_bytes(data)
    with suppress(ModelError):
        Checkpoint([FILE]).close()


def gguf(data: bytes) -> None:
    """A file is sound or refused."""
    FILE.write_bytes(b"GGUF\3\0\0\0" + data[1:] if data and data[0] < REAL_HEADERS else data)
    with suppress(ModelError):
        read_gguf(FILE)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "answers": answers,
    "templates": templates,
    "safetensors": safetensors,
    "gguf": gguf,
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)} [libFuzzer's options]")
    logging.disable()
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()
