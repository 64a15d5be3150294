"""Constrained generation with a random model: only the masks can make its answers valid."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from tgi_gateway.backend import ALL_FEATURES, Capabilities, EngineOptions
from tgi_gateway.errors import GatewayError, ValidationError
from tgi_gateway.testing.worker import write_byte_model
from tgi_gateway.types import Failed, Finished, Grammar, GrammarKind, Request, SamplingParams, StopRules
from tgi_model_server.backend import TorchBackend
from tgi_model_server.device import Device
from tgi_model_server.sampling import compiler as compiler_module
from tgi_model_server.sampling import masks as masks_module
from tgi_model_server.sampling.compiler import GrammarCompiler, Outcome
from tgi_model_server.sampling.grammar import Constraint, Vocabulary, compile_grammar
from tgi_model_server.testing.client import Client
from tgi_model_server.testing.devices import ReferenceDevice, StaticDevice
from tgi_model_server.testing.models import SMALL, save_random_model

EOS = 1
VOCAB_SIZE = 272
"""More logits than the byte tokenizer has tokens, as padded models have."""
CONFIG = {**SMALL, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 1024, "eos_token_id": EOS}
CAPABILITIES = Capabilities(features=ALL_FEATURES - {"lora"}, prefix_cache=True)
DEVICES = pytest.mark.parametrize("device", [ReferenceDevice, StaticDevice], ids=["depth-1", "static-depth-2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_random_model(tmp_path_factory.mktemp("model"), CONFIG)
    write_byte_model(made)
    return made


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without an end-of-sequence token."""
    made = save_random_model(tmp_path_factory.mktemp("endless"), {**CONFIG, "eos_token_id": None})
    write_byte_model(made)
    (made / "tokenizer_config.json").unlink()  # it names one
    return made


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary:
    return Vocabulary.load(folder, VOCAB_SIZE, (EOS,))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Reader(Client):
    """With its answers as text."""

    def __init__(self, backend: TorchBackend, vocabulary: Vocabulary) -> None:
        super().__init__(backend)
        self._vocabulary = vocabulary

    async def texts(self, *requests: Request) -> list[str]:
        """Submit all at once; their texts once all have ended."""
        await self.run(*requests)
        return [self.text(request.request_id) for request in requests]

    def text(self, request_id: int) -> str:
        tokens = [token for token in self.tokens[request_id] if token != EOS]
        return self._vocabulary.tokenizer.decode_bytes(tokens).decode(errors="replace")

    def reason(self, request_id: int) -> str:
        """Why it finished, or how it failed."""
        end = self.ends[request_id]
        return end.reason if isinstance(end, Finished) else f"{end.error_type}: {end.message}"


@asynccontextmanager
async def serving(
    folder: Path, vocabulary: Vocabulary, device: Callable[[], Device], **options: Any
) -> AsyncIterator[Reader]:
    options = {"max_batch_size": 16, "max_batch_total_tokens": 16 * 800, **options}
    backend = TorchBackend(device, EngineOptions(folder, "small", **options), CAPABILITIES)
    client = Reader(backend, vocabulary)
    await backend.start(client.emit)
    try:
        yield client
    finally:
        await backend.stop(0.0)


def asked(request_id: int, kind: GrammarKind | None, source: object = None, new: int = 700, **changes: Any) -> Request:
    """A sampled request; hot, so that whatever the grammar allows does happen."""
    text = source if isinstance(source, str) else json.dumps(source)
    grammar = None if kind is None else Grammar(kind, text)
    draw = random.Random(request_id)
    prompt = tuple(draw.randrange(2, 250) for _ in range(12))
    sampling = SamplingParams(do_sample=True, temperature=4.0, seed=request_id, grammar=grammar)
    return replace(Request(request_id, prompt, sampling, StopRules(new)), **changes)


