"""A model folder without weights: Llama 3.1 8B's shape and a byte-level BPE tokenizer of its vocabulary size.

Every token beyond the single bytes is a space and up to four letters, so that a prompt of n words has n tokens, and is
tokenized and detokenized by the same code as a real one.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SPECIAL_TOKENS = 256
"""At the end of the vocabulary, as in Llama 3."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = "words.txt"
"""File of the words that are one token each behind a space."""


def write_model_folder(folder: Path, config: dict[str, Any] = LLAMA_8B) -> None:
    """Write config.json, tokenizer.json, tokenizer_config.json and the list of words. Takes about two seconds."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ordinary = config["vocab_size"] - SPECIAL_TOKENS
    vocab = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    words: list[str] = []
    # All pieces of one letter, then of two, ...: a longer one is merged from a shorter one and a letter.
    pieces = ["Ġ"]
    while len(vocab) < ordinary:
        longer = [(piece, letter) for piece, letter in itertools.product(pieces, LETTERS)]
        random.Random(0).shuffle(longer)
        longer = longer[: ordinary - len(vocab)]
        merges += longer
        pieces = [piece + letter for piece, letter in longer]
        vocab |= {piece: len(vocab) + index for index, piece in enumerate(pieces)}
        words = [piece[1:] for piece in pieces] if len(pieces) > len(words) else words
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{n}|>" for n in range(SPECIAL_TOKENS - 2))]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    chat = "{% for m in messages %} {{ m.content }}{% endfor %}"
    told = {"bos_token": names[0], "eos_token": names[1], "chat_template": chat}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), "utf-8")
    (folder / WORDS).write_text(" ".join(sorted(words)), "utf-8")
