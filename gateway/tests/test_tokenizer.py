"""A model folder's tokenizer: what is read from which file, and what happens with bad files and bad text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tgi_gateway.errors import ModelError
from tgi_gateway.prompt import tokenizer as subject
from tgi_gateway.prompt.stand_in import write_stand_in

TEXT = "the quick brown fox jumps over the lazy dog, größer 日本語 \U0001f600"


def library() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    library().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def tokens(folder: Path) -> Iterator[subject.Tokenizer]:
    write(
        folder,
        "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "model_max_length": 4096},
    )
    made = subject.Tokenizer.from_folder(folder)
    yield made
    made.close()


def test_a_text_is_encoded_with_and_without_special_tokens(tokens: subject.Tokenizer) -> None:
    plain = tokens.encode("the fox", add_special_tokens=False).ids
    assert tokens.encode("the fox").ids == [0, *plain]
    assert len(tokens.encode("the fox")) == len(plain) + 1
    assert tokens.decode([0, *plain]) == "the fox"
    assert tokens.decode([0, *plain], skip_special_tokens=False) == "<s>the fox"


async def test_encoding_in_a_thread_gives_the_same(tokens: subject.Tokenizer) -> None:
    for text in ("short", TEXT * 100):
        assert (await tokens.encode_async(text)).ids == tokens.encode(text).ids


async def test_the_event_loop_runs_while_a_long_text_is_encoded(tokens: subject.Tokenizer) -> None:
    work = asyncio.create_task(tokens.encode_async(TEXT * 5_000))
    turns = 0
    while not work.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10
    assert len(await work) > 5_000


@cache
def trained_once() -> subject.Tokenizer:
    return subject.Tokenizer(library(), {}, {}, workers=1)


@given(text=st.text(max_size=30))
def test_offsets_are_bytes_and_cover_the_text(text: str) -> None:
    encoding = trained_once().encode(text, add_special_tokens=False)
    data = encoding.text.encode()
    covered = bytearray()
    for start, stop in encoding.offsets:
        covered += data[max(start, len(covered)) : stop]  # a character cut into tokens belongs to each of them
    assert bytes(covered) == data
    assert len(encoding.offsets) == len(encoding.ids)


def test_added_special_tokens_have_no_offsets(tokens: subject.Tokenizer) -> None:
    assert tokens.encode("a").offsets == [(0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("text", "encoded"), [("a\ud800b", "a\ufffdb"), ("\udc00", "\ufffd"), ("\ud83d\ude00", "\U0001f600")]
)
def test_lone_surrogates_are_replaced_and_pairs_joined(tokens: subject.Tokenizer, text: str, encoded: str) -> None:
    encoding = tokens.encode(text)
    assert encoding.text == encoded
    assert tokens.decode(encoding.ids) == encoded
    assert encoding.offsets[-1][1] == len(encoded.encode())


def test_truncation_and_padding_of_the_file_do_not_apply(folder: Path) -> None:
    cut = library()
    cut.enable_truncation(4)
    cut.enable_padding(length=64)
    cut.save(str(folder / "tokenizer.json"))
    tokens = subject.Tokenizer.from_folder(folder)
    assert len(tokens.encode("a")) == 2
    assert tokens.decode(tokens.encode(TEXT).ids) == TEXT


def test_special_tokens_are_known_by_role_and_id(tokens: subject.Tokenizer) -> None:
    assert tokens.special_texts == {0: "<s>", 1: "</s>"}
    assert tokens.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (tokens.bos_token_id, tokens.eos_token_id, tokens.eos_token_ids) == (0, 1, (1,))
    assert tokens.model_max_length == 4096
    assert tokens.vocab_size == 300
    assert tokens.base_vocab_size == 300
    assert tokens.token_text(1) == "</s>"
    assert tokens.token_id("</s>") == 1
    assert tokens.token_id("no such token") is None


@pytest.mark.parametrize(("declared", "ids"), [(7, (7,)), ([7, 9], (7, 9)), ([], (1,)), (None, (1,))])
def test_the_generation_config_names_the_ending_tokens(folder: Path, declared: Any, ids: tuple[int, ...]) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": "</s>"})
    write(folder, "generation_config.json", {"eos_token_id": declared})
    assert subject.Tokenizer.from_folder(folder).eos_token_ids == ids


@pytest.mark.parametrize("limit", [1e30, None, "much", 0])
def test_a_model_max_length_that_is_no_limit_is_none(folder: Path, limit: Any) -> None:
    write(folder, "tokenizer_config.json", {"model_max_length": limit})
    assert subject.Tokenizer.from_folder(folder).model_max_length is None


def test_added_tokens_of_the_config_are_those_of_transformers(folder: Path) -> None:
    made = library()
    made.add_tokens([AddedToken("<plain>", normalized=False)])
    made.save(str(folder / "tokenizer.json"))
    write(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "the",
            "additional_special_tokens": ["g"],
            "added_tokens_decoder": {
                "0": {"content": "<s>", "special": True},
                "300": {"content": "<plain>", "special": True, "normalized": False},
                "301": {"content": "<|im_start|>", "special": True, "normalized": False},
                "302": {"content": "<tool>", "special": False, "normalized": False},
            },
        },
    )
    ours = subject.Tokenizer.from_folder(folder)
    load: Any = transformers.PreTrainedTokenizerFast.from_pretrained
    theirs = load(folder)
    text = "<|im_start|>the<plain> fox<tool></s>"
    assert ours.encode(text).ids == theirs.encode(text)
    assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert {300, 301} <= ours.special_texts.keys()
    assert 302 not in ours.special_texts


def test_a_role_given_to_an_ordinary_token_makes_it_special(folder: Path) -> None:
    ordinary = subject.Tokenizer.from_folder(folder).token_id("the")
    assert ordinary is not None
    write(folder, "tokenizer_config.json", {"eos_token": "the", "pad_token": "<not in the vocabulary>"})
    tokens = subject.Tokenizer.from_folder(folder)
    assert tokens.special_texts[ordinary] == "the"
    assert tokens.vocab_size == 300


def test_the_named_config_file_overrides_the_folders(folder: Path, tmp_path: Path) -> None:
    write(folder, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "<s>"})
    write(tmp_path, "mine.json", {"eos_token": "</s>"})
    tokens = subject.Tokenizer.from_folder(folder, tmp_path / "mine.json")
    assert tokens.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_folder_without_tokenizer_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json.*save_pretrained"):
        subject.Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"model": 3}', b"\xff\xfe", b"[]"])
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a readable tokenizer"):
        subject.Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_broken_companion_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        subject.Tokenizer.from_folder(folder)


def test_a_missing_named_config_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="--tokenizer-config-path"):
        subject.Tokenizer.from_folder(folder, folder / "nowhere.json")


def test_a_stand_in_has_a_token_for_each_byte_and_each_id_of_the_model(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"vocab_size": 1000})
    write_stand_in(tmp_path / "made", tmp_path)
    made = subject.Tokenizer.from_folder(tmp_path / "made")
    assert made.vocab_size == 1000
    assert made.encode(TEXT).ids == list(TEXT.encode())
    assert made.decode(made.encode(TEXT).ids) == TEXT
    decoder = made.decoder()
    assert "".join(decoder.push(token) for token in [104, 105, 999]) + decoder.flush() == "hi <999>"


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"vocab_size": 255}'])
def test_a_stand_in_needs_a_vocabulary_that_holds_all_bytes(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"config.json"):
        write_stand_in(tmp_path / "made", tmp_path)
