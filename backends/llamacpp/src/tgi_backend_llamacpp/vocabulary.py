"""The vocabulary in a GGUF file as a tokenizer folder, which is what the HTTP workers read.

Byte-level vocabularies (`tokenizer.ggml.model` "gpt2") carry their merges; those of SentencePiece ("llama") carry
scores, from which the merges follow, as in the tokenizer.json files of the same models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tgi_backend_llamacpp import pretokenizers
from tgi_backend_llamacpp.gguf_file import GgufFile, broken
from tgi_gateway.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""`tokenizer.ggml.token_type`"""
_SPACE = "\u2581"
_INSTEAD = "Name a folder with the model's tokenizer.json as --model-id, and the file with --model-gguf"
_ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def write_tokenizer(model: GgufFile, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat templates into `folder`.

    Raises `ModelError` for a kind of vocabulary that has no such form.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.json", tokenizer_document(model))
    _write(folder / "tokenizer_config.json", tokenizer_config(model))
    _write(folder / "generation_config.json", {"eos_token_id": _ends(model)})


def tokenizer_document(model: GgufFile) -> dict[str, Any]:
    """What tokenizer.json says of this vocabulary."""
    kind = model.text("tokenizer.ggml.model", "none")
    tokens = model.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise broken(model.path, "it has no tokens")
    if len(set(tokens)) != len(tokens):
        raise broken(model.path, "two of its tokens have the same text")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if kind == "gpt2":
        parts = _byte_level(model, vocabulary)
    elif kind == "llama":
        parts = _sentence_piece(model, vocabulary)
    else:
        raise ModelError(f"{model.path}: vocabularies of the kind `{kind}` cannot be read from a GGUF file. {_INSTEAD}")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model, tokens),
        "post_processor": _post_processor(model, tokens, adds_bos=kind == "llama"),
        **parts,
    }


def tokenizer_config(model: GgufFile) -> dict[str, Any]:
    """Special tokens by role, and the chat templates."""
    tokens = model.strings("tokenizer.ggml.tokens")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in _ROLES.items():
        token_id = model.metadata.get(key)
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            config[role] = tokens[token_id]
    named = {name: model.text(f"tokenizer.chat_template.{name}") for name in model.strings("tokenizer.chat_templates")}
    default = model.metadata.get("tokenizer.chat_template")
    if isinstance(default, str):
        named = {"default": default, **named}
    if len(named) > 1:
        config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
    elif named:
        config["chat_template"] = next(iter(named.values()))
    return config


def _ends(model: GgufFile) -> list[int]:
    """Tokens that the file itself calls an end; llama.cpp may find more by their texts."""
    count = len(model.strings("tokenizer.ggml.tokens"))
    found = (model.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom"))
    return [token_id for token_id in found if isinstance(token_id, int) and 0 <= token_id < count]


def _byte_level(model: GgufFile, vocabulary: dict[str, int]) -> dict[str, Any]:
    name = model.text("tokenizer.ggml.pre", "default")
    if name not in pretokenizers.STEPS:
        raise ModelError(f"{model.path}: how `{name}` cuts text is not known here. {_INSTEAD}")
    merges = []
    for merge in model.strings("tokenizer.ggml.merges"):
        first, space, second = merge.partition(" ") if merge[:1] != " " else (" ", "", merge[1:])
        # A merge into what is no token could never be taken.
        if space and first + second in vocabulary and first in vocabulary and second in vocabulary:
            merges.append([first, second])
    return {
        "normalizer": None,
        "pre_tokenizer": pretokenizers.describe(name),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=name in pretokenizers.WHOLE_WORDS),
    }


def _sentence_piece(model: GgufFile, vocabulary: dict[str, int]) -> dict[str, Any]:
    scores = model.numbers("tokenizer.ggml.scores")
    types = model.wholes("tokenizer.ggml.token_type")
    tokens = list(vocabulary)
    if not scores or not types:
        raise broken(model.path, "its vocabulary has no scores or no token types")
    pieces = {
        token: scores[token_id]
        for token, token_id in vocabulary.items()
        if types[token_id] in (NORMAL, USER_DEFINED, UNUSED)
    }
    unknown = model.whole("tokenizer.ggml.unknown_token_id", 0)
    prefix = model.flag("tokenizer.ggml.add_space_prefix", True)
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocabulary,
            _merges_of(pieces),
            unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
            byte_fallback=True,
            fuse_unk=True,
        ),
    }


def _merges_of(pieces: dict[str, float]) -> list[list[str]]:
    """SentencePiece joins whichever pair makes the piece of the highest score: so do these merges, in this order."""
    order = {piece: place for place, piece in enumerate(pieces)}
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-score, order[left], order[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **more: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **more,
        "vocab": vocabulary,
        "merges": merges,
    }


def _added_tokens(model: GgufFile, tokens: list[str]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before anything is cut or merged."""
    types = model.wholes("tokenizer.ggml.token_type")
    return [
        {
            "id": token_id,
            "content": tokens[token_id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (CONTROL, UNKNOWN),
        }
        for token_id, kind in enumerate(types)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and tokens[token_id]
    ]


def _post_processor(model: GgufFile, tokens: list[str], *, adds_bos: bool) -> dict[str, Any] | None:
    """Begin- and end-of-sequence where the file wants them added."""
    pre = model.metadata.get("tokenizer.ggml.pre")
    adds_bos = adds_bos or pre in pretokenizers.WHOLE_WORDS
    begin = _role(model, "bos", tokens) if model.flag("tokenizer.ggml.add_bos_token", adds_bos) else None
    end = _role(model, "eos", tokens) if model.flag("tokenizer.ggml.add_eos_token", False) else None
    if begin is None and end is None:
        return None
    first, second = (
        [
            *_special(begin, number),
            {"Sequence": {"id": "AB"[number], "type_id": number}},
            *_special(end, number),
        ]
        for number in range(2)
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {
            tokens[token_id]: {"id": tokens[token_id], "ids": [token_id], "tokens": [tokens[token_id]]}
            for token_id, _ in filter(None, {begin, end})
        },
    }


def _role(model: GgufFile, role: str, tokens: list[str]) -> tuple[int, str] | None:
    token_id = model.metadata.get(f"tokenizer.ggml.{role}_token_id")
    if isinstance(token_id, int) and 0 <= token_id < len(tokens):
        return token_id, tokens[token_id]
    return None


def _special(token: tuple[int, str] | None, number: int) -> Iterable[dict[str, Any]]:
    return [] if token is None else [{"SpecialToken": {"id": token[1], "type_id": number}}]


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8", errors="backslashreplace")
