"""How model families write tool calls: one coroutine each, from the growing text of an answer to its parts.

What only looks like a call becomes text, as it was written. Once a call's name is known it is a call: its arguments
are passed on as they grow, whatever they turn out to be.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from tgi_gateway.prompt.answer import Malformed, Scanner, Steps

Tools: TypeAlias = Mapping[str, Mapping[str, Any]]
"""The parameters' JSON schema of each tool on offer, by name."""
CallsParser: TypeAlias = Callable[[Scanner, Tools], Steps]

_NAME_KEYS = frozenset({"name", "tool_name", "function_name"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters", "args", "input"})
_OTHER_KEYS = frozenset({"id", "type", "tool_call_id", "function", "index"})
_IDENTIFIER = re.compile(r"[A-Za-z_][\w.\-]*")


def _call_object(s: Scanner, only: Tools | None) -> Steps:
    """One ``{"name": ..., "arguments": {...}}``. With `only`, it is a call only if it names one of these tools.

    Raises `Malformed`.
    """
    yield from s.literal("{")
    begun = False
    early: list[str] = []
    """Arguments that came before the name."""
    given = False
    if (yield from s.peek()) == "}":
        raise Malformed
    while True:
        key = yield from s.string()
        yield from s.literal(":")
        if key in _NAME_KEYS or (key == "function" and (yield from s.peek()) == '"'):
            name = yield from s.string()
            if begun or not name or (only is not None and name not in only):
                raise Malformed
            s.begin(name)
            begun = True
            if given:
                s.arguments("".join(early))
        elif key == "function" and not begun:
            yield from _call_object(s, only)
            begun = given = True
        elif key in _ARGUMENT_KEYS:
            yield from _arguments(s, s.arguments if begun else early.append)
            given = True
        elif only is not None and not begun and key not in _OTHER_KEYS:
            raise Malformed
        else:
            yield from s.value(_nowhere)
        if (yield from s.peek()) != ",":
            break
        s.take(1)
    yield from s.literal("}")
    if not begun:
        raise Malformed
    if not given:
        s.arguments("{}")


def _arguments(s: Scanner, emit: Callable[[str], None]) -> Steps:
    """An object as it is, or the text of one."""
    first = yield from s.peek()
    if first == '"':
        emit((yield from s.string()).strip() or "{}")
    elif first == "n":
        yield from s.value(_nowhere)
        emit("{}")
    else:
        yield from s.value(emit)


def _nowhere(_: str) -> None:
    pass


def _call_objects(s: Scanner, only: Tools | None) -> Steps:
    """A call, several in a list, or several one after the other."""
    if (yield from s.peek()) == "[":
        s.take(1)
        yield from _call_object(s, only)
        while (yield from s.peek()) == ",":
            s.take(1)
            yield from _call_object(s, only)
        yield from s.literal("]")
        return
    yield from _call_object(s, only)
    while (yield from s.peek()) in (";", ","):
        s.take(1)
        yield from _call_object(s, only)


def _attempt(s: Scanner, before: str, steps: Steps) -> Generator[None, None, bool]:
    """Run `steps`; what they consumed is text, after `before`, unless they began a call. Returns whether they did."""
    s.checkpoint(before)
    with suppress(Malformed):
        yield from steps
    if s.committed:
        return True
    s.restore()
    return False


def marked(begins: tuple[str, ...], ends: tuple[str, ...] = ()) -> CallsParser:
    """JSON calls between marks: Hermes, Qwen, Granite, Phi, Command-R. Without an end mark they end the answer."""

    def parse(s: Scanner, tools: Tools) -> Steps:
        while mark := (yield from s.until(begins, s.text)):
            if not (yield from _attempt(s, mark, _marked_call(s, tools))):
                continue
            # What stands between the call and its end mark belongs to neither.
            if ends:
                while (yield from s.until((*ends, *begins), _nowhere)) in begins:
                    yield from _attempt(s, "", _marked_call(s, tools))

    return parse


def _marked_call(s: Scanner, tools: Tools) -> Steps:
    first = yield from s.peek()
    if first == "<":
        yield from _tagged_call(s, tools)
    elif first in ("{", "["):
        yield from _call_objects(s, None)
    else:
        yield from _keyed_call(s, tools)


def _keyed_call(s: Scanner, tools: Tools) -> Steps:
    """GLM: the name, then ``<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>`` for each argument.

    Only the name of a tool on offer makes a call of it.
    """
    name = yield from _identifier(s)
    if name not in tools:
        raise Malformed
    s.begin(name)
    yield from _keyed_arguments(s, tools, name, ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>"))


def _keyed_arguments(s: Scanner, tools: Tools, name: str, key: tuple[str, str], value: tuple[str, str]) -> Steps:
    """Arguments between tags, each as JSON of the type that the tool's schema says."""
    properties = tools.get(name, {}).get("properties")
    separator = "{"
    while True:
        yield from s.peek()
        if not (yield from s.starts_with(key[0])):
            break
        argument = yield from _line_until(s, key[1])
        if value[0]:
            yield from s.literal(value[0])
        parts: list[str] = []
        if not (yield from s.until((value[1],), parts.append)):
            raise Malformed
        schema = properties.get(argument) if isinstance(properties, dict) else None
        s.arguments(f"{separator}{json.dumps(argument, ensure_ascii=False)}: {_typed(''.join(parts), schema)}")
        separator = ", "
    s.arguments("{}" if separator == "{" else "}")


def _tagged_call(s: Scanner, tools: Tools) -> Steps:
    """Qwen3-Coder: ``<function=NAME><parameter=KEY>VALUE</parameter>...</function>``."""
    yield from s.literal("<function=")
    name = yield from _line_until(s, ">")
    s.begin(name)
    yield from _keyed_arguments(s, tools, name, ("<parameter=", ">"), ("", "</parameter>"))
    yield from s.literal("</function>")


def _typed(text: str, schema: object) -> str:
    """A value that was written without quotes, as JSON of the type that its schema says."""
    text = text.removeprefix("\n").removesuffix("\n")
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind != "string":
        try:
            return json.dumps(json.loads(text), ensure_ascii=False)
        except (ValueError, RecursionError):
            if text.strip() in ("True", "False"):
                return text.strip().lower()
    return json.dumps(text, ensure_ascii=False)


def _line_until(s: Scanner, mark: str) -> Generator[None, None, str]:
    parts: list[str] = []
    if not (yield from s.until((mark,), parts.append)):
        raise Malformed
    name = "".join(parts).strip()
    if not name or "\n" in name:
        raise Malformed
    return name


def leading(tags: tuple[str, ...] = ()) -> CallsParser:
    """JSON calls that are the whole answer, or follow one of `tags`: Llama 3, and models without a form of their own.

    Only the name of a tool on offer makes a call of an object.
    """

    def parse(s: Scanner, tools: Tools) -> Steps:
        yield from _attempt(s, "", _fenced_call(s, tools))
        while mark := (yield from s.until(tags, s.text)):
            yield from _attempt(s, mark, _call_objects(s, tools))

    return parse


def _fenced_call(s: Scanner, tools: Tools) -> Steps:
    yield from s.peek()
    fence = yield from s.starts_with("```json", "```")
    yield from _call_objects(s, tools)
    if fence:
        yield from s.literal("```")


def pythonic(s: Scanner, tools: Tools) -> Steps:
    """Llama 3.2 and 4: ``[name(key="value", other=3), second()]``, also between ``<|python_start|>`` marks."""
    yield from _attempt(s, "", _call_expressions(s, tools))
    while mark := (yield from s.until(("<|python_start|>", "<|python_end|>"), s.text)):
        if mark == "<|python_start|>":
            yield from _attempt(s, mark, _call_expressions(s, tools))


def _call_expressions(s: Scanner, tools: Tools) -> Steps:
    yield from s.peek()
    yield from s.starts_with("<|python_start|>")
    if (yield from s.peek()) == "{":
        yield from _call_objects(s, tools)  # the form in which calls are required
        return
    yield from s.literal("[")
    yield from _call_expression(s, tools)
    while (yield from s.peek()) == ",":
        s.take(1)
        yield from _call_expression(s, tools)
    yield from s.literal("]")


def _call_expression(s: Scanner, tools: Tools) -> Steps:
    yield from s.peek()
    name = yield from _identifier(s)
    yield from s.literal("(")
    if name not in tools:
        raise Malformed
    s.begin(name)
    separator = "{"
    while (yield from s.peek()) != ")":
        key = yield from _identifier(s)
        yield from s.literal("=")
        value = yield from _expression(s)
        s.arguments(f"{separator}{json.dumps(key)}: {value}")
        separator = ", "
        if (yield from s.peek()) == ",":
            s.take(1)
    s.take(1)
    s.arguments("{}" if separator == "{" else "}")


def _identifier(s: Scanner) -> Generator[None, None, str]:
    while True:
        found = _IDENTIFIER.match(s.buffer)
        if found is not None and (found.end() < len(s.buffer) or s.ended):
            return s.take(found.end())
        if s.ended or (s.buffer and found is None):
            raise Malformed
        yield


def _expression(s: Scanner) -> Generator[None, None, str]:
    """One Python literal, which a ``,`` or ``)`` outside of all brackets and quotes ends, as JSON."""
    depth, quote, at = 0, "", 0
    while True:
        while at < len(s.buffer):
            char = s.buffer[at]
            if quote:
                if char == "\\":
                    at += 1
                elif char == quote:
                    quote = ""
            elif char in "\"'":
                quote = char
            elif char in "([{":
                depth += 1
            elif depth == 0 and char in ",)]}":
                return _literal_json(s.take(at).strip())
            elif char in ")]}":
                depth -= 1
            at += 1
        yield from s.more()


def _literal_json(text: str) -> str:
    try:
        return json.dumps(ast.literal_eval(text), ensure_ascii=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)  # true, false, null
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)


def mistral(s: Scanner, _: Tools) -> Steps:
    """``[TOOL_CALLS] [{"name": ..., "arguments": {...}}]``, later ``[TOOL_CALLS]name[ARGS]{...}`` for each call."""
    mark = yield from s.until(("[TOOL_CALLS]",), s.text)
    while mark:
        yield from _attempt(s, mark, _mistral_call(s))
        mark = yield from s.until(("[TOOL_CALLS]",), s.text)


def _mistral_call(s: Scanner) -> Steps:
    first = yield from s.peek()
    if first in ("[", "{"):
        # The list's bracket may be that of the next mark.
        yield from _call_objects(s, None)
        return
    name = yield from _name_before(s, ("[CALL_ID]", "[ARGS]", "{"))
    s.begin(name)
    yield from s.value(s.arguments)


def _name_before(s: Scanner, marks: tuple[str, ...]) -> Generator[None, None, str]:
    parts: list[str] = []
    mark = yield from s.until(marks, parts.append)
    name = "".join(parts).strip()
    if not mark or not name or "\n" in name:
        raise Malformed
    if mark == "[CALL_ID]":
        mark = yield from s.until(("[ARGS]", "{"), _nowhere)
    if mark == "{":
        s.buffer = mark + s.buffer
    return name


DEEPSEEK_MARKS = tuple(f"<｜tool▁{word}｜>" for word in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"))
KIMI_MARKS = tuple(
    f"<|tool_{word}|>"
    for word in ("calls_section_begin", "call_begin", "call_argument_begin", "call_end", "calls_section_end")
)
_KIMI_NAME = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?")


def sections(marks: tuple[str, ...]) -> CallsParser:
    """DeepSeek and Kimi: a section of calls, each a name, a mark, and the arguments.

    DeepSeek-V3 and R1 write a kind before that mark, and after it the name and the arguments in a fence.
    """
    section_begin, call_begin, middle, call_end, section_end = marks

    def parse(s: Scanner, _: Tools) -> Steps:
        while mark := (yield from s.until((section_begin, call_begin), s.text)):
            if mark == section_begin:
                yield from s.peek()
                inner = yield from s.starts_with(call_begin)
                if not inner:
                    s.text(mark)
                    continue
                mark += inner
            while mark:
                if not (yield from _attempt(s, mark, _section_call(s, middle))):
                    break
                mark = yield from s.until((call_end, section_end, call_begin), _nowhere)
                if mark == call_end:
                    yield from s.peek()
                    mark = yield from s.starts_with(call_begin, section_end)
                if mark == section_end:
                    break

    return parse


def _section_call(s: Scanner, middle: str) -> Steps:
    name = yield from _line_until(s, middle)
    if (yield from s.peek()) != "{":
        name = yield from _line_until(s, "\n")
        yield from s.literal("```")
        yield from s.starts_with("json")
        if (yield from s.peek()) != "{":
            raise Malformed
    found = _KIMI_NAME.fullmatch(name)
    assert found is not None, "_line_until gives no empty name"
    s.begin(found[1])
    yield from s.value(s.arguments)


def command_r(s: Scanner, _: Tools) -> Steps:
    """R7B and A: a list between marks, the answer in marks as well. The first ones: ``Action:`` and a fenced list."""
    marks = ("<|START_ACTION|>", "Action: ```json", "Action:\n```json")
    shells = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")
    while mark := (yield from s.until((*marks, *shells), s.text)):
        if mark in shells:
            continue
        end = "<|END_ACTION|>" if mark == marks[0] else "```"
        if (yield from _attempt(s, mark, _call_objects(s, None))):
            yield from s.until((end,), _nowhere)


def harmony(s: Scanner, _: Tools) -> Steps:
    """gpt-oss: messages with a channel and perhaps a recipient, each ``header<|message|>body<|end|>``.

    https://cookbook.openai.com/articles/openai-harmony. The prompt ends with ``<|start|>assistant``.
    """
    ends = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
    while True:
        header: list[str] = []
        mark = yield from s.until(("<|message|>", *ends), header.append)
        if mark != "<|message|>":
            if not mark:
                s.text("".join(header) if "<|channel|>" not in "".join(header) else "")
                return
            if mark not in ("<|start|>", "<|end|>") or "".join(header).strip() not in ("", "assistant"):
                s.text("".join(header))
            continue
        yield from _harmony_body(s, "".join(header), ends)


_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.\-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def _harmony_body(s: Scanner, header: str, ends: tuple[str, ...]) -> Steps:
    recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
    if recipient is not None:
        s.begin(recipient[1])
        if (yield from s.peek()) in ("<", ""):
            s.arguments("{}")
        yield from s.until(ends, s.arguments)
    elif channel is not None and channel[1] == "analysis":
        yield from s.until(ends, s.thought)
    else:
        yield from s.until(ends, s.text)
