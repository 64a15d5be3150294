"""A model folder's tokenizer: text to ids off the event loop, ids to text token by token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import tokenizers

from tgi_gateway.api.generation import TextDecoder
from tgi_gateway.errors import ModelError
from tgi_gateway.prompt.detokenizer import Table, build_table, make_decoder
from tgi_gateway.prompt.piece_shares import PieceShares
from tgi_gateway.prompt.pieces import Pieces

INLINE_CHARACTERS = 400
"""Shorter texts are encoded in the event loop: about 0.1 ms, the price of a thread's round trip."""

_NAMED_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NO_LIMIT = 10**9
"""Tokenizer files write "no limit" as 1e30."""


@dataclass
class Encoding:
    """A text as token ids. `text` is what was encoded: lone surrogates, which have no encoding, became U+FFFD."""

    ids: Sequence[int]
    text: str
    add_special_tokens: bool
    tokenizer: tokenizers.Tokenizer = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def offsets(self) -> list[tuple[int, int]]:
        """Per token its first and past-the-last UTF-8 byte in `text`; (0, 0) for added special tokens.

        Encodes once more, so call it off the event loop for long texts.
        """
        characters = self.tokenizer.encode_batch([self.text], add_special_tokens=self.add_special_tokens)[0].offsets
        if self.text.isascii():
            return [(start, stop) for start, stop in characters]
        byte_at = [0, *accumulate(len(char.encode()) for char in self.text)]
        return [(byte_at[start], byte_at[stop]) for start, stop in characters]


