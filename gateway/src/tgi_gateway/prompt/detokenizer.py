"""Token ids to text, one at a time: a table per vocabulary, an incremental UTF-8 decoder per sequence.

`tokenizers` decodes whole sequences; decoding a growing one again for every token would cost O(n) each. Its decoders in
common use are per-token functions, though, apart from characters cut into bytes and a space stripped at the start. So
the per-token part becomes a table once. What cannot be a table is decoded over a short window.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tgi_gateway.api.generation import TextDecoder

Json = Mapping[str, object]
DecodeIds = Callable[[Sequence[int]], str]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MAX_WINDOW = 16
"""Tokens after which text that ends in U+FFFD is taken for what it says."""


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (Radford et al. 2019): printable bytes as they are, the rest from 256 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(shifted)}


@dataclass(frozen=True, slots=True)
class Strip:
    """What a decoder removes where a text starts."""

    character: str = " "
    count: int = 0
    """Leading characters of the text to remove."""
    mark: str = ""
    """Removed throughout the first token, before it would become a space."""


@dataclass(frozen=True, slots=True)
class Table:
    """A vocabulary as text: ``texts[id]``, or None where the bytes are not whole characters; those are in `raw`."""

    texts: list[str | None]
    raw: dict[int, bytes]
    strip: Strip
    first: dict[int, str]
    """Tokens that read differently where a text starts."""

    def text(self, token_id: int) -> str:
        """The token alone, as it reads within a text; incomplete characters as U+FFFD."""
        if not 0 <= token_id < len(self.texts):
            return ""
        text = self.texts[token_id]
        return self.raw[token_id].decode(errors="replace") if text is None else text

    def data(self, token_id: int) -> bytes:
        """The token's bytes, which need not be whole characters."""
        if not 0 <= token_id < len(self.texts):
            return b""
        text = self.texts[token_id]
        return self.raw[token_id] if text is None else text.encode()


def build_table(decoder: Json | None, vocabulary: Mapping[str, int], skipped: Mapping[int, str]) -> Table | None:
    """The table for a decoder as tokenizer.json describes it; None: it is no per-token function.

    `skipped` ids (the special tokens) become empty text.
    """
    plan = _plan(decoder)
    if plan is None:
        return None
    to_bytes, strip = plan
    texts: list[str | None] = [""] * (max(vocabulary.values(), default=-1) + 1)
    raw: dict[int, bytes] = {}
    first: dict[int, str] = {}
    for token, token_id in vocabulary.items():
        if token_id in skipped:
            continue
        data = to_bytes(token)
        try:
            texts[token_id] = data.decode()
        except UnicodeDecodeError:
            texts[token_id] = None
            raw[token_id] = data
        if strip.mark and strip.mark in token:
            first[token_id] = token.replace(strip.mark, "")
    return Table(texts, raw, strip, first)


def _plan(decoder: Json | None) -> tuple[Callable[[str], bytes], Strip] | None:
    """(bytes of a token, what to strip at the start), or None."""
    steps = _steps(decoder)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level(), Strip()
    if kinds == ["Metaspace"]:
        mark = str(steps[0].get("replacement", "▁"))
        # The library drops every mark of the first token, unless none is ever prepended.
        strip = Strip() if steps[0].get("prepend_scheme", "always") == "never" else Strip(mark=mark)
        return _replacing([(mark, " ")], byte_fallback=False), strip
    replacements: list[tuple[str, str]] = []
    while steps and steps[0].get("type") == "Replace":
        pattern = steps[0].get("pattern")
        if not isinstance(pattern, Mapping) or not isinstance(pattern.get("String"), str):
            return None
        replacements.append((pattern["String"], str(steps[0].get("content", ""))))
        steps = steps[1:]
    byte_fallback = bool(steps) and steps[0].get("type") == "ByteFallback"
    if byte_fallback:
        steps = steps[1:]
    if not steps or steps[0].get("type") != "Fuse":
        return None
    strip = Strip()
    if len(steps) == 2 and steps[1].get("type") == "Strip" and steps[1].get("stop") == 0:
        start = steps[1].get("start")
        strip = Strip(str(steps[1].get("content", " ")), start if isinstance(start, int) else 0)
    elif len(steps) != 1:
        return None
    return _replacing(replacements, byte_fallback), strip


