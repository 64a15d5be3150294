"""Tools: the families' forms of a call, which of them a model uses, and the grammar that holds a call to its schema."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tgi_gateway.prompt import calls
from tgi_gateway.prompt.answer import AnswerParser, CoroutineParser, Scanner, Steps
from tgi_gateway.prompt.calls import CallsParser
from tgi_gateway.prompt.reasoning import REASONING, Marks, marks_of, thoughts


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    """JSON schema of its arguments."""
    strict: bool = False

    def shown(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function | {"parameters": self.parameters}}


@dataclass(frozen=True, slots=True)
class Form:
    """How a family writes calls, in the way it was trained to. `call` has NAME and ARGUMENTS in it."""

    call: str
    before: str = ""
    between: str = ""
    after: str = ""

    trigger: str = ""
    """The mark that tells a call from words in the middle of an answer; empty: there is none that always comes."""
    alone: bool = False
    """An answer has one call only."""
    words: str = ""
    """What comes before an answer in words."""


def _call_id(_name: str, _place: int) -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id(_name: str, _place: int) -> str:
    """Mistral's templates refuse every other length."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def _telling_id(name: str, place: int) -> str:
    """Kimi's templates show the id where the model has to see the name."""
    return f"functions.{name}:{place}"


@dataclass(frozen=True, slots=True)
class Family:
    """How models of one family call tools."""

    parse: CallsParser
    form: Form
    marks: tuple[str, ...] = ()
    """What `parse` looks for; where it is a special token, the token has to be shown as text."""
    new_id: Callable[[str, int], str] = _call_id
    """The id of a call: of this name, after so many in the conversation."""
    thinks: Marks | None = None
    """How thoughts are written, where `parse` finds them itself."""


_BARE = Form('{"name": "NAME", "parameters": ARGUMENTS}', between="; ")
_HERMES_MARKS = ("<tool_call>", "</tool_call>")
_TAGGED = calls.marked(("<tool_call>",), ("</tool_call>",))
_TAGGED_JSON = Form('<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>', between="\n")
_MISTRAL_MARKS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
_PYTHON_MARKS = ("<|python_start|>", "<|python_end|>")
_HARMONY_MARKS = (
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|return|>",
    "<|call|>",
)
_COMMAND_R_MARKS = (
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|START_TEXT|>",
    "<|END_TEXT|>",
)