class Schemas:
    """Diverse schemas whose every instance is short."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def make(self, depth: int = 0) -> dict[str, Any]:
        kinds = ["integer", "number", "text", "pattern", "format", "enum", "const", "flag", "nothing", "union"]
        if depth < 3:
            kinds += ["object", "object", "array", "either", "fixed"]
        kind = self._draw.choice(["object", "array", "either"] if depth == 0 else kinds)
        made: dict[str, Any] = getattr(self, f"_{kind}")(depth)
        return made

    def _integer(self, depth: int) -> dict[str, Any]:
        del depth
        low = self._draw.randrange(-300, 300)
        high = low + self._draw.randrange(0, 5000)
        if self._draw.random() < 0.3:
            return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 2}
        return {"type": "integer", "minimum": low, "maximum": high}

    def _number(self, depth: int) -> dict[str, Any]:
        del depth
        low = self._draw.randrange(-50, 50) / 4
        return {"type": "number", "minimum": low, "maximum": low + self._draw.randrange(1, 80) / 8}

    def _text(self, depth: int) -> dict[str, Any]:
        del depth
        least = self._draw.randrange(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self._draw.randrange(0, 8)}

    def _pattern(self, depth: int) -> dict[str, Any]:
        del depth
        patterns = ["^[a-f0-9]{4}$", "^(ja|nein)+x$", "^[A-Z][a-zé]{1,6}$", r"^\d{3}-\d{2}$", '^[^a-z"\\\\]{2}漢?$']
        return {"type": "string", "pattern": self._draw.choice(patterns)}

    def _format(self, depth: int) -> dict[str, Any]:
        del depth
        return {"type": "string", "format": self._draw.choice(["date", "uuid", "ipv4"])}

    def _enum(self, depth: int) -> dict[str, Any]:
        del depth
        values: list[Any] = ["rot", "grün", "漢字", 'quo"te', "\n", "", 1, -2.5, True, None, {"a": [1]}, [], "🦜"]
        return {"enum": self._draw.sample(values, self._draw.randrange(1, 6))}

    def _const(self, depth: int) -> dict[str, Any]:
        del depth
        return {"const": self._draw.choice(["fest", 7, False, None, {"k": "v"}, [1, "zwei"]])}

    def _flag(self, depth: int) -> dict[str, Any]:
        del depth
        return {"type": "boolean"}

    def _nothing(self, depth: int) -> dict[str, Any]:
        del depth
        return {"type": "null"}

    def _union(self, depth: int) -> dict[str, Any]:
        del depth
        return {"type": ["boolean", "null"]}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._draw.sample(["name", "größe", "a b", "x", "id", "値", 'q"', "tags"], self._draw.randrange(1, 5))
        properties = {name: self.make(depth + 1) for name in names}
        required = [name for name in names if self._draw.random() < 0.6]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._draw.randrange(0, 3)
        most = least + self._draw.randrange(0, 3)
        return {"type": "array", "items": self.make(depth + 1), "minItems": least, "maxItems": most}

    def _fixed(self, depth: int) -> dict[str, Any]:
        parts = [self.make(depth + 1) for _ in range(self._draw.randrange(1, 3))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}

    def _either(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.make(depth + 1) for _ in range(self._draw.randrange(2, 4))]}


BY_HAND: list[dict[str, Any]] = [
    {
        "$defs": {"leaf": {"type": "integer", "minimum": 0, "maximum": 9}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/leaf"}, "b": {"type": "array", "items": {"$ref": "#/$defs/leaf"}}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 5}, {"type": "boolean"}]},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "propertyNames": {"enum": ["a", "b"]}},
    {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "null"}}, "additionalProperties": False},
]


@DEVICES
async def test_every_finished_answer_validates(
    folder: Path, vocabulary: Vocabulary, device: Callable[[], Device]
) -> None:
    schemas = [*BY_HAND, *(Schemas(seed).make() for seed in range(80))]
    async with serving(folder, vocabulary, device) as client:
        texts = await client.texts(*(asked(n, "json_schema", schema) for n, schema in enumerate(schemas)))
        refused = [n for n in range(len(schemas)) if isinstance(client.ends[n], Failed)]
        assert {client.reason(n) for n in refused} <= {
            'validation: grammar is not valid: Unimplemented keys: ["propertyNames"], at #/propertyNames'
        }
        whole = [n for n in range(len(schemas)) if client.reason(n) == "eos_token"]
        assert len(whole) >= len(schemas) - 4  # a few may run into their length
        for n in whole:
            checker = jsonschema.Draft202012Validator(schemas[n], format_checker=jsonschema.FormatChecker())
            checker.validate(json.loads(texts[n]))
            assert client.tokens[n][-1] == EOS
        assert len({texts[n] for n in whole}) > 60


@DEVICES
async def test_expressions_choices_and_grammars_hold(
    folder: Path, vocabulary: Vocabulary, device: Callable[[], Device]
) -> None:
    choices = ["yes", "no", 'say "hi"\n', "naïve", "/slash\\", "ye"]
    lark = 'start: pair ("," pair)*\npair: NAME "=" NUMBER\nNAME: /[a-z]{1,4}/\nNUMBER: /[0-9]{2}/'
    gbnf = 'root ::= item+ ";"\nitem ::= "a" | "b"'
    async with serving(folder, vocabulary, device) as client:
        numbers = range(0, 40, 5)
        requests = [
            request
            for n in numbers
            for request in (
                asked(n, "regex", r"[A-Z]{2}\d{3,5}(-ö)?"),
                asked(n + 1, "choice", choices),
                asked(n + 2, "lark", lark, new=200),
                asked(n + 3, "lark", gbnf),
                asked(n + 4, None, new=30),
            )
        ]
        await client.texts(*requests)
        for n in numbers:
            assert re.fullmatch(r"[A-Z]{2}[0-9]{3,5}(-ö)?", client.text(n))
            assert client.text(n + 1) in choices
            assert re.match(r"[a-z]{1,4}=[0-9]{2}(,|$)", client.text(n + 2))
            assert re.fullmatch("[ab]+;", client.text(n + 3))
            assert {client.reason(n), client.reason(n + 1), client.reason(n + 3)} == {"eos_token"}
        assert len({client.text(n + 1) for n in numbers}) > 2


@DEVICES
async def test_constrained_rows_change_nothing_for_the_others_nor_for_each_other(
    folder: Path, vocabulary: Vocabulary, device: Callable[[], Device]
) -> None:
    schemas = [Schemas(seed).make() for seed in range(100, 108)]
    mixed = [asked(n, "json_schema" if n % 2 else None, schemas[n] if n % 2 else None, new=120) for n in range(8)]
    async with serving(folder, vocabulary, device) as client:
        alone = [(await client.texts(request))[0:1] and client.tokens[request.request_id] for request in mixed]
        await client.texts(*(replace(request, request_id=100 + n) for n, request in enumerate(mixed)))
        assert [client.tokens[100 + n] for n in range(8)] == alone


@DEVICES
async def test_a_preempted_answer_goes_on_where_its_grammar_was(
    folder: Path, vocabulary: Vocabulary, device: Callable[[], Device]
) -> None:
    requests = [asked(n, "regex", "([a-z]{3}-){30}end", new=140) for n in range(8)]
    async with serving(folder, vocabulary, device) as roomy:
        expected = await roomy.texts(*requests)
    assert all(re.fullmatch("([a-z]{3}-){30}end", text) for text in expected)
    async with serving(
        folder, vocabulary, device, max_total_tokens=160, max_batch_total_tokens=400, max_batch_prefill_tokens=48
    ) as tight:
        assert await tight.texts(*requests) == expected
        assert tight.backend.capacity().preemptions > 0


REFUSED: list[tuple[GrammarKind, str, str]] = [
    ("json", '{"type": "strin"}', "Invalid type"),
    ("json", "[1]", "a JSON schema must be an object"),
    ("json", "{", "Expecting"),
    ("json", '{"type": "object", "properties": {"a": false}, "required": ["a"]}', "unsatisfiable"),
    ("json", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json", '{"$ref": "#"}', "nothing can match it"),
    ("json", '{"$ref": "http://127.0.0.1:9/x.json"}', "does not fetch"),
    ("json", '{"$ref": "file:///etc/passwd"}', "does not fetch"),
    ("json", '{"x-guidance": {"lenient": true}, "type": "array", "uniqueItems": true}', "uniqueItems"),
    ("regex", "[a-z", "unclosed character class"),
    ("regex", "(?=a)b", "look-around"),
    ("choice", "[]", "one text or more"),
    ("choice", '{"a": 1}', "one text or more"),
    ("lark", "start: missing", "missing"),
    ("lark", "start: start", "nothing can match it"),
    ("lark", "root ::= (", "grammar is not valid"),
    ("lark", 'start: <|endoftext|> "a"', "grammar is not valid"),
    ("regex", "a" * 40_000, "40000 characters; allowed are"),
]

EXPLOSIVE: list[tuple[GrammarKind, str]] = [
    ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    ("regex", "(.*a.{200}){50}"),
    ("regex", "(" * 5000 + "a" + ")" * 5000),
    ("regex", "(a|b*)" * 2000),
    ("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
    ("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(2000)) + '\nr2000: "a"'),
    ("lark", "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(40)) + '\nR40: "a"'),
    ("lark", "start: A\nA: ~(/.*a.{30}/) & /.*b.{30}/"),
    ("json", json.dumps({"allOf": [{"anyOf": [{"const": [i, j]} for j in range(2)]} for i in range(24)]})),
    ("json", json.dumps({"type": "array", "minItems": 10**7, "items": {"type": "integer"}})),
    ("json", json.dumps({"type": "string", "maxLength": 10**9})),
    ("json", '{"items":' * 120 + "{}" + "}" * 120),
    (
        "json",
        json.dumps(
            {
                "$defs": {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(1800)}
                | {"a1800": {"type": "null"}},
                "$ref": "#/$defs/a0",
            }
        ),
    ),
]


async def test_a_broken_grammar_is_refused_with_its_reason_and_its_neighbours_are_served(
    folder: Path, vocabulary: Vocabulary
) -> None:
    async with serving(folder, vocabulary, ReferenceDevice) as client:
        neighbours = [asked(1000 + n, "regex" if n % 2 else None, "[0-9]{20}", new=60) for n in range(6)]
        expected = await client.texts(*neighbours)
        again = [replace(request, request_id=request.request_id + 1000) for request in neighbours]
        broken = [asked(n, kind, source) for n, (kind, source, _) in enumerate(REFUSED)]
        texts = await client.texts(*broken, *again)
        assert texts[len(broken) :] == expected
        for n, (_, _, reason) in enumerate(REFUSED):
            assert client.reason(n).startswith("validation: grammar is not valid"), REFUSED[n]
            assert reason in client.reason(n)
            assert len(client.reason(n)) < 500
            assert not client.tokens[n]
        capacity = client.backend.capacity()
        assert (capacity.free_sequences, capacity.free_kv_tokens) == (16, capacity.total_kv_tokens)


async def test_explosive_grammars_end_and_harm_nobody(folder: Path, vocabulary: Vocabulary) -> None:
    async with serving(folder, vocabulary, ReferenceDevice) as client:
        explosive = [asked(n, kind, source, new=20) for n, (kind, source) in enumerate(EXPLOSIVE)]
        expected = await client.texts(asked(1000, "regex", "[0-9]{20}"))
        texts = await client.texts(*explosive, asked(2000, "regex", "[0-9]{20}"))
        assert re.fullmatch("[0-9]{20}", expected[0])
        assert re.fullmatch("[0-9]{20}", texts[-1])
        assert {client.reason(n).partition(":")[0] for n in range(len(explosive))} <= {
            "validation",
            "length",
            "eos_token",
        }


async def test_masks_of_another_thread_and_of_several_are_the_same(
    folder: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [asked(n, "json_schema", Schemas(200 + n).make(), new=60) for n in range(8)]
    async with serving(folder, vocabulary, ReferenceDevice) as client:
        expected = await client.texts(*requests)
    monkeypatch.setattr(masks_module, "_THREAD_WORDS", 0)
    monkeypatch.setattr(masks_module, "_PARALLEL_ROWS", 2)
    async with serving(folder, vocabulary, ReferenceDevice) as client:
        assert await client.texts(*requests) == expected


@DEVICES
async def test_a_grammar_goes_before_the_minimum_length_and_ignored_ends(
    folder: Path, vocabulary: Vocabulary, device: Callable[[], Device]
) -> None:
    async with serving(folder, vocabulary, device) as client:
        complete = asked(1, "regex", "abc", stop=StopRules(20, min_new_tokens=10))
        open_ended = asked(2, "regex", "[ab]*", stop=StopRules(20, min_new_tokens=10))
        ignoring = asked(3, "regex", "abc", stop=StopRules(20, ignore_eos=True))
        forever = asked(4, "regex", "[ab]*", stop=StopRules(20, ignore_eos=True))
        stopping = asked(5, "regex", "[ab]*", stop=StopRules(20, stop_token_ids=tuple(range(2, 258))))
        exact = asked(6, "regex", "abc", stop=StopRules(3))
        texts = await client.texts(complete, open_ended, ignoring, forever, stopping, exact)
        assert texts[0] == texts[2] == texts[5] == "abc"
        assert [client.reason(n) for n in (1, 3, 6)] == ["eos_token", "eos_token", "length"]
        assert len(texts[1]) >= 10
        assert re.fullmatch("[ab]{20}", texts[3])
        assert client.reason(4) == "length"
        assert re.fullmatch("[ab]", texts[4])
        assert client.reason(5) == "stop_sequence"


@DEVICES
async def test_a_complete_answer_ends_without_an_end_of_sequence_token(
    endless: Path, vocabulary: Vocabulary, device: Callable[[], Device]
) -> None:
    async with serving(endless, vocabulary, device) as client:
        texts = await client.texts(asked(1, "regex", "abc", new=20), asked(2, None, new=20))
        assert texts[0] == "abc"
        assert client.reason(1) == "eos_token"
        end = client.ends[1]
        assert isinstance(end, Finished)
        assert end.usage.generated_tokens == len(client.tokens[1]) == 3
        assert len(client.tokens[2]) == 20


async def test_filters_and_penalties_leave_the_grammar_its_tokens(folder: Path, vocabulary: Vocabulary) -> None:
    settings: list[dict[str, Any]] = [
        {"top_p": 0.1},
        {"top_k": 1},
        {"min_p": 0.9},
        {"typical_p": 0.2},
        {"repetition_penalty": 1.5, "frequency_penalty": 2.0},
        {"logit_bias": tuple((token, -100.0) for token in range(2, 258))},
        {"logit_bias": ((EOS, 100.0), (0, 100.0))},
        {"watermark": True},
        {"do_sample": False},
    ]
    async with serving(folder, vocabulary, ReferenceDevice) as client:
        base = asked(0, "regex", "([0-9]{4} ){4}")
        requests = [
            replace(base, request_id=n, sampling=replace(base.sampling, **each)) for n, each in enumerate(settings)
        ]
        for text in await client.texts(*requests):
            assert re.fullmatch("([0-9]{4} ){4}", text)


async def test_a_model_without_a_tokenizer_refuses_grammars_alone(tmp_path: Path, vocabulary: Vocabulary) -> None:
    folder = save_random_model(tmp_path, CONFIG)
    async with serving(folder, vocabulary, ReferenceDevice) as client:
        await client.texts(asked(1, "regex", "a"), asked(2, None, new=5))
        assert client.reason(1).startswith("validation: grammars need a tokenizer.json")
        assert client.reason(2) in ("length", "eos_token")


async def test_logprobs_are_those_of_the_unmasked_model(folder: Path, vocabulary: Vocabulary) -> None:
    free = asked(1, None, new=1, sampling=SamplingParams(), logprobs=True, top_n_tokens=5)
    async with serving(folder, vocabulary, ReferenceDevice) as client:
        await client.texts(free)
        await client.texts(replace(free, request_id=2, sampling=SamplingParams(grammar=Grammar("regex", "[0-9]"))))
        tops = [events.top[0] for events in client.steps if events.top]
        # The second prompt comes from the prefix cache: the reference device then rounds differently.
        assert [token for token, _ in tops[0]] == [token for token, _ in tops[1]]
        assert [value for _, value in tops[0]] == pytest.approx([value for _, value in tops[1]], abs=1e-4)


class Ledger:
    """What a compiler handed over."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.cancelled: list[int] = []
        self._told = threading.Condition()

    def ready(self, request: Request, arrived_s: float, outcome: Outcome) -> None:
        assert arrived_s > 0
        with self._told:
            assert request.request_id not in self.outcomes
            self.outcomes[request.request_id] = outcome
            self._told.notify_all()

    def wait(self, *request_ids: int) -> None:
        with self._told:
            assert self._told.wait_for(lambda: self.outcomes.keys() >= set(request_ids), 30)


