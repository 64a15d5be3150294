"""What becomes of many JSON schemas: how many answers a running server gives, and whether each validates.

    tgi-gateway --max-concurrent-requests 256 &
    python bench/schemas.py http://localhost:3000 PATH... [--limit N] [--tokens N] [--seed N]

A PATH is a JSON file, or a folder of them: a schema, a list of schemas, or a list of `{"schema": ...}` as in the JSON
Schema Test Suite. Each schema is asked for once, with tokens drawn at temperature 1. It is then

* valid: the answer ended by itself, is JSON, and validates (Draft 2020-12, formats checked);
* cut: the answer was longer than --tokens, and says so by the finish reason `length`. A model that knows nothing of the
  schema writes strings without an end; nothing can be said of such an answer, and more tokens end only some;
* unchecked: it ended, but the checker cannot judge it, e.g. for a reference to another document;
* refused: the server said with a 422 why it cannot hold the schema;
* wrong: anything else. Each of these is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import httpx
import jsonschema

Outcome = Literal["valid", "cut", "unchecked", "refused", "wrong"]
AT_ONCE = 16


class Formats(jsonschema.FormatChecker):  # type: ignore[misc]
    """RFC 3339 knows a year 0000, Python does not: such a date is judged as of 2000, which has the same days."""

    def check(self, instance: object, format: str) -> None:
        if format == "date" and isinstance(instance, str) and instance.startswith("0000-"):
            instance = f"2000{instance[4:]}"
        super().check(instance, format)


def schemas_in(path: Path) -> Iterator[dict[str, Any]]:
    """The schemas of a file or folder; files that are no JSON are left out."""
    if path.is_dir():
        for inner in sorted(path.rglob("*.json")):
            yield from schemas_in(inner)
        return
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:
        return
    for item in content if isinstance(content, list) else [content]:
        schema = item.get("schema", item) if isinstance(item, dict) else None
        if isinstance(schema, dict):
            yield schema


def ask(client: httpx.Client, schema: dict[str, Any], tokens: int, seed: int) -> tuple[Outcome, str]:
    """What became of the schema, and why."""
    parameters = {
        "grammar": {"type": "json", "value": schema},
        "max_new_tokens": tokens,
        "do_sample": True,
        "seed": seed,
        "details": True,
    }
    response = client.post("/generate", json={"inputs": "JSON:", "parameters": parameters})
    if response.status_code != 200:
        why = f"{response.status_code}: {response.text[:200]}"
        return ("refused" if response.status_code == 422 else "wrong"), why
    answer = response.json()
    if answer["details"]["finish_reason"] == "length":
        return "cut", ""
    text = answer["generated_text"]
    checker = jsonschema.Draft202012Validator(schema, format_checker=Formats())
    try:
        checker.validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return "wrong", f"{text[:200]!r}: {str(error).splitlines()[0]}"
    except Exception as error:  # the checker's, e.g. of a reference to another document
        return "unchecked", f"cannot be checked: {error!r}"[:200]
    return "valid", ""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("path", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, help="at most so many schemas")
    parser.add_argument("--tokens", type=int, default=300, help="longest answer")
    parser.add_argument("--seed", type=int, default=0, help="of the first schema's draws; the next ones follow")
    given = parser.parse_args(argv)
    schemas = [schema for path in given.path for schema in schemas_in(path)][: given.limit]
    with httpx.Client(base_url=given.url, timeout=120) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        seeds = range(given.seed, given.seed + len(schemas))
        outcomes = list(
            pool.map(lambda each: ask(client, each[0], given.tokens, each[1]), zip(schemas, seeds, strict=True))
        )
    counts = Counter(outcome for outcome, _ in outcomes)
    print(f"{len(schemas)} schemas: " + ", ".join(f"{counts[name]} {name}" for name in get_args(Outcome)))
    reasons = Counter(why.partition("not valid: ")[2][:60] for outcome, why in outcomes if outcome == "refused")
    for reason, count in reasons.most_common(12):
        print(f"  refused {count:5}  {reason}")
    for schema, (outcome, why) in zip(schemas, outcomes, strict=True):
        if outcome == "wrong":
            print(f"  wrong: {json.dumps(schema)[:300]}\n    {why}")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
