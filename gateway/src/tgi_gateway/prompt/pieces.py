"""Long texts in pieces, cut where the tokenizer cuts anyway: pieces met before cost nothing, new ones run in parallel.

Prompts that share a beginning (a conversation going on, documents with questions) share its pieces, because cuts depend
on nothing behind them. Byte-level BPE looks at one word after the other, and its words never reach across the space
between two ASCII letters, so ids of pieces that are cut before such a space, one after the other, are the ids of the
whole. `Pieces.of` refuses tokenizers for which that is not so.
"""

from __future__ import annotations

import json
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self

import tokenizers

from tgi_gateway.prompt.piece_shares import PieceShares
from tgi_gateway.types import TokenIds

PIECE_CHARACTERS = 1024
MOST_PIECES = 4096
"""Remembered ones; of 3 to 4 KB each."""
FEWEST_SHARED = 16
"""Unknown pieces of a text, about 5 ms of one thread's work, that are worth asking other processes."""
_CUT = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_PROBES = (
    " a b ", "one two", "One Two", "ONE TWO a b", "it's a they'll Be can't Do", "1 a 12 b c 3 d", "a. b c, d (e f) g",
    "x  y z",
    "a\nb c\n d e\n\n f", "a\tb c \t d", "é a ü b ñ Z z", "日本 a 語 b c", "a-b c_d e", "'s t 're d", "end. A b C  d",
    "camelCase dE fG", "HTTPServer Is", "a\u0301 b e\u0301 c", "!? a b ... c", "🙂 a 🙂b c", "a\r\nb c\r\n d",
)  # fmt: skip


class Pieces:
    """Of one tokenizer; from any thread."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        characters: int,
        most: int,
        around: tuple[list[int], list[int]],
        shares: PieceShares | None = None,
    ) -> None:
        """Made by `of`. `around`: special tokens before and behind a text."""
        self._shares = shares
        self._inner = inner
        self._around = around
        self._characters = characters
        self._most = most
        self._lock = threading.Lock()  # guards _known
        self._known: OrderedDict[str, Future[array[int]]] = OrderedDict()
        """Those that are being encoded, too: whoever wants the same at the same time waits for them."""

    @classmethod
    def of(
        cls,
        inner: tokenizers.Tokenizer,
        characters: int = PIECE_CHARACTERS,
        most: int = MOST_PIECES,
        shares: PieceShares | None = None,
    ) -> Self | None:
        """None if this tokenizer may see across such a space. `shares`: other processes with the same tokenizer."""
        around = _added_around(inner) if _cuts_at_spaces(inner) else None
        return None if around is None else cls(inner, characters, most, around, shares)

    def worth(self, text: str) -> bool:
        """Whether `text` is long enough to be cut."""
        return len(text) >= 2 * self._characters

    def encode(self, text: str, add_special_tokens: bool) -> TokenIds:
        """Raises TypeError for lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # before it can fail the pieces that others wait for
            raise TypeError(str(error)) from None
        before, behind = self._around if add_special_tokens else ([], [])
        joined = TokenIds(before)
        for each in self._ids(self.cut(text), self._shares):
            joined += each
        joined.fromlist(behind)
        return joined

    def ids(self, pieces: Iterable[str]) -> list[array[int]]:
        """Of pieces that another process has cut, int32; encoded here, if not known. Raises TypeError as `encode`."""
        return self._ids(pieces, None)

    def _ids(self, pieces: Iterable[str], shares: PieceShares | None) -> list[array[int]]:
        mine: dict[str, Future[array[int]]] = {}
        wanted: list[Future[array[int]]] = []
        with self._lock:
            for piece in pieces:
                ids = self._known.get(piece) or mine.get(piece)
                if ids is None:
                    ids = mine[piece] = Future()
                if len(piece) <= 2 * self._characters:  # text without a cut may be as long as a request
                    self._known[piece] = ids
                    self._known.move_to_end(piece)
                wanted.append(ids)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        if mine:
            self._encode(mine, shares if len(mine) >= FEWEST_SHARED else None)
        return [each.result() for each in wanted]

    def _encode(self, new: Mapping[str, Future[array[int]]], shares: PieceShares | None) -> None:
        """Fill in the ids of pieces that nobody else here encodes."""
        own, asked = (list(new), []) if shares is None else shares.ask(new)
        try:
            self._fill(new, own)
            for each in asked:
                told = each.wait()
                if told is None:
                    self._fill(new, each.pieces)
                else:
                    for piece, known in zip(each.pieces, told, strict=True):
                        new[piece].set_result(known)
        except BaseException as error:
            for each in asked:
                each.drop()
            missing = {piece: ids for piece, ids in new.items() if not ids.done()}
            with self._lock:
                for piece, ids in missing.items():
                    if self._known.get(piece) is ids:
                        del self._known[piece]
            for ids in missing.values():
                ids.set_exception(error)
            raise

    def _fill(self, new: Mapping[str, Future[array[int]]], pieces: Sequence[str]) -> None:
        encodings = self._inner.encode_batch_fast(pieces, add_special_tokens=False)
        for piece, encoding in zip(pieces, encodings, strict=True):
            new[piece].set_result(array("i", encoding.ids))

    def cut(self, text: str) -> Iterator[str]:
        """Pieces of `characters` or a word more; the last is what is left, and so changes with the text."""
        start = 0
        while (at := _CUT.search(text, start + self._characters)) is not None:
            yield text[start : at.start()]
            start = at.start()
        yield text[start:]


def _cuts_at_spaces(inner: tokenizers.Tokenizer) -> bool:
    document = _without_vocabulary(inner)
    if (document.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        return False  # others may change what stands beside a space; NFC joins nothing across one
    for token in inner.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word or _CUT.search(token.content):
            return False
    if inner.truncation is not None or inner.padding is not None or not _splits_words(document.get("pre_tokenizer")):
        return False
    return all(_cut_where_allowed(inner, probe) for probe in _PROBES)


def _added_around(inner: tokenizers.Tokenizer) -> tuple[list[int], list[int]] | None:
    """Special tokens that are put before and behind a text; None if that cannot be told."""
    bare, whole = (inner.encode("a", add_special_tokens=special).ids for special in (False, True))
    places = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
    if not bare or len(places) != 1:
        return None
    return whole[: places[0]], whole[places[0] + len(bare) :]


def _without_vocabulary(inner: tokenizers.Tokenizer) -> Mapping[str, Any]:
    """The parts as tokenizer.json describes them; their pickled state is that text."""
    parts: dict[str, Any] = {}
    for name in ("normalizer", "pre_tokenizer"):
        part = getattr(inner, name)
        parts[name] = None if part is None else json.loads(part.__getstate__())
    return parts


def _splits_words(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether it is byte-level behind regular expressions that look at nothing behind them."""
    steps: Sequence[Mapping[str, Any]] = []
    if pre_tokenizer is not None:
        steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return False
    splits = bool(steps[-1].get("use_regex", True))
    for step in steps[:-1]:
        if step.get("type") == "Digits":
            continue
        pattern = (step.get("pattern") or {}).get("Regex")
        if step.get("type") != "Split" or pattern is None or "(?<" in pattern:
            return False
        splits = True
    return splits


def _cut_where_allowed(inner: tokenizers.Tokenizer, text: str) -> bool:
    """Whether every allowed cut of `text` is the border of a word."""
    borders = {span[0] for _, span in inner.pre_tokenizer.pre_tokenize_str(text)}
    return all(at.start() in borders for at in _CUT.finditer(text))
