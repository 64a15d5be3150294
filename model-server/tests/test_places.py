"""Refused schemas: the reason says which keyword, and where."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher

from tgi_model_server.sampling.places import located

TEXT = {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"properties": {"a": {"not": TEXT}}}, 'Unimplemented keys: ["not"], at #/properties/a/not'),
        ({"properties": {"not": {"items": {"not": TEXT}}}}, 'keys: ["not"], at #/properties/not/items/not'),
        ({"enum": [{"not": 1}], "not": TEXT}, 'keys: ["not"], at #/not'),
        ({"type": "array", "uniqueItems": True}, 'keys: ["uniqueItems"], at #/uniqueItems'),
        ({"if": TEXT, "then": {"minLength": 2}}, 'keys: ["if", "then"], at #/if, #/then'),
        ({"$defs": {"a/b": {"contains": TEXT}}, "$ref": "#/$defs/a~1b"}, "at #/$defs/a~1b/contains"),
        (
            {"properties": {"a": {"oneOf": [{"minimum": 1}, {"maximum": 5}]}}},
            "`oneOf` is supported where no two of its schemas can hold together, at #/properties/a/oneOf",
        ),
        (
            {"properties": {"a": TEXT | {"format": "date"}, "b": TEXT | {"format": "shade"}}},
            "Unknown format: shade, at #/properties/b/format",
        ),
        (
            {"anyOf": [{"properties": {name: {"not": {}} for name in "abcde"}}]},
            'keys: ["not"], at #/anyOf/0/properties/a/not, '
            "#/anyOf/0/properties/b/not, #/anyOf/0/properties/c/not and 2 more",
        ),
    ],
)
def test_the_place_of_what_is_not_supported_is_told(schema: dict[str, Any], told: str) -> None:
    reason = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
    assert told in located(reason, schema)


def test_a_reason_that_names_no_keyword_stays_as_it_is() -> None:
    assert located("invalid multiple of", {"multipleOf": 0}) == "invalid multiple of"
