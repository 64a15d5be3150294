"""Log-probabilities in OpenAI's two shapes: of chats, with bytes, and of completions, with offsets.

A token is told as it is in the vocabulary, whatever of its text an answer shows: a stop string may hide some, and a
character may be spread over several tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from msgspec import Struct

from tgi_gateway.api.generation import Piece
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_gateway.types import Finished


class TopLogprob(Struct):
    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float | None
    bytes: list[int]
    """Of the token itself; those of all tokens joined are the text, also where a token is half a character."""
    top_logprobs: list[TopLogprob]


class Logprobs(Struct):
    content: list[TokenLogprob]


class CompletionLogprobs(Struct, kw_only=True):
    """`text_offset` counts characters from the start of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


def chat_logprobs(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Logprobs:
    """Of the tokens that `pieces` are."""

    def told(token_id: int) -> tuple[str, list[int]]:
        return tokenizer.token_text(token_id), list(tokenizer.token_bytes(token_id))

    content = []
    for piece in pieces:
        text, data = told(piece.token_id)
        top = [TopLogprob(text, logprob, data) for token_id, logprob in piece.top for text, data in [told(token_id)]]
        content.append(TokenLogprob(text, piece.logprob, data, top))
    return Logprobs(content)


def completion_logprobs(
    tokenizer: Tokenizer, pieces: Sequence[Piece], alternatives: int, offset: int = 0
) -> CompletionLogprobs:
    """Of an answer, or of its part that begins `offset` characters after the text's start."""
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += 0 if piece.special else len(piece.text)
    return CompletionLogprobs(
        tokens=[_shown(tokenizer, piece.token_id) for piece in pieces],
        token_logprobs=[piece.logprob for piece in pieces],
        top_logprobs=[_alternatives(tokenizer, piece.token_id, piece.logprob, piece.top) for piece in pieces]
        if alternatives
        else None,
        text_offset=offsets,
    )


def prompt_logprobs(tokenizer: Tokenizer, ids: Sequence[int], finished: Finished) -> CompletionLogprobs:
    """Of a prompt's tokens, of which the first has none."""
    values, top = finished.prefill_logprobs, finished.prefill_top
    special = tokenizer.special_texts
    lengths = [0 if token_id in special else len(tokenizer.token_text(token_id)) for token_id in ids]
    return CompletionLogprobs(
        tokens=[_shown(tokenizer, token_id) for token_id in ids],
        token_logprobs=[None if math.isnan(value) else value for value in values],
        top_logprobs=[
            _alternatives(tokenizer, token_id, value, best) if best else None
            for token_id, value, best in zip(ids, values, top, strict=True)
        ]
        if top
        else None,
        text_offset=[0, *accumulate(lengths[:-1])],
    )


def joined(first: CompletionLogprobs, then: CompletionLogprobs) -> CompletionLogprobs:
    """Both as one; `then` has its offsets already, and both have alternatives or neither has."""
    alternatives = None
    if first.top_logprobs is not None and then.top_logprobs is not None:
        alternatives = first.top_logprobs + then.top_logprobs
    return CompletionLogprobs(
        tokens=first.tokens + then.tokens,
        token_logprobs=first.token_logprobs + then.token_logprobs,
        top_logprobs=alternatives,
        text_offset=first.text_offset + then.text_offset,
    )


def _alternatives(
    tokenizer: Tokenizer, token_id: int, logprob: float, top: Sequence[tuple[int, float]]
) -> dict[str, float]:
    """The most likely tokens, and the one that is there in any case, as at OpenAI."""
    there = {} if token_id in dict(top) else {_shown(tokenizer, token_id): logprob}
    return {_shown(tokenizer, each): value for each, value in top} | there


def _shown(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is no whole character as OpenAI writes it, so that it is not taken for another."""
    text = tokenizer.token_text(token_id)
    if "\ufffd" not in text:
        return text
    data = tokenizer.token_bytes(token_id)
    return text if data == text.encode() else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