def test_many_requests_of_one_grammar_compile_it_once(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Grammar] = []

    def counted(vocabulary: Vocabulary, grammar: Grammar) -> Any:
        compiled.append(grammar)
        return compile_grammar(vocabulary, grammar)

    monkeypatch.setattr(compiler_module, "compile_grammar", counted)
    ledger = Ledger()
    compiler = GrammarCompiler(lambda: vocabulary, ledger.ready, ledger.cancelled.append)
    compiler.start()
    for n in range(20):
        compiler.submit(asked(n, "regex", "a+"))
        compiler.submit(asked(100 + n, "regex", "(?=a)"))
    ledger.wait(*range(20), *range(100, 120))
    assert sorted(grammar.source for grammar in compiled) == ["(?=a)", "a+"]
    matchers = {id(outcome.matcher) for outcome in ledger.outcomes.values() if isinstance(outcome, Constraint)}
    assert len(matchers) == 20
    assert sum(isinstance(outcome, ValidationError) for outcome in ledger.outcomes.values()) == 20
    assert compiler.waiting == 0
    compiler.stop(1.0)


def test_the_cache_is_bounded(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "CACHED_GRAMMARS", 4)
    ledger = Ledger()
    compiler = GrammarCompiler(lambda: vocabulary, ledger.ready, ledger.cancelled.append)
    compiler.start()
    for n in range(30):
        compiler.submit(asked(n, "regex", f"a{{{n}}}b"))
    ledger.wait(*range(30))
    assert all(isinstance(outcome, Constraint) for outcome in ledger.outcomes.values())
    assert len(compiler._jobs) <= 4
    compiler.stop(0.0)


