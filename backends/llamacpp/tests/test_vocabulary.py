"""Tokenizers on their way into a GGUF file and out of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, trainers

from tgi_backend_llamacpp import pretokenizers
from tgi_backend_llamacpp.convert import convert
from tgi_backend_llamacpp.gguf_file import read_gguf
from tgi_backend_llamacpp.vocabulary import write_tokenizer
from tgi_gateway.errors import ModelError
from tgi_gateway.hub import demo_model
from tgi_gateway.prompt.chat_template import ChatTemplate
from tgi_gateway.prompt.tokenizer import Tokenizer
from tgi_model_server.testing.models import SMALL, save_random_model

PIECES = [
    "Hello",
    " world",
    "  ",
    "\n\n",
    "\t",
    "123456",
    " 7",
    "naïve",
    "日本語",
    "🙂",
    "it's",
    "I'LL",
    "_x_",
    "...",
    "é",
]


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randrange(12))) for _ in range(count)]


def test_a_byte_level_vocabulary_comes_back_as_it_was(demo_gguf: Path, tmp_path: Path) -> None:
    write_tokenizer(read_gguf(demo_gguf), tmp_path)
    before, now = Tokenizer.from_folder(demo_model()), Tokenizer.from_folder(tmp_path)
    for text in [*texts(0, 200), "<|im_start|>user\nhi<|im_end|>", '<tool_call>{"a": 1}</tool_call>']:
        ids = before.encode(text).ids
        assert now.encode(text).ids == ids
        assert now.decode(ids) == before.decode(ids)
    assert now.special_texts == before.special_texts
    assert set(now.eos_token_ids) == set(before.eos_token_ids)
    assert now.config["chat_template"] == before.config["chat_template"]
    assert ChatTemplate.from_folder(tmp_path, None) is not None


@pytest.fixture
def sentence_piece(tmp_path: Path) -> Path:
    """A small model whose tokenizer is SentencePiece's, as tokenizer.json writes it."""
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special[:3], show_progress=False)
    inner.train_from_iterator([" ".join(texts(seed, 30)) + " hello there world" for seed in range(20)], trainer)
    document: dict[str, Any] = json.loads(inner.to_str())
    vocabulary = document["model"]["vocab"]
    for token in special:
        vocabulary.setdefault(token, len(vocabulary))
    size = len(vocabulary)
    (tmp_path / "model").mkdir()
    folder = save_random_model(tmp_path / "model", {**SMALL, "vocab_size": size, "tie_word_embeddings": True})
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def test_a_sentence_piece_vocabulary_comes_back_as_it_was(sentence_piece: Path, tmp_path: Path) -> None:
    convert(sentence_piece, tmp_path / "spm.gguf", "f32")
    write_tokenizer(read_gguf(tmp_path / "spm.gguf"), tmp_path / "back")
    before, now = Tokenizer.from_folder(sentence_piece), Tokenizer.from_folder(tmp_path / "back")
    for text in ["hello world", "Hello  there", *texts(1, 100)]:
        ids = before.encode(text, add_special_tokens=False).ids
        assert now.encode(text, add_special_tokens=False).ids == ids
        assert now.decode(ids) == before.decode(ids)


def test_llama_cpp_cuts_text_as_the_written_tokenizers_do(
    sentence_piece: Path, demo_gguf: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from tgi_backend_llamacpp.native import Model
    from tgi_backend_llamacpp.options import LlamaOptions
    from tgi_gateway.backend import EngineOptions

    convert(sentence_piece, tmp_path / "spm.gguf", "f32")
    for path in (demo_gguf, tmp_path / "spm.gguf"):
        write_tokenizer(read_gguf(path), tmp_path / "back")
        tokenizer = Tokenizer.from_folder(tmp_path / "back")
        model = Model(path, LlamaOptions.of(EngineOptions(path, "test")))
        try:
            for text in ["hello world", *texts(2, 100)]:
                if text:
                    assert model.tokenize(text) == tokenizer.encode(text, add_special_tokens=False).ids, (path, text)
        finally:
            model.close()


@pytest.mark.parametrize("name", sorted(pretokenizers.STEPS))
def test_every_way_to_cut_text_is_one_that_the_tokenizers_know(name: str) -> None:
    described = pretokenizers.describe(name)
    inner = tokenizers.Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": described,
                "post_processor": None,
                "decoder": None,
                "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
            }
        )
    )
    for text in texts(3, 20):
        pieces = inner.pre_tokenizer.pre_tokenize_str(text)
        assert "".join(text[begin:end] for _, (begin, end) in pieces) == text
    assert pretokenizers.STEPS[str(pretokenizers.recognise(described))] == pretokenizers.STEPS[name]


def test_a_way_to_cut_text_without_a_name_is_refused(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, {**SMALL, "vocab_size": 300})
    inner = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken("<end>", special=True)])
    inner.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match="has no name in GGUF files"):
        convert(folder, tmp_path / "out.gguf", "f32")