FAMILIES: Mapping[str, Family] = {
    "harmony": Family(
        calls.harmony,
        Form(
            "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS",
            alone=True,
            words="<|channel|>final<|message|>",
        ),
        _HARMONY_MARKS,
        thinks=Marks("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    ),
    "mistral": Family(
        calls.mistral,
        Form('{"name": "NAME", "arguments": ARGUMENTS}', "[TOOL_CALLS][", ", ", "]", "[TOOL_CALLS]"),
        _MISTRAL_MARKS,
        _short_id,
    ),
    "mistral_args": Family(
        calls.mistral, Form("[TOOL_CALLS]NAME[ARGS]ARGUMENTS", trigger="[TOOL_CALLS]"), _MISTRAL_MARKS, _short_id
    ),
    "deepseek_v3": Family(
        calls.sections(calls.DEEPSEEK_MARKS),
        Form(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "\n",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁calls▁begin｜>",
        ),
        calls.DEEPSEEK_MARKS,
    ),
    "deepseek_v31": Family(
        calls.sections(calls.DEEPSEEK_MARKS),
        Form(
            "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁calls▁begin｜>",
        ),
        calls.DEEPSEEK_MARKS,
    ),
    "kimi_k2": Family(
        calls.sections(calls.KIMI_MARKS),
        Form(
            "<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>ARGUMENTS<|tool_call_end|>",
            "<|tool_calls_section_begin|>",
            "",
            "<|tool_calls_section_end|>",
            "<|tool_calls_section_begin|>",
        ),
        calls.KIMI_MARKS,
        _telling_id,
    ),
    "command_r": Family(
        calls.command_r,
        Form(
            '    {"tool_name": "NAME", "parameters": ARGUMENTS}',
            "<|START_ACTION|>[\n",
            ",\n",
            "\n]<|END_ACTION|>",
            "<|START_ACTION|>",
        ),
        _COMMAND_R_MARKS,
    ),
    "command_r_plus": Family(
        calls.command_r,
        Form('    {"tool_name": "NAME", "parameters": ARGUMENTS}', "Action:\n```json\n[\n", ",\n", "\n]\n```"),
    ),
    "granite": Family(
        calls.marked(("<|tool_call|>",)),
        Form('{"name": "NAME", "arguments": ARGUMENTS}', "<|tool_call|>[", ", ", "]", "<|tool_call|>"),
        ("<|tool_call|>",),
    ),
    "phi4": Family(
        calls.marked(("<|tool_call|>",), ("<|/tool_call|>",)),
        Form('{"name": "NAME", "arguments": ARGUMENTS}', "<|tool_call|>[", ", ", "]<|/tool_call|>", "<|tool_call|>"),
        ("<|tool_call|>", "<|/tool_call|>"),
    ),
    "hermes": Family(_TAGGED, replace(_TAGGED_JSON, trigger="<tool_call>"), _HERMES_MARKS),
    # These write tags instead of JSON between the marks, so what follows the mark is left to them.
    "qwen3_coder": Family(_TAGGED, _TAGGED_JSON, _HERMES_MARKS),
    "glm": Family(_TAGGED, _TAGGED_JSON, _HERMES_MARKS),
    "pythonic": Family(calls.pythonic, _BARE, _PYTHON_MARKS),
    "llama3_json": Family(calls.leading(("<|python_tag|>",)), _BARE, ("<|python_tag|>",)),
    "json": Family(calls.leading(), _BARE),
}
"""By the name that `--tool-call-parser` takes."""

_SIGNS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("kimi_k2", ("<|tool_call_argument_begin|>",)),
    ("command_r", ("<|START_ACTION|>",)),
    ("command_r_plus", ("Action:", "```json", "tool_name")),
    ("phi4", ("<|/tool_call|>",)),
    ("phi4", ("<|tool|>", "<|/tool|>")),
    ("granite", ("<|tool_call|>",)),
    ("qwen3_coder", ("<tool_call>", "<function=")),
    ("glm", ("<tool_call>", "<arg_key>")),
    ("hermes", ("<tool_call>",)),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("func_name1(params_name1=",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ('"parameters": dictionary of argument name and its value',)),
)
"""What the chat templates of a family contain, the more telling ones first."""


def family_of(template: str) -> str:
    """The family of a model, by its chat template."""
    return next((name for name, signs in _SIGNS if all(sign in template for sign in signs)), "json")


def recognised(template: str, calls: str = "auto", reasoning: str = "auto") -> tuple[Family, Marks | None]:
    """How a model calls tools and writes its thoughts, by its chat template or by the names that the operator gives."""
    family = FAMILIES[family_of(template) if calls == "auto" else calls]
    if reasoning == "none":
        return replace(family, thinks=None), None
    if reasoning == "auto":
        return family, None if family.thinks is not None else marks_of(template)
    return family, REASONING[reasoning]


def parser(family: Family | None, tools: Sequence[Tool], marks: Marks | None, opened: bool) -> AnswerParser:
    """For one answer. Without a family no calls are looked for, without marks no thoughts.

    `opened`: the prompt ends inside a thought.
    """
    scanner = Scanner()
    offered = {tool.name: tool.parameters for tool in tools}

    def steps() -> Steps:
        if marks is not None:
            yield from thoughts(scanner, marks, opened)
        if family is not None:
            yield from family.parse(scanner, offered)
        yield from scanner.rest(scanner.text)

    return CoroutineParser(scanner, steps())