def _steps(decoder: Json | None) -> list[Json]:
    if decoder is None:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    inner = decoder.get("decoders")
    return [step for part in inner for step in _steps(part)] if isinstance(inner, Sequence) else []


def _byte_level() -> Callable[[str], bytes]:
    alphabet = byte_alphabet()

    def to_bytes(token: str) -> bytes:
        try:
            return bytes(map(alphabet.__getitem__, token))
        except KeyError:  # an added token, written as it reads
            return token.encode()

    return to_bytes


def _replacing(replacements: list[tuple[str, str]], byte_fallback: bool) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token) if byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else token.encode()

    return to_bytes


class TableDecoder:
    """Decoder of one sequence over a `Table`. Bytes that are no UTF-8 become U+FFFD as by ``errors="replace"``.

    For byte-fallback vocabularies `tokenizers` differs there: it replaces every byte of a run that is not wholly valid,
    which cannot be known before the run ends.
    """

    __slots__ = ("_first", "_pending", "_strip", "_table", "_texts", "_utf8")

    def __init__(self, table: Table, *, at_start: bool) -> None:
        """`at_start`: no text precedes the sequence, so the space that the vocabulary puts first is stripped."""
        self._table = table
        self._texts = table.texts
        self._first = at_start and bool(table.first)
        self._strip = table.strip.count if at_start else 0
        self._utf8: codecs.IncrementalDecoder | None = None
        self._pending = False

    def push(self, token_id: int) -> str:
        try:
            text = self._texts[token_id]
        except IndexError:  # models pad their vocabulary beyond the tokenizer's
            return ""
        if text is None or self._pending:
            text = self._bytes(token_id, text)
        if text and (self._strip or self._first):
            text = self._start(token_id, text)
        return text

    def flush(self) -> str:
        if self._utf8 is None:
            return ""
        self._pending = False
        return self._utf8.decode(b"", True)

    def _bytes(self, token_id: int, text: str | None) -> str:
        data = self._table.raw[token_id] if text is None else text.encode()
        if self._utf8 is None:
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        text = self._utf8.decode(data)
        self._pending = bool(self._utf8.getstate()[0])
        return text

    def _start(self, token_id: int, text: str) -> str:
        if self._first:
            self._first = False
            return self._table.first.get(token_id, text)
        character = self._table.strip.character
        while self._strip and text.startswith(character):
            text = text[len(character) :]
            self._strip -= 1
        if text:
            self._strip = 0
        return text


class WindowDecoder:
    """Decoder of one sequence for any tokenizer: decodes the last shown tokens with and without the new ones."""

    __slots__ = ("_context", "_decode", "_ids", "_prefix")

    def __init__(self, decode: DecodeIds, context: Sequence[int] = ()) -> None:
        """`context`: the last ids before the sequence, which decide about a space between the two."""
        self._decode = decode
        self._ids = list(context)
        self._context = len(self._ids)
        self._prefix = decode(self._ids) if self._ids else ""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if len(text) <= len(self._prefix):
            return ""
        if text.endswith("\ufffd") and len(self._ids) - self._context < _MAX_WINDOW:
            return ""
        return self._take(text)

    def flush(self) -> str:
        text = self._decode(self._ids)
        return self._take(text) if len(text) > len(self._prefix) else ""

    def _take(self, text: str) -> str:
        new = text[len(self._prefix) :]
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        self._prefix = self._decode(self._ids)
        return new


def make_decoder(
    table: Table | None, decode: DecodeIds, prompt_ids: Sequence[int], skipped: Mapping[int, str]
) -> TextDecoder:
    """A decoder for the tokens after `prompt_ids`; special tokens of the prompt count as no text."""
    if table is not None:
        return TableDecoder(table, at_start=all(token_id in skipped for token_id in reversed(prompt_ids)))
    return WindowDecoder(decode, [token_id for token_id in prompt_ids[-_MAX_WINDOW:] if token_id not in skipped])
