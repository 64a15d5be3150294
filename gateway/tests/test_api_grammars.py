"""Every way to ask for a constrained answer means the same Grammar, and what cannot be one is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tgi_gateway.api import decoding
from tgi_gateway.api.bodies import ChatBody, CompletionBody, GenerateBody
from tgi_gateway.api.grammars import MAX_CHOICES, MAX_SCHEMA_DEPTH, constraint_of, grammar_of
from tgi_gateway.errors import Unsupported, ValidationError
from tgi_gateway.types import MAX_GRAMMAR_CHARACTERS, Grammar

SCHEMA = {"type": "object", "properties": {"ä": {"type": "integer", "maximum": 10**30}}}
TEXT = json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":"))
JSON, NAMED, ANY = Grammar("json", TEXT), Grammar("json_schema", TEXT), Grammar("json", '{"type":"object"}')
REGEX, LARK, CHOICE = Grammar("regex", "[a-z]+"), Grammar("lark", 'start: "a"'), Grammar("choice", '["a","b"]')


def native(grammar: Any) -> Grammar | None:
    raw = json.dumps({"inputs": "a", "parameters": {"grammar": grammar}}).encode()
    return grammar_of(decoding.decode(raw, GenerateBody).parameters.grammar)


def chat(**fields: Any) -> Grammar | None:
    raw = json.dumps({"messages": [{"role": "user", "content": "a"}], **fields}).encode()
    return constraint_of(decoding.decode(raw, ChatBody))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None),
        ({"type": "json", "value": SCHEMA}, JSON),
        ({"type": "json", "value": TEXT}, JSON),
        ({"type": "json_object", "value": SCHEMA}, JSON),
        ({"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}, NAMED),
        ({"type": "regex", "value": "[a-z]+"}, REGEX),
        ({"type": "choice", "value": ["a", "b"]}, CHOICE),
        ({"type": "lark", "value": 'start: "a"'}, LARK),
    ],
)
def test_native_forms(given: Any, meant: Grammar | None) -> None:
    assert native(given) == meant
    assert chat(response_format=given) == meant


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ANY),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, NAMED),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            NAMED,
        ),
        ({"guided_json": SCHEMA}, JSON),
        ({"guided_json": TEXT}, JSON),
        ({"guided_regex": "[a-z]+"}, REGEX),
        ({"guided_choice": ["a", "b"]}, CHOICE),
        ({"guided_grammar": 'start: "a"'}, LARK),
        ({"guided_grammar": None, "structured_outputs": {"regex": None}}, None),
        ({"structured_outputs": {"json": SCHEMA}}, JSON),
        ({"structured_outputs": {"regex": "[a-z]+"}}, REGEX),
        ({"structured_outputs": {"choice": ["a", "b"]}}, CHOICE),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, LARK),
        ({"structured_outputs": {"json_object": True}}, ANY),
        ({"guided_regex": "[a-z]+", "response_format": {"type": "text"}}, REGEX),
    ],
)
def test_forms_of_the_openai_routes(fields: dict[str, Any], meant: Grammar | None) -> None:
    assert chat(**fields) == meant
    raw = json.dumps({"prompt": "a", **fields}).encode()
    assert constraint_of(decoding.decode(raw, CompletionBody)) == meant


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "`guided_regex` and `guided_choice` exclude each other"),
        (
            {"guided_json": {}, "response_format": {"type": "json_object"}},
            "`response_format` and `guided_json` exclude each other",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "`regex` and `choice` exclude each other"),
        ({"guided_choice": []}, "a choice must be a list of strings, at least one"),
        ({"response_format": {"type": "choice", "value": "a"}}, "a choice must be a list of strings"),
        ({"response_format": {"type": "choice", "value": [1]}}, "a choice must be a list of strings"),
        ({"response_format": {"type": "lark", "value": {}}}, "a lark must be a string"),
        ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "choices are given; allowed are"),
        ({"guided_json": 3}, "grammar is not supported"),
        ({"guided_json": "{"}, "grammar is not valid: "),
        ({"guided_regex": "a" * (MAX_GRAMMAR_CHARACTERS["regex"] + 1)}, "characters; allowed are"),
        ({"guided_json": {"description": "a" * MAX_GRAMMAR_CHARACTERS["json"]}}, "characters; allowed are"),
        ({"guided_json": '{"const": "\\ud800"}'}, "grammar is not valid: "),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "needs an object `schema`"),
    ],
)
def test_what_cannot_be_a_grammar_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        chat(**fields)


@pytest.mark.parametrize("name", ["structural_tag", "whitespace_pattern"])
def test_what_vllm_has_besides_is_refused_by_name(name: str) -> None:
    with pytest.raises(Unsupported, match=name):
        chat(structured_outputs={"json_object": True, name: "x"})


def test_schemas_are_bounded_in_depth() -> None:
    schema: dict[str, Any] = {}
    for _ in range(MAX_SCHEMA_DEPTH - 1):
        schema = {"items": schema}
    assert chat(guided_json=schema) is not None
    with pytest.raises(ValidationError, match="nested more than"):
        chat(guided_json={"items": schema})
    with pytest.raises(ValidationError, match="grammar is not valid"):
        chat(guided_json='{"items":' * 20_000 + "{}" + "}" * 20_000)
