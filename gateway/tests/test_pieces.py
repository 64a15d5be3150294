"""Text in pieces: the same ids as the whole for every tokenizer that is taken, and the others are refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tgi_gateway.prompt.pieces import Pieces
from tgi_gateway.prompt.tokenizer import Tokenizer as Ours

CORPUS = [
    "the quick brown fox jumps over the lazy dog, it's what they'll do: 12 345 6789 times; größer 日本語 \U0001f600",
    "def main(self) -> None:\n    return self.value  # a comment\n\n\tand so on ... e\u0301t cetera",
]
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(pre_tokenizer: object, normalizer: object = None, *, template: str = "<s> $A") -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return made


def split(pattern: str) -> object:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
TAKEN: dict[str, Tokenizer] = {
    "gpt-2": trained(GPT_2),
    "digits": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2])),
    "llama-3": trained(split(LLAMA)),
    "both sides": trained(split(LLAMA), template="<s> $A </s>"),
    "qwen": trained(split(LLAMA), normalizers.NFC(), template="$A"),
}
FRAGMENTS = (
    "the fox", "quick Brown fox", "it's", "They'LL do", " ", "  ", "\n", "\r\n", "\t", "12", "3456 x", "größer",
    "e\u0301", "\u0301",
    "日本", "語", "\U0001f600", "<s>", "</s>", "...", "don't", "a b c d e", "'", "_x", "\u00a0", "Ⅷ", "ﬁ",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=40).map("".join)


@pytest.mark.parametrize("name", TAKEN)
def test_pieces_have_the_ids_of_the_whole_text(name: str) -> None:
    inner = TAKEN[name]
    pieces = Pieces.of(inner, characters=5, most=20)
    assert pieces is not None

    @settings(deadline=None, max_examples=60)
    @given(text=TEXTS, special=st.booleans())
    def check(text: str, special: bool) -> None:
        whole = inner.encode(text, add_special_tokens=special).ids
        assert pieces.encode(text, special).tolist() == whole
        assert "".join(pieces.cut(text)) == text

    check()


@pytest.mark.parametrize(
    ("why", "make"),
    [
        ("sees across spaces", lambda: trained(split(r"\p{L}+ \p{L}+|."))),
        ("looks behind", lambda: trained(split(r"(?<=x) \p{L}+| ?\p{L}+|."))),
        ("adds a space in front", lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True))),
        ("is no byte-level one", lambda: trained(pre_tokenizers.Metaspace())),
        ("changes the text", lambda: trained(GPT_2, normalizers.Sequence([normalizers.Strip(), normalizers.NFC()]))),
        ("never splits", lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))),
    ],
)
def test_a_tokenizer_is_refused_that(why: str, make: Callable[[], Tokenizer]) -> None:
    assert Pieces.of(make()) is None, why


@pytest.mark.parametrize(
    "token", [AddedToken("two words"), AddedToken("word", rstrip=True), AddedToken("word", single_word=True)]
)
def test_an_added_token_that_reaches_across_a_space_refuses_its_tokenizer(token: AddedToken) -> None:
    made = trained(GPT_2)
    made.add_tokens([token])
    assert Pieces.of(made) is None


def test_texts_with_the_same_beginning_share_its_pieces() -> None:
    pieces = Pieces.of(TAKEN["gpt-2"], characters=50, most=100)
    assert pieces is not None
    shared = " ".join(f"word{n} is here" for n in range(100))
    one, other = list(pieces.cut(f"{shared} and one end")), list(pieces.cut(f"{shared} but quite another end"))
    assert len(one) > 20
    assert one[:-1] == other[: len(one) - 1]


def test_no_more_pieces_are_remembered_than_allowed() -> None:
    pieces = Pieces.of(TAKEN["gpt-2"], characters=5, most=10)
    assert pieces is not None
    text = " ".join(f"w{chr(97 + n % 26)} x{chr(97 + n // 26)} y" for n in range(300))
    assert pieces.encode(text, True).tolist() == TAKEN["gpt-2"].encode(text).ids
    assert len(pieces._known) == 10


def test_text_without_a_cut_is_encoded_and_not_remembered() -> None:
    inner = TAKEN["gpt-2"]
    pieces = Pieces.of(inner, characters=20, most=10)
    assert pieces is not None
    text = "日本" * 50 + " one two three four five six seven eight nine ten eleven" + "x" * 100
    assert pieces.encode(text, False).tolist() == inner.encode(text, add_special_tokens=False).ids
    assert all(len(piece) <= 40 for piece in pieces._known)
    assert pieces._known


def test_prompts_that_come_together_encode_their_common_beginning_once() -> None:
    inner = TAKEN["gpt-2"]
    encoded: list[str] = []

    class Counting:
        def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> object:
            encoded.extend(texts)
            time.sleep(0.02)
            return inner.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    pieces = Pieces(Counting(), 20, 1000, ([0], []))
    shared = " ".join(f"w{chr(97 + n % 26)} x{chr(97 + n // 26)} y" for n in range(200))
    texts = [f"{shared} and a question {'abcdefgh'[n]} of its own" for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: pieces.encode(text, True).tolist(), texts))
    assert found == [inner.encode(text).ids for text in texts]
    assert len(encoded) == len(set(encoded))


def test_a_piece_that_cannot_be_encoded_is_not_remembered() -> None:
    class Broken:
        def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> object:
            raise RuntimeError(f"no memory for {len(texts)}, {add_special_tokens}")

    pieces = Pieces(Broken(), 20, 1000, ([], []))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            pieces.encode("some words that are long enough to be cut into pieces", True)
    assert not pieces._known
    with pytest.raises(TypeError):
        pieces.encode("half a pair \ud83d of it", True)


def test_a_long_prompt_reads_as_a_short_one_does(tmp_path: Path) -> None:
    TAKEN["llama-3"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    ours = Ours.from_folder(tmp_path)
    text = " ".join(CORPUS * 60) + " \ud83d and half a pair"
    encoding = ours.encode(text)
    assert encoding.text == text.replace("\ud83d", "\ufffd")
    assert list(encoding.ids) == TAKEN["llama-3"].encode(encoding.text).ids
    assert len(encoding.offsets) == len(encoding.ids)
    ours.close()
