"""The grammar of an answer with tool calls: the family's own form around arguments that keep their tool's schema.

It is written in Lark as llguidance reads it, with the schemas embedded. Special and other added tokens are no text
there, so marks that are such tokens are named by their ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from tgi_gateway.prompt.reasoning import Marks
from tgi_gateway.prompt.tools import Form, Tool
from tgi_gateway.types import Grammar

_WORDS = r"WORDS: /(.|\n)+/"
_COMPOUNDS = frozenset({"$ref", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties", "propertyNames"})


def required(
    form: Form,
    tools: Sequence[Tool],
    added: Mapping[str, int],
    *,
    parallel: bool,
    thinks: Marks | None,
    opened: bool,
    otherwise: str | None = None,
) -> Grammar:
    """The answer is calls and nothing else, or JSON of the schema `otherwise`; a thought may come before.

    `added`: ids of the tokenizer's added tokens by their text. `opened`: the prompt ends inside a thought.
    """
    writer = _Writer(added)
    choices = [writer.calls(form, tools, parallel=parallel, lenient=False)] if tools else []
    if otherwise is not None:
        choices.append(_row(writer.literal(form.words), "%json", _json(json.loads(otherwise), lenient=False)))
    start = f"({' | '.join(choices)})"
    if thinks is not None:
        begin = "" if opened else writer.literal(thinks.begin)
        thought = _row(begin, writer.until(thinks.end), "SPACE")
        writer.rules.append("SPACE: /[ \\n]{0,4}/")
        start = f"{thought if opened else f'({thought})?'} {start}"
    return writer.grammar(start)


def allowed(
    form: Form, tools: Sequence[Tool], added: Mapping[str, int], ends: Collection[int], *, parallel: bool
) -> Grammar:
    """The answer is free, but what follows the mark of a call keeps to the form and the schema.

    Keywords of a schema that cannot be held are ignored, unless the tool is `strict`. `ends` are the tokens that end a
    generation. The form must have a trigger.
    """
    writer = _Writer(added)
    others = sorted(set(added.values()) - set(ends) - {added.get(form.trigger, -1)})
    before = writer.until(form.trigger, others)
    calls = writer.calls(form, tools, parallel=parallel, lenient=True, triggered=True)
    words = writer.words(others)
    return writer.grammar(f"({before} {calls})* {words}" if parallel else f"{words} | {before} {calls}")


class _Writer:
    def __init__(self, added: Mapping[str, int]) -> None:
        self._added = added
        self._tokens = _pattern(tuple(added))
        self.rules: list[str] = []

    def grammar(self, start: str) -> Grammar:
        return Grammar("lark", "\n".join([f"start: {start}", *self.rules]) + "\n")

    def literal(self, text: str) -> str:
        """`text` as terminals: added tokens by id, the rest quoted."""
        parts: list[str] = []
        at = 0
        for found in self._tokens.finditer(text) if self._tokens is not None else ():
            parts += [_quoted(text[at : found.start()]), f"<[{self._added[found[0]]}]>"]
            at = found.end()
        return _row(*parts, _quoted(text[at:]))

    def words(self, others: Sequence[int]) -> str:
        """Any text, also empty, and the added tokens `others`."""
        self.rules += [f"words: (WORDS | <[{_ranges(others)}]>)*" if others else "words: WORDS?", _WORDS]
        return "words"

    def until(self, mark: str, others: Sequence[int] = ()) -> str:
        """Any text, with the added tokens `others` in it, up to the first `mark`, which is included."""
        first = self._tokens.match(mark) if self._tokens is not None else None
        if first is not None:
            self.rules.append(f"before: (BEFORE | <[{_ranges(others)}]>)*" if others else "before: BEFORE?")
            self.rules.append(f"BEFORE{_WORDS.removeprefix('WORDS')}")
            return f"before {self.literal(mark)}"
        self.rules.append(f"before[lazy]: /(.|\\n)*/ {_quoted(mark)}")
        if others:
            self.rules.append(f"odd: (/(.|\\n)*/ <[{_ranges(others)}]>)*")
            return "odd before"
        return "before"

    def calls(
        self, form: Form, tools: Sequence[Tool], *, parallel: bool, lenient: bool, triggered: bool = False
    ) -> str:
        """Calls of `tools`; `triggered`: the form's trigger has been read already."""
        head, tail = form.call.split("ARGUMENTS")
        opening, closing = head.split("NAME")
        names = " | ".join(f"tool_{place}" for place in range(len(tools)))
        self.rules += [
            f"tool_{place}: {self.literal(tool.name + closing)} %json {_schema(tool, lenient)} {self.literal(tail)}"
            for place, tool in enumerate(tools)
        ]
        first, again = form.before + opening, ""
        if triggered:
            first = first.partition(form.trigger)[2]
        # Where each call has a trigger of its own, the next one begins with that.
        if parallel and not form.alone and (form.before or not triggered):
            self.rules.append(f"call: {self.literal(opening)} ({names})")
            again = f"({self.literal(form.between)} call)*"
        return _row(self.literal(first), f"({names})", again, self.literal(form.after))


@lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """Finds the tokens in a text, the longest first."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _row(*parts: str) -> str:
    """One after the other, leaving out what is empty."""
    return " ".join(part for part in parts if part)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _ranges(ids: Sequence[int]) -> str:
    """``3-7,9``."""
    parts: list[str] = []
    start = previous = ids[0]
    for token in [*ids[1:], -1]:
        if token != previous + 1:
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = token
        previous = token
    return ",".join(parts)


def _schema(tool: Tool, lenient: bool) -> str:
    schema: dict[str, Any] = {"type": "object", **tool.parameters}
    if "properties" in schema and not _COMPOUNDS & schema.keys():
        # The tool would hardly understand arguments that it does not describe.
        schema.setdefault("additionalProperties", False)
    return _json(schema, lenient=lenient and not tool.strict)


def _json(schema: Mapping[str, Any], *, lenient: bool) -> str:
    # At most one space between parts: models without an opinion otherwise fill their budget with white space.
    guidance = {"whitespace_pattern": "[ ]?", "lenient": lenient}
    return json.dumps({**schema, "x-guidance": guidance}, ensure_ascii=False, separators=(",", ":"))
