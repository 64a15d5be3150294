"""The rules by which examples/ray sends requests to replicas, and its sum of metrics; without Ray."""

from __future__ import annotations

import json
import random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tgi_ray.exposition import merged
from tgi_ray.prefixes import BLOCK_BYTES, MAX_BLOCKS, Prefixes, blocks_of

SYSTEM = "You answer in one sentence. " * 40


def chat(*contents: str, **more: object) -> bytes:
    roles = ("system", "user", "assistant")
    messages = [{"role": roles[place % 3], "content": text} for place, text in enumerate(contents)]
    return json.dumps({"messages": messages, **more}).encode()


def shared(first: bytes, second: bytes, callers: tuple[bytes, bytes] = (b"", b"")) -> int:
    """How many blocks two requests have in common."""
    seen: Prefixes[str] = Prefixes(10_000)
    seen.add("a", blocks_of(first, callers[0]))
    return seen.matched("a", blocks_of(second, callers[1]))


# Blocks.


def test_requests_share_the_blocks_that_their_prompts_begin_with() -> None:
    text = json.dumps("hello " * 500).encode()
    body = b'{"inputs": ' + text + b"}"
    assert shared(body, body) == len(blocks_of(body)) == len(text) // BLOCK_BYTES
    assert len(SYSTEM) // BLOCK_BYTES <= shared(chat(SYSTEM, "first"), chat(SYSTEM, "second")) < 12
    assert shared(chat(SYSTEM, "a", "b"), chat(SYSTEM, "a", "b", "c" * 900)) >= len(SYSTEM) // BLOCK_BYTES
    assert shared(chat("A" + SYSTEM), chat("B" + SYSTEM)) == 0


def test_what_shares_no_cache_shares_no_blocks() -> None:
    body = chat(SYSTEM, "hello")
    assert shared(body, body, (b"Bearer a", b"Bearer b")) == 0
    assert shared(body, body, (b"Bearer a", b"Bearer a")) > 0
    assert shared(chat(SYSTEM, model="base"), chat(SYSTEM, model="adapter")) == 0
    assert shared(chat(SYSTEM, cache_salt="a"), chat(SYSTEM, cache_salt="b")) == 0


@pytest.mark.parametrize(
    "body",
    [{"inputs": SYSTEM}, {"prompt": SYSTEM}, {"prompt": list(range(400))}, {"instructions": SYSTEM, "input": "hi"}],
    ids=lambda body: next(iter(body)),
)
def test_every_dialects_prompt_is_found_whatever_stands_before_it(body: dict[str, object]) -> None:
    first, second = (json.dumps({"max_tokens": tokens, **body}).encode() for tokens in (5, 500))
    assert shared(first, second) > 5


