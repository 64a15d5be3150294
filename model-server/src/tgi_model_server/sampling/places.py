"""Where in a JSON schema stands what the grammar library names as not supported, as JSON pointers (RFC 6901)."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

MAX_PLACES = 3
"""That are told; one is mostly the only one."""

_KEYS = re.compile(r"Unimplemented keys: (\[.*\])")
_FORMAT = re.compile(r"Unknown format: (\S+)")
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose keys are names, each of a schema."""
_DATA = frozenset({"const", "enum", "default", "examples", "required", "dependentRequired", "type"})
"""Keywords that hold no schema."""


def located(reason: str, schema: object) -> str:
    """`reason` with the places in `schema` of the keywords that it names, as far as it names some."""
    wanted: dict[str, str | None] = {}
    if found := _KEYS.search(reason):
        wanted = dict.fromkeys(json.loads(found[1]))
    elif found := _FORMAT.search(reason):
        wanted = {"format": found[1]}
    elif reason.startswith("oneOf constraints"):
        # Its own advice is about an option that no client has.
        reason, wanted = "`oneOf` is supported where no two of its schemas can hold together", {"oneOf": None}
    places = [at for at, keyword, value in _keywords(schema) if keyword in wanted and wanted[keyword] in (None, value)]
    if not places:
        return reason
    more = f" and {len(places) - MAX_PLACES} more" if len(places) > MAX_PLACES else ""
    return f"{reason}, at {', '.join(places[:MAX_PLACES])}{more}"


def _keywords(schema: object) -> Iterator[tuple[str, str, Any]]:
    """Place, name and value of every keyword; no recursion, as a client's schema may be deep."""
    todo: deque[tuple[str, object]] = deque([("#", schema)])
    while todo:
        at, inner = todo.popleft()
        if isinstance(inner, list):
            todo += [(f"{at}/{place}", each) for place, each in enumerate(inner)]
        elif isinstance(inner, dict):
            for keyword, value in inner.items():
                here = f"{at}/{_escaped(keyword)}"
                yield here, keyword, value
                if keyword in _NAMED and isinstance(value, dict):
                    todo += [(f"{here}/{_escaped(name)}", each) for name, each in value.items()]
                elif keyword not in _DATA:
                    todo.append((here, value))


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
