"""Ids of words met before: most of a text is words that every text has, and a dictionary is faster than the tokenizer.

For tokenizers of `pieces.Pieces` alone, whose words never reach across the space between two ASCII letters: what lies
between two such spaces has its ids by itself.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence

import tokenizers

MOST_WORDS = 1 << 15
"""In each of two generations; of 100 to 200 bytes each."""
LONGEST = 32
"""Characters of one that is remembered."""
# Lone surrogates, which no text has that can be encoded.
_JOINED = "\ud800"
"""Stands for a space within a word."""
_BARE = "\ud801"
"""Begins a word that has no space before it."""
_WITHIN = re.compile(r" (?:(?![A-Za-z])|(?<=[^A-Za-z] ))")


class Words:
    """Of one tokenizer; from any thread."""

    def __init__(self, inner: tokenizers.Tokenizer, most: int = MOST_WORDS) -> None:
        self._inner = inner
        self._most = most
        self._known: dict[str, bytes] = {}
        self._older: dict[str, bytes] = {}
        """Those of `_known` before it was full: words in use come over, the others are dropped with it."""

    def encode(self, texts: Iterable[str]) -> list[array[int]]:
        """Ids of each text, which holds no lone surrogates."""
        known = self._known
        words = [_split(text) for text in texts]
        found = [list(map(known.get, each)) for each in words]
        incomplete = [number for number, ids in enumerate(found) if None in ids]
        lacking = dict.fromkeys(word for number in incomplete for word in words[number] if word not in known)
        new = self._look_up(list(lacking)) if lacking else {}
        for number in incomplete:
            found[number] = [new[word] if word in new else known[word] for word in words[number]]
        return [_joined(ids) for ids in found]

    def _look_up(self, words: Sequence[str]) -> dict[str, bytes]:
        older = self._older
        new = {word: older[word] for word in words if word in older}
        unknown = [word for word in words if word not in new]
        # Unlike encode(), the batch call releases the GIL and uses several threads, and "fast" leaves out the offsets.
        encodings = self._inner.encode_batch_fast(list(map(_text, unknown)), add_special_tokens=False)
        for word, encoding in zip(unknown, encodings, strict=True):
            new[word] = array("i", encoding.ids).tobytes()
        if len(self._known) + len(new) > self._most:
            self._older, self._known = self._known, {}
        self._known.update((word, ids) for word, ids in new.items() if len(word) <= LONGEST)
        return new


def _split(text: str) -> list[str]:
    """Words of `text`; the space before each but the first is left out."""
    first, *others = _WITHIN.sub(_JOINED, text).split(" ")
    return [_BARE + first, *others] if first else others


def _text(word: str) -> str:
    text = word[1:] if word[0] == _BARE else f" {word}"
    return text.replace(_JOINED, " ")


def _joined(ids: list[bytes | None]) -> array[int]:
    joined = array("i")
    joined.frombytes(b"".join(ids))  # type: ignore[arg-type]  # none is lacking any more
    return joined