def test_a_prompts_order_is_that_of_templates_and_not_of_fields() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": SYSTEM}}]
    assert shared(chat("x", "a", tools=tools), chat("y", "b", tools=tools)) >= len(SYSTEM) // BLOCK_BYTES


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"', b'{"inputs": 5}', b"{}", b"[" * 10_000])
def test_what_is_no_prompt_has_no_blocks(body: bytes) -> None:
    assert blocks_of(body) == ()


def test_a_prompt_has_a_bounded_number_of_blocks() -> None:
    assert len(blocks_of(json.dumps({"inputs": "x" * 1_000_000}).encode())) == MAX_BLOCKS


# Whom a request follows.


def favourite(prefixes: Prefixes[str], blocks: tuple[int, ...], **loads: int) -> str | None:
    return prefixes.favourite(blocks, loads, slack=4, factor=2.0)


def test_a_request_follows_the_longest_prefix_and_then_the_least_load() -> None:
    prefixes: Prefixes[str] = Prefixes(100)
    prefixes.add("a", (1, 2, 3))
    prefixes.add("b", (1, 2, 9))
    assert favourite(prefixes, (1, 2, 3, 4), a=1, b=0) == "a"
    assert favourite(prefixes, (1, 2, 9), a=0, b=1) == "b"
    assert favourite(prefixes, (1, 2), a=2, b=1) == "b"
    assert favourite(prefixes, (1, 2), a=2, b=1, c=0) == "b", "c has nothing of it"
    assert favourite(prefixes, (7, 8), a=0, b=0) is None
    assert favourite(prefixes, (), a=0, b=0) is None


def test_a_prefix_is_not_followed_to_who_is_much_busier() -> None:
    prefixes: Prefixes[str] = Prefixes(100)
    prefixes.add("a", (1, 2))
    assert favourite(prefixes, (1, 2), a=4, b=0) == "a"
    assert favourite(prefixes, (1, 2), a=5, b=0) is None
    assert favourite(prefixes, (1, 2), a=24, b=10) == "a"
    assert favourite(prefixes, (1, 2), a=25, b=10) is None
    prefixes.add("b", (1, 2))  # where the request went instead
    assert favourite(prefixes, (1, 2), a=25, b=11) == "b"


def test_a_replica_that_is_gone_is_forgotten() -> None:
    prefixes: Prefixes[str] = Prefixes(100)
    prefixes.add("a", (1, 2))
    prefixes.add("b", (1,))
    prefixes.keep(["b", "c"])
    assert favourite(prefixes, (1, 2), b=0, c=0) == "b"
    assert len(prefixes) == 1
    prefixes.keep([])
    assert len(prefixes) == 0


def test_what_was_not_used_for_longest_is_forgotten_first_and_leaves_before_what_they_grow_on() -> None:
    prefixes: Prefixes[str] = Prefixes(4)
    prefixes.add("a", (1, 2, 3))
    prefixes.add("a", (1, 8))
    assert prefixes.matched("a", (1, 2, 3)) == 3
    prefixes.add("a", (1, 8, 9))
    assert prefixes.matched("a", (1, 8, 9)) == 3
    assert prefixes.matched("a", (1, 2, 3)) == 2, "its leaf went"
    prefixes.add("a", (5, 6, 7, 8, 9, 10))
    assert (prefixes.matched("a", (5, 6, 7, 8, 9, 10)), len(prefixes)) == (4, 4)


def test_random_prompts_are_found_as_a_plain_list_of_them_finds_them() -> None:
    """As long as nothing is forgotten; and then never more, and within the bound."""
    chance = random.Random(3)
    roomy: Prefixes[int] = Prefixes(100_000)
    tight: Prefixes[int] = Prefixes(50)
    sent: list[tuple[int, tuple[int, ...]]] = []

    def prompt() -> tuple[int, ...]:
        path, blocks = 0, []
        for _ in range(chance.randrange(1, 12)):
            path = path * 3 + chance.randrange(1, 3)  # stands for the hash of all before it
            blocks.append(path)
        return tuple(blocks)

    def common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
        return sum(one == two for one, two in zip(first, second, strict=False))

    for _ in range(2000):
        blocks, replica = prompt(), chance.randrange(3)
        expected = max((common(blocks, old) for at, old in sent if at == replica), default=0)
        assert roomy.matched(replica, blocks) == expected
        assert tight.matched(replica, blocks) <= expected
        for prefixes in (roomy, tight):
            prefixes.add(replica, blocks)
        sent.append((replica, blocks))
        assert tight.matched(replica, blocks) == len(blocks)
        assert len(tight) <= 150


# Metrics.

ONE = """# HELP tgi_queue_size Requests that wait
# TYPE tgi_queue_size gauge
tgi_queue_size 3.0
# HELP tgi_request_failure Failures
# TYPE tgi_request_failure counter
tgi_request_failure{err="a b"} 1.0
tgi_request_failure{err="c"} 2.0
"""
OTHER = """# HELP tgi_request_failure Failures
# TYPE tgi_request_failure counter
tgi_request_failure{err="c"} 5.0
# HELP tgi_queue_size Requests that wait
# TYPE tgi_queue_size gauge
tgi_queue_size 4.0
"""


def test_metrics_of_several_replicas_are_one_text_with_the_replica_as_a_label() -> None:
    families = {family.name: family for family in text_string_to_metric_families(merged({"r1": ONE, "r2": OTHER}))}
    assert {name: family.documentation for name, family in families.items()} == {
        "tgi_queue_size": "Requests that wait",
        "tgi_request_failure": "Failures",
    }
    found = {
        (sample.name.removesuffix("_total"), sample.labels["replica"], sample.labels.get("err")): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert found == {
        ("tgi_queue_size", "r1", None): 3,
        ("tgi_queue_size", "r2", None): 4,
        ("tgi_request_failure", "r1", "a b"): 1,
        ("tgi_request_failure", "r1", "c"): 2,
        ("tgi_request_failure", "r2", "c"): 5,
    }