class Tokenizer:
    """Shared by all requests of a process; every method may be called from any thread."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        generation: Mapping[str, Any],
        workers: int,
        shares: PieceShares | None = None,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        _declare_special_tokens(inner, config)
        self._inner = inner
        self._shares = shares
        self._pieces = Pieces.of(inner, shares=shares)
        if self._pieces is not None and shares is not None:
            shares.serve(self._pieces.ids)
        self._pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="tokenizer")
        self.config = config
        """tokenizer_config.json as it is."""
        self.generation_config = generation
        """generation_config.json as it is."""
        self.special_texts: Mapping[int, str] = {
            token_id: token.content for token_id, token in inner.get_added_tokens_decoder().items() if token.special
        }
        """Special tokens, which are no part of a text, by id."""
        self.added_tokens: Mapping[str, int] = {
            token.content: token_id for token_id, token in inner.get_added_tokens_decoder().items()
        }
        """Ids of the tokens that were added to the vocabulary, special or not, by text."""
        self.special_tokens: Mapping[str, str | list[str]] = named_special_tokens(config)
        """`bos_token`, `eos_token` and so on, as chat templates know them."""
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        """Tokens of the tokenizer, added ones included; a model's own vocabulary may be padded beyond it."""
        self.base_vocab_size: int = inner.get_vocab_size(with_added_tokens=False)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.eos_token_ids = self._eos_token_ids()
        """Tokens that end a generation: generation_config.json's, else the tokenizer's end-of-sequence token."""
        limit = config.get("model_max_length")
        self.model_max_length: int | None = (
            int(limit) if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT else None
        )
        self._table: Table | None = build_table(
            _described_decoder(inner), inner.get_vocab(with_added_tokens=True), self.special_texts
        )

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        tokenizer_config_path: Path | str | None = None,
        workers: int = 2,
        shares: PieceShares | None = None,
    ) -> Self:
        """Read tokenizer.json and its companions. Raises `ModelError` naming the file and the next step.

        `workers`: threads. `shares`: processes that long texts are divided among.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder} has no tokenizer.json. Name a model folder that has one; convert an older tokenizer once: "
                "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every broken file
            raise ModelError(f"{path} is not a readable tokenizer ({error}). Download the model again.") from error
        config = dict(read_json(folder / "special_tokens_map.json"))
        config.update(read_json(folder / "tokenizer_config.json"))
        if tokenizer_config_path is not None:
            if not Path(tokenizer_config_path).is_file():
                raise ModelError(f"--tokenizer-config-path: {tokenizer_config_path} does not exist.")
            config.update(read_json(Path(tokenizer_config_path)))
        return cls(inner, config, read_json(folder / "generation_config.json"), workers, shares)

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        try:
            ids = self._ids(text, add_special_tokens)
        except TypeError:
            text = _without_lone_surrogates(text)
            ids = self._ids(text, add_special_tokens)
        return Encoding(ids, text, add_special_tokens, self._inner)

    def _ids(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        """`TokenIds` where the text is long. Raises TypeError for lone surrogates."""
        if self._pieces is not None and self._pieces.worth(text):
            return self._pieces.encode(text, add_special_tokens)
        # Unlike encode(), the batch call releases the GIL, and "fast" leaves out the offsets.
        ids: list[int] = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> Encoding:
        """`encode` in a thread, so that a long prompt does not hold up the streams of others."""
        if len(text) <= INLINE_CHARACTERS:
            return self.encode(text, add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.encode, text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; unknown ids count as nothing."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def decoder(self, prompt_ids: Sequence[int] = ()) -> TextDecoder:
        """An incremental decoder of the tokens that follow `prompt_ids`; special tokens are no text."""
        return make_decoder(self._table, self.decode, prompt_ids, self.special_texts)

    def to_json(self) -> str:
        """The tokenizer as one document, with every special token that the folder's other files name."""
        document: str = self._inner.to_str()
        return document

    def token_text(self, token_id: int) -> str:
        """One token as it reads within a text: its space kept, half characters as U+FFFD, special tokens by name."""
        special = self.special_texts.get(token_id)
        if special is not None:
            return special
        return self._table.text(token_id) if self._table is not None else self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes, as far as it is known which of a character's it stands for."""
        if self._table is None or token_id in self.special_texts:
            return self.token_text(token_id).encode()
        return self._table.data(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry as tokenizer.json writes it."""
        token_id: int | None = self._inner.token_to_id(token)
        return token_id

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._shares is not None:
            self._shares.close()

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return self.token_id(token) if isinstance(token, str) else None

    def _eos_token_ids(self) -> tuple[int, ...]:
        declared = self.generation_config.get("eos_token_id")
        if isinstance(declared, int):
            return (declared,)
        if isinstance(declared, list) and declared and all(isinstance(token_id, int) for token_id in declared):
            return tuple(declared)
        return () if self.eos_token_id is None else (self.eos_token_id,)


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object, empty if there is no such file. Raises `ModelError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}). Download the model again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}, not an object. Download the model again.")
    return value


def named_special_tokens(config: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """Special tokens by role from tokenizer_config.json, where each is a string or a described token."""
    named: dict[str, str | list[str]] = {}
    extra = config.get("extra_special_tokens")
    roles = {name: config.get(name) for name in _NAMED_SPECIAL}
    for name, token in {**roles, **(extra if isinstance(extra, dict) else {})}.items():
        content = _content(token)
        if content is not None:
            named[name] = content
    additional = config.get("additional_special_tokens")
    if isinstance(additional, list):
        contents = [content for token in additional if (content := _content(token)) is not None]
        if contents:
            named["additional_special_tokens"] = contents
    return named


def _content(token: object) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _declare_special_tokens(inner: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tell the tokenizer what only tokenizer_config.json says: further added tokens, and which are special."""
    known = inner.get_added_tokens_decoder()
    declared = config.get("added_tokens_decoder")
    entries = declared if isinstance(declared, dict) else {}
    for token_id, entry in sorted(
        ((int(key), entry) for key, entry in entries.items() if str(key).isdigit()), key=lambda pair: pair[0]
    ):
        content = _content(entry)
        if not isinstance(entry, dict) or content is None:
            continue
        special = bool(entry.get("special", False))
        present = known.get(token_id)
        if present is not None and present.content == content and present.special == special:
            continue
        flags = {name: bool(entry[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in entry}
        token = tokenizers.AddedToken(content, special=special, **flags)
        if special:
            inner.add_special_tokens([token])
        else:
            inner.add_tokens([token])
    special_now = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
    for value in named_special_tokens(config).values():
        for content in [value] if isinstance(value, str) else value:
            # A role can only be given to a token that exists: new ids would lie beyond the model's embedding.
            if content not in special_now and inner.token_to_id(content) is not None:
                inner.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])


def _described_decoder(inner: tokenizers.Tokenizer) -> Mapping[str, Any] | None:
    """The decoder as tokenizer.json describes it; its pickled state is that text, without the vocabulary around it."""
    if inner.decoder is None:
        return None
    described: Mapping[str, Any] = json.loads(inner.decoder.__getstate__())
    return described


def _without_lone_surrogates(text: str) -> str:
    """JSON may carry half of a surrogate pair; joined pairs become their character, halves U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
