"""Grammars: a request's schema, expression or list becomes a matcher that says which tokens may come next.

llguidance does the work: a lexer of regex derivatives under an Earley parser, walked over the trie of the vocabulary.
Everything that a client can send is compiled under limits, so that it ends in bounded time and memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark
from llguidance.numpy import fill_next_token_bitmask

from tgi_gateway.errors import ValidationError
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.types import Grammar
from tgi_model_server.sampling.places import located

Words: TypeAlias = npt.NDArray[np.int32]
"""One bit per token, the lowest first."""

MAX_REASON_CHARACTERS = 400
"""Of what a client is told about a broken grammar."""

_QUOTED = re.compile(r"\s*(\d+ \||\^|<non-verbose/>)")
"""Lines of an error that only show the source again, which has been rewritten."""

# Fuel is what llguidance counts its work in. The lexer's states take 1 to 2 kB each.
_LIMITS = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)

_JSON_OPTIONS: dict[str, Any] = {
    # At most one space between parts, as TGI: models without an opinion otherwise fill their budget with white space.
    "whitespace_pattern": "[ ]?",
    "lenient": False,
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model as bytes, which grammars speak about. `tokenizer` has the trie."""

    tokenizer: LLTokenizer
    size: int
    """Logits of the model."""
    words: int
    """int32 words of a mask: at least `size` bits."""
    producible: Words
    """Tokens that a constrained answer may hold: those of the model, less what llguidance alone takes for an end."""
    eos_token_ids: tuple[int, ...]

    @staticmethod
    def load(folder: Path, size: int, eos_token_ids: Iterable[int]) -> Vocabulary:
        """Read the folder's tokenizer. Takes about a second for 128,000 tokens. Raises `ModelError`, `ValueError`."""
        source = Tokenizer.from_folder(folder)
        eos = sorted({token for token in eos_token_ids if token < size})
        # The text itself: a name might be looked up somewhere else.
        tokenizer = LLTokenizer(source.to_json(), n_vocab=max(size, source.vocab_size), eos_token=eos or None)
        words = -(-tokenizer.vocab_size // 32)
        # Special tokens are no text to llguidance: only a grammar that names them lets them through. Without an
        # end-of-sequence token it takes one by its name; nothing ends the model's answers with it.
        banned = {*tokenizer.eos_tokens, *range(size, words * 32)} - set(eos)
        producible = np.full(words, -1, np.int32)
        clear(producible, sorted(banned))
        return Vocabulary(tokenizer, size, words, producible, tuple(eos))


def clear(mask: Words, tokens: Sequence[int]) -> None:
    """Take `tokens` out of `mask`, in place."""
    ids = np.asarray(tokens, np.int64)
    ids = ids[ids < mask.size * 32]
    bits = mask.view(np.uint32)
    np.bitwise_and.at(bits, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))


class Constraint:
    """One request's way through its grammar. Belongs to whoever computes its masks; survives a preemption."""

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher) -> None:
        self.vocabulary = vocabulary
        self.matcher = matcher
        self.consumed = 0
        """Output tokens that the matcher has seen."""

    def advance(self, output_ids: Sequence[int]) -> None:
        """Take in the output tokens that are new among `output_ids`, which is all of them."""
        self.push(output_ids[self.consumed :])

    def push(self, tokens: Sequence[int]) -> None:
        """Take in the next output tokens. A token that the grammar forbids leaves the matcher in its error state."""
        self.matcher.consume_tokens(list(tokens))
        self.consumed += len(tokens)

    @property
    def error(self) -> str | None:
        """Why it cannot go on."""
        return reason_of(self.matcher.get_error()) if self.matcher.is_error() else None


def compile_grammar(vocabulary: Vocabulary, grammar: Grammar) -> LLMatcher:
    """A matcher at the start of `grammar`, its first mask computed once. Raises `ValidationError` with the reason.

    Needs a stack of hundreds of megabytes: see `types.MAX_GRAMMAR_CHARACTERS`.
    """
    excess = grammar.excess()
    if excess is not None:
        raise ValidationError(f"grammar is not valid: {excess}")
    try:
        text = _as_llguidance(grammar)
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"grammar is not valid: {reason_of(str(error))}") from None
    matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        # Finds out whether anything can be generated at all, and leaves the first lexer states behind.
        first = np.zeros((1, vocabulary.words), np.int32)
        fill_next_token_bitmask(matcher, first)
        if not matcher.is_error() and not (first & vocabulary.producible).any():
            raise ValidationError("grammar is not valid: no token of this model can begin it")
    if matcher.is_error():
        reason = reason_of(matcher.get_error())
        if grammar.kind in ("json", "json_schema"):
            reason = located(reason, json.loads(grammar.source))
        raise ValidationError(f"grammar is not valid: {reason}")
    return matcher


def _as_llguidance(grammar: Grammar) -> str:
    """`grammar` as the library's own document. Raises ValueError."""
    source = grammar.source
    match grammar.kind:
        case "json" | "json_schema":
            schema = json.loads(source)
            if not isinstance(schema, dict):
                raise ValueError("a JSON schema must be an object")
            return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]
        case "regex":
            # Digits of other scripts are hardly ever meant.
            return LLMatcher.grammar_from_regex(regex_to_lark(source, use_ascii="d"))
        case "choice":
            choices = json.loads(source)
            if not isinstance(choices, list) or not choices or not all(isinstance(each, str) for each in choices):
                raise ValueError("choices must be a list of one text or more")
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_lark_text, choices)))
        case "lark":
            # vLLM's users write llama.cpp's dialect under the same name.
            return LLMatcher.grammar_from_lark(_from_gbnf(source) if "::=" in source else source)


def _from_gbnf(source: str) -> str:
    try:
        return any_to_lark(source)
    except GbnfToLarkError as error:
        raise ValueError(str(error)) from None


def _lark_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def reason_of(error: str) -> str:
    """What a client may read of the library's message."""
    lines = [line.strip() for line in error.splitlines() if not _QUOTED.match(line)]
    reason = " ".join(line for line in lines if line) or "it cannot be matched"
    if "NoExtension" in reason:
        reason = "nothing can match it"
    return reason if len(reason) <= MAX_REASON_CHARACTERS else f"{reason[:MAX_REASON_CHARACTERS]}..."
