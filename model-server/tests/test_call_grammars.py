"""Grammars of tool calls, compiled and followed: what they hold, what they leave free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llguidance.numpy import fill_next_token_bitmask

from tgi_demo_model import model_path
from tgi_gateway.errors import ValidationError
from tgi_gateway.prompt import call_grammar
from tgi_gateway.prompt.reasoning import REASONING
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.prompt.tools import FAMILIES, Tool
from tgi_gateway.testing.worker import write_byte_model
from tgi_gateway.types import Grammar
from tgi_model_server.sampling.grammar import Vocabulary, compile_grammar

WEATHER = Tool("get_weather", None, {"properties": {"city": {"type": "string"}}, "required": ["city"]})
ADD = Tool("add", None, {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
TOOLS = (WEATHER, ADD)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city":"Ö<tool\\n"}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "add", "arguments": {"b": 1}}\n</tool_call>'
UNKNOWN = '<tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call>'
Follows = Callable[[Grammar, str], bool]
HERMES = FAMILIES["hermes"].form


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(model_path())


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary.load(model_path(), tokenizer.vocab_size, tokenizer.eos_token_ids)


@pytest.fixture
def follows(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Follows:
    def follows(grammar: Grammar, answer: str) -> bool:
        """Whether `answer`, in the model's own tokens, keeps to the grammar up to a possible end."""
        matcher = compile_grammar(vocabulary, grammar)
        ids = list(tokenizer.encode(answer, False).ids)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    return follows


def required(tokenizer: Tokenizer, *, parallel: bool = True, thinks: bool = False, opened: bool = False) -> Grammar:
    marks = REASONING["think"] if thinks else None
    added = tokenizer.added_tokens
    return call_grammar.required(HERMES, TOOLS, added, parallel=parallel, thinks=marks, opened=opened)


def test_required_calls_are_calls_of_the_tools_and_nothing_else(tokenizer: Tokenizer, follows: Follows) -> None:
    grammar = required(tokenizer)
    assert follows(grammar, CALL)
    assert follows(grammar, f"{CALL}\n{OTHER}")
    for answer in ("", "hello", f"Hi {CALL}", f"{CALL} yes", WRONG, UNKNOWN, f"{CALL}{CALL}"):
        assert not follows(grammar, answer)
    assert not follows(required(tokenizer, parallel=False), f"{CALL}\n{CALL}")


def test_a_thought_may_come_before_required_calls(tokenizer: Tokenizer, follows: Follows) -> None:
    grammar = required(tokenizer, thinks=True)
    assert follows(grammar, CALL)
    assert follows(grammar, f"<think>\nWhich one?\n</think>\n\n{CALL}")
    assert not follows(grammar, f"Which one?\n</think>\n\n{CALL}")
    grammar = required(tokenizer, thinks=True, opened=True)
    assert follows(grammar, f"\nWhich one?\n</think>\n\n{CALL}")
    assert not follows(grammar, "Which one?</think>hello")
    assert not follows(grammar, CALL)


def test_json_may_be_the_answer_instead_of_calls(tokenizer: Tokenizer, follows: Follows) -> None:
    wanted = '{"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}'
    for tools in (TOOLS, ()):
        grammar = call_grammar.required(
            HERMES,
            tools,
            tokenizer.added_tokens,
            parallel=True,
            thinks=REASONING["think"],
            opened=True,
            otherwise=wanted,
        )
        assert follows(grammar, 'Hm.</think>{"x": 1}')
        assert not follows(grammar, "Hm.</think>Hello")
        assert not follows(grammar, '{"x": 1}')
        assert follows(grammar, f"Hm.</think>\n{CALL}") is bool(tools)


