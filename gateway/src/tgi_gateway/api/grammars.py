"""Every way to ask for a constrained answer, as one Grammar: TGI's, OpenAI's and vLLM's.

What is cheap is checked here; whether a grammar compiles, the engine finds out and tells as the request's own error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from tgi_gateway.api.bodies import GrammarBody, SamplingBody, StructuredOutputs
from tgi_gateway.errors import Unsupported, ValidationError
from tgi_gateway.types import Grammar, GrammarKind

MAX_SCHEMA_DEPTH = 64
"""Objects and lists within each other."""
MAX_CHOICES = 4096


def grammar_of(body: GrammarBody | None) -> Grammar | None:
    """TGI's `grammar`, and `response_format` in TGI's and OpenAI's forms. Raises `ValidationError`."""
    if body is None or body.type == "text":
        return None
    value: object = body.value
    match body.type:
        case "regex" | "lark":
            return _text(body.type, value)
        case "choice":
            return _choice(value)
        case "json_schema":
            described = body.json_schema if body.json_schema is not None else value
            schema = described.get("schema") if isinstance(described, dict) else None
            if not isinstance(schema, dict):
                raise ValidationError("grammar is not valid: `json_schema` needs an object `schema`")
            return _schema("json_schema", schema)
        case _:
            value = body.schema if value is UNSET else value
            return _schema("json", {"type": "object"} if value is UNSET else value)


def constraint_of(body: SamplingBody) -> Grammar | None:
    """What an OpenAI body asks for, under whichever name; at most one. Raises `ValidationError`, `Unsupported`."""
    if body.guided_whitespace_pattern is not None:
        raise Unsupported("`guided_whitespace_pattern` is not supported")
    found = {
        "response_format": grammar_of(body.response_format),
        "structured_outputs": _structured(body.structured_outputs),
        "guided_json": None if body.guided_json is None else _schema("json", body.guided_json),
        "guided_regex": None if body.guided_regex is None else _text("regex", body.guided_regex),
        "guided_choice": None if body.guided_choice is None else _choice(body.guided_choice),
        "guided_grammar": None if body.guided_grammar is None else _text("lark", body.guided_grammar),
    }
    return _only(found)


def _structured(wanted: StructuredOutputs | None) -> Grammar | None:
    if wanted is None:
        return None
    for name in ("structural_tag", "whitespace_pattern"):
        if getattr(wanted, name) is not None:
            raise Unsupported(f"`structured_outputs.{name}` is not supported")
    found = {
        "json": None if wanted.json is None else _schema("json", wanted.json),
        "regex": None if wanted.regex is None else _text("regex", wanted.regex),
        "choice": None if wanted.choice is None else _choice(wanted.choice),
        "grammar": None if wanted.grammar is None else _text("lark", wanted.grammar),
        "json_object": _schema("json", {"type": "object"}) if wanted.json_object else None,
    }
    return _only(found)


def _only(found: dict[str, Grammar | None]) -> Grammar | None:
    given = {name: grammar for name, grammar in found.items() if grammar is not None}
    if len(given) > 1:
        raise ValidationError(f"{' and '.join(f'`{name}`' for name in given)} exclude each other; give one of them")
    return next(iter(given.values()), None)


def _text(kind: GrammarKind, value: object) -> Grammar:
    if not isinstance(value, str):
        raise ValidationError(f"grammar is not valid: a {kind} must be a string")
    return _bounded(Grammar(kind, value))


def _choice(value: object) -> Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise ValidationError("grammar is not valid: a choice must be a list of strings, at least one")
    if len(value) > MAX_CHOICES:
        raise ValidationError(f"grammar is not valid: {len(value)} choices are given; allowed are {MAX_CHOICES}")
    return _bounded(Grammar("choice", _json(value)))


def _schema(kind: GrammarKind, value: object) -> Grammar:
    """`value` is a JSON schema, or the text of one."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValidationError(f"grammar is not valid: {error}") from None
    if not isinstance(value, dict):
        raise ValidationError("grammar is not supported")
    if depth(value) > MAX_SCHEMA_DEPTH:
        raise ValidationError(f"grammar is not valid: its parts are nested more than {MAX_SCHEMA_DEPTH} deep")
    return _bounded(Grammar(kind, _json(value)))


def _json(value: object) -> str:
    # Not msgspec: it knows no integers beyond 64 bits.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def depth(value: object) -> int:
    """Nesting of objects and lists, counted no further than what is too deep."""
    levels = 0
    level: Sequence[object] = [value]
    while levels <= MAX_SCHEMA_DEPTH:
        inner: list[object] = []
        nested = False
        for each in level:
            if isinstance(each, dict):
                nested = True
                inner.extend(each.values())
            elif isinstance(each, list):
                nested = True
                inner.extend(each)
        if not nested:
            break
        levels += 1
        level = inner
    return levels


def _bounded(grammar: Grammar) -> Grammar:
    excess = grammar.excess()
    if excess is not None:
        raise ValidationError(f"grammar is not valid: {excess}")
    return grammar
