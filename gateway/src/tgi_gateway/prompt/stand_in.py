"""A stand-in for the tokenizer of a model that has none: for random weights, of which only config.json is needed."""

from __future__ import annotations

import json
from pathlib import Path

from tgi_gateway.errors import ModelError
from tgi_gateway.prompt.detokenizer import byte_alphabet

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def write_stand_in(folder: Path, model: Path) -> None:
    """Write a tokenizer.json for the vocabulary of `model`'s config.json: each byte of a text is a token.

    Tokens beyond the bytes never come of a text; they read as their number. Raises `ModelError`.
    """
    config = model / "config.json"
    try:
        described = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config} cannot be read ({error}); random weights need it.") from error
    size = described.get("vocab_size") if isinstance(described, dict) else None
    alphabet = sorted(byte_alphabet().items(), key=lambda pair: pair[1])
    if not isinstance(size, int) or size < len(alphabet):
        raise ModelError(
            f"{config}: vocab_size is {size!r}; without a tokenizer.json at least {len(alphabet)} are needed, one for "
            "each byte."
        )
    vocabulary = dict(alphabet) | {f"Ġ<{token}>": token for token in range(len(alphabet), size)}
    folder.mkdir()
    document = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