def test_what_waits_for_its_grammar_can_be_cancelled_and_is_not_compiled(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    gate = threading.Event()

    def gated(vocabulary: Vocabulary, grammar: Grammar) -> Any:
        compiled.append(grammar.source)
        assert gate.wait(30)
        return compile_grammar(vocabulary, grammar)

    monkeypatch.setattr(compiler_module, "compile_grammar", gated)
    ledger = Ledger()
    compiler = GrammarCompiler(lambda: vocabulary, ledger.ready, ledger.cancelled.append)
    compiler.start()
    for n in range(5):
        compiler.submit(asked(n, "regex", f"{n}"))
    assert compiler.waiting == 5
    assert compiler.cancel(0)  # perhaps being compiled
    assert compiler.cancel(4)  # still queued
    assert not compiler.cancel(4)
    assert not compiler.cancel(77)
    compiler.submit(asked(1, "regex", "again"))
    refused = compiler.waiting
    gate.set()
    assert refused == 3
    assert ledger.outcomes[0] == ledger.outcomes[4] == "cancelled"
    assert isinstance(ledger.outcomes[1], GatewayError)  # the id is in use
    ledger.outcomes.pop(1)
    ledger.wait(1, 2, 3)
    assert "4" not in compiled
    compiler.stop(0.0)


def test_stop_waits_for_what_is_open_and_refuses_the_rest(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def gated(vocabulary: Vocabulary, grammar: Grammar) -> Any:
        assert gate.wait(30)
        return compile_grammar(vocabulary, grammar)

    monkeypatch.setattr(compiler_module, "compile_grammar", gated)
    ledger = Ledger()
    compiler = GrammarCompiler(lambda: vocabulary, ledger.ready, ledger.cancelled.append)
    compiler.start()
    compiler.submit(asked(1, "regex", "a"))
    compiler.stop(0.0)
    compiler.stop(0.0)
    compiler.submit(asked(2, "regex", "a"))
    gate.set()
    ledger.wait(1, 2)
    kinds = [outcome.error_type for outcome in ledger.outcomes.values() if isinstance(outcome, GatewayError)]
    assert kinds == ["incomplete_generation", "healthcheck"]


async def test_a_cancel_while_compiling_ends_the_request_and_frees_its_place(
    folder: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def gated(vocabulary: Vocabulary, grammar: Grammar) -> Any:
        assert gate.wait(30)
        return compile_grammar(vocabulary, grammar)

    monkeypatch.setattr(compiler_module, "compile_grammar", gated)
    async with serving(folder, vocabulary, ReferenceDevice) as client:
        client.backend.submit(asked(1, "regex", "[ab]*"))
        client.backend.submit(asked(2, "regex", "[ab]{5}"))
        assert client.backend.capacity().free_sequences == 14
        client.backend.cancel(1)
        await client.until(lambda: 1 in client.ends)
        assert client.reason(1) == "cancelled"
        assert client.backend.capacity().free_sequences == 15
        await client.texts(asked(3, None, new=5))  # the step loop goes on meanwhile
        assert 2 not in client.ends
        gate.set()
        await client.until(lambda: 2 in client.ends)
        assert re.fullmatch("[ab]{5}", client.text(2))
        assert not client.tokens[1]
