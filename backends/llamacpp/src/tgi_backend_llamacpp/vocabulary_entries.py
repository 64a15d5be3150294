"""A model folder's tokenizer as entries of a GGUF file: the way back from `vocabulary`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tgi_backend_llamacpp import pretokenizers
from tgi_backend_llamacpp.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from tgi_gateway.errors import ModelError
from tgi_gateway.prompt.tokenizer import Tokenizer


def add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Add the tokens, filled up to `size`, merges, special tokens and chat template. Raises `ModelError`."""
    tokenizer = Tokenizer.from_folder(folder)
    described: dict[str, Any] = json.loads(tokenizer.to_json())
    model = described["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"{folder}: tokenizers of the kind {model.get('type')} cannot be converted")
    texts = {token_id: text for text, token_id in model["vocab"].items()}
    added = {token["id"]: token for token in described["added_tokens"]}
    texts.update({token_id: token["content"] for token_id, token in added.items()})
    if max(texts) >= size:
        raise ModelError(f"{folder}: the tokenizer has token {max(texts)}, the model has embeddings for {size} only")
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens = [texts.get(token_id, f"[PAD{token_id}]") for token_id in range(size)]
    types = [_type(token_id, texts, added, model) for token_id in range(size)]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prepends(described.get("normalizer")))
    else:
        name = pretokenizers.recognise(described.get("pre_tokenizer"))
        if name is None or described.get("normalizer") is not None:
            raise ModelError(f"{folder}: the way its tokenizer cuts text has no name in GGUF files")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_roles(writer, folder, tokenizer, size)


def _add_roles(writer: Any, folder: Path, tokenizer: Tokenizer, size: int) -> None:
    """Special tokens, whether they are added to prompts, and the chat template."""
    begin = tokenizer.bos_token_id
    if begin is not None:
        writer.add_bos_token_id(begin)
    ends = [token for token in tokenizer.eos_token_ids if token < size]
    end = tokenizer.eos_token_id
    if end is None and ends:
        end = ends[0]
    if end is not None:
        writer.add_eos_token_id(end)
    other = [token for token in ends if token != end]
    if other:
        writer.add_eot_token_id(other[0])
    for role, add in (("unk_token", writer.add_unk_token_id), ("pad_token", writer.add_pad_token_id)):
        text = tokenizer.special_tokens.get(role)
        token_id = tokenizer.token_id(text) if isinstance(text, str) else None
        if token_id is not None and token_id < size:
            add(token_id)
    around = tokenizer.encode("").ids
    writer.add_add_bos_token(begin is not None and around[:1] == [begin])
    writer.add_add_eos_token(end is not None and around[-1:] == [end])
    own = folder / "chat_template.jinja"
    template = own.read_text("utf-8") if own.is_file() else tokenizer.config.get("chat_template")
    if isinstance(template, str | list):
        writer.add_chat_template(template)


def _type(token_id: int, texts: dict[int, str], added: dict[int, dict[str, Any]], model: dict[str, Any]) -> int:
    if token_id not in texts:
        return UNUSED
    token = added.get(token_id)
    if texts[token_id] == model.get("unk_token"):
        return UNKNOWN
    if token is not None:
        return CONTROL if token["special"] else USER_DEFINED
    text = texts[token_id]
    if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return BYTE
    return NORMAL


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores under which SentencePiece's way of joining follows these merges: the earlier, the higher."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return False
    return any(part["type"] == "Prepend" for part in normalizer.get("normalizers", [normalizer]))