@pytest.mark.parametrize("parallel", [True, False])
def test_allowed_calls_leave_words_free_and_hold_what_follows_the_mark(
    tokenizer: Tokenizer, follows: Follows, parallel: bool
) -> None:
    grammar = call_grammar.allowed(HERMES, TOOLS, tokenizer.added_tokens, tokenizer.eos_token_ids, parallel=parallel)
    for answer in ("", "Hello!", CALL, f"Let me see.\n{OTHER}", "<tools> {", "</tool_call>", "<|im_start|>user"):
        assert follows(grammar, answer)
    for answer in ("<tool_call>", "<tool_call>hello", WRONG, UNKNOWN, f"Hm {WRONG}"):
        assert not follows(grammar, answer)
    assert follows(grammar, f"{CALL}\n{CALL}\nDone.") is parallel


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("parallel", [True, False])
def test_every_familys_grammar_compiles(
    name: str, parallel: bool, tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    family, added = FAMILIES[name], tokenizer.added_tokens
    for thinks in (family.thinks, *REASONING.values()):
        compile_grammar(
            vocabulary,
            call_grammar.required(family.form, TOOLS, added, parallel=parallel, thinks=thinks, opened=False),
        )
    if family.form.trigger:
        compile_grammar(
            vocabulary, call_grammar.allowed(family.form, TOOLS, added, tokenizer.eos_token_ids, parallel=parallel)
        )


@pytest.mark.parametrize(
    ("family", "good"),
    [
        ("mistral_args", '[TOOL_CALLS]add[ARGS]{"a": 1}'),
        (
            "kimi_k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
            '{"a": 1}<|tool_call_end|><|tool_calls_section_end|>',
        ),
    ],
)
def test_marks_that_are_special_tokens_are_let_through_where_they_belong(
    family: str, good: str, tmp_path: Path
) -> None:
    marks = FAMILIES[family].marks
    write_byte_model(tmp_path, more_special=marks)
    tokenizer = Tokenizer.from_folder(tmp_path)
    vocabulary = Vocabulary.load(tmp_path, tokenizer.vocab_size, tokenizer.eos_token_ids)
    form, added = FAMILIES[family].form, tokenizer.added_tokens

    def allows(grammar: Grammar, answer: str) -> bool:
        """As the step loop does it: a mask before each token."""
        matcher = compile_grammar(vocabulary, grammar)
        for token in tokenizer.encode(answer, False).ids:
            mask = np.zeros((1, vocabulary.words), np.int32)
            fill_next_token_bitmask(matcher, mask)
            mask &= vocabulary.producible
            if not mask[0, token // 32] >> (token % 32) & 1:
                return False
            matcher.consume_tokens([token])
        return bool(matcher.is_accepting())

    must = call_grammar.required(form, TOOLS, added, parallel=True, thinks=None, opened=False)
    may = call_grammar.allowed(form, TOOLS, added, tokenizer.eos_token_ids, parallel=True)
    assert allows(must, good)
    assert allows(may, good)
    assert allows(may, "Hello")
    for wrong in (good.replace('"a"', '"b"'), good.replace("add", "sub"), marks[0]):
        assert not allows(must, wrong)
        assert not allows(may, wrong)
    assert not allows(must, "Hello")


def test_a_mark_that_is_plain_text_is_found_in_the_text(tokenizer: Tokenizer, follows: Follows) -> None:
    form = FAMILIES["mistral"].form
    grammar = call_grammar.allowed(form, TOOLS, tokenizer.added_tokens, tokenizer.eos_token_ids, parallel=True)
    good = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 2}}, {"name": "add", "arguments": {"a": 3}}]'
    assert follows(grammar, f"Well, {good}")
    assert follows(grammar, "[TOOL or not, <tool_call>")
    assert not follows(grammar, '[TOOL_CALLS][{"name": "sub"')


def test_what_a_schema_says_beyond_the_compiler_matters_only_where_calls_are_required(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    odd = Tool("odd", None, {"properties": {"x": {"type": "array", "uniqueItems": True}}})
    added, ends = tokenizer.added_tokens, tokenizer.eos_token_ids
    compile_grammar(vocabulary, call_grammar.allowed(HERMES, [odd], added, ends, parallel=True))
    with pytest.raises(ValidationError, match="uniqueItems"):
        compile_grammar(
            vocabulary, call_grammar.required(HERMES, [odd], added, parallel=True, thinks=None, opened=False)
        )


def test_large_schemas_fit_into_a_grammar_of_calls(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    large = [
        Tool(f"tool_{n}", None, {"properties": {f"field_{i}": {"type": "string"} for i in range(40)}})
        for n in range(60)
    ]
    grammar = call_grammar.required(HERMES, large, tokenizer.added_tokens, parallel=True, thinks=None, opened=False)
    assert len(grammar.source) > 80_000
    compile_grammar(vocabulary, grammar)
