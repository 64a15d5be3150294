"""Token by token, the text is that of decoding the whole sequence at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from tgi_gateway.prompt.detokenizer import TableDecoder, WindowDecoder, byte_alphabet
from tgi_gateway.prompt.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind",
    "Grüße aus Köln: schöne Straßen, über 1000 Jahre alt",
    "日本語のテキストと漢字と仮名",
    "emoji \U0001f600\U0001f680 and more \U0001f468\u200d\U0001f469\u200d\U0001f467",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level_bpe() -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    library.add_tokens([AddedToken("<tool> 日"), AddedToken("é", normalized=False)])
    return library


def sentencepiece_bpe() -> Library:
    """As Llama 2: marks for spaces, bytes for unknown characters, one space stripped at the start."""
    pieces = (
        SPECIAL
        + [f"<0x{byte:02X}>" for byte in range(256)]
        + ["▁", *"abcdefghijklmnopqrstuvwxyzüß日本", "▁t", "▁th", "▁▁"]
    )
    library = Library(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "t"), ("▁t", "h"), ("▁", "▁")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    library.add_special_tokens(SPECIAL)
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return library


def unigram() -> Library:
    pieces = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz ,", "▁", "▁the", "the", "▁dog", "ing", "日本"]
    library = Library(models.Unigram([(piece, -float(index)) for index, piece in enumerate(pieces)], unk_id=0))
    library.add_special_tokens(SPECIAL)
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    return library


def wordpiece() -> Library:
    pieces = [
        *SPECIAL,
        "the",
        "dog",
        "##s",
        "##ing",
        "play",
        ".",
        ",",
        "'",
        "don",
        "t",
        *"abcdefgh",
        *(f"##{c}" for c in "abcdefgh"),
    ]
    library = Library(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    library.add_special_tokens(SPECIAL)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    return library


def no_decoder() -> Library:
    library = Library(
        models.WordLevel({piece: index for index, piece in enumerate([*SPECIAL, "the", "dog"])}, unk_token="<unk>")
    )
    library.add_special_tokens(SPECIAL)
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return library


BUILDERS: list[Callable[[], Library]] = [byte_level_bpe, sentencepiece_bpe, unigram, wordpiece, no_decoder]
exactly_as_library = pytest.mark.parametrize("build", [byte_level_bpe, unigram, wordpiece, no_decoder])
every_vocabulary = pytest.mark.parametrize("build", BUILDERS)


@functools.cache
def tokenizer(build: Callable[[], Library]) -> Tokenizer:
    return Tokenizer(build(), {}, {}, workers=1)


def stream(tokens: Tokenizer, ids: Sequence[int], prompt: Sequence[int] | None = None) -> list[str]:
    decoder = tokens.decoder(prompt or [])
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@every_vocabulary
@given(text=st.text(max_size=40) | st.sampled_from(CORPUS))
def test_a_text_comes_back_as_the_library_decodes_it(build: Callable[[], Library], text: str) -> None:
    tokens = tokenizer(build)
    ids = tokens.encode(text).ids
    assert "".join(stream(tokens, ids)) == tokens.decode(ids)


@exactly_as_library
@given(data=st.data())
def test_random_ids_read_as_the_library_decodes_them(build: Callable[[], Library], data: st.DataObject) -> None:
    tokens = tokenizer(build)
    ids = data.draw(st.lists(st.integers(0, tokens.vocab_size + 3), max_size=30))
    assert "".join(stream(tokens, ids)) == tokens.decode(ids)


@given(data=st.data())
def test_random_byte_fallback_ids_read_as_their_bytes(data: st.DataObject) -> None:
    tokens = tokenizer(sentencepiece_bpe)
    ids = data.draw(st.lists(st.integers(0, tokens.vocab_size + 3), max_size=30))
    data_bytes = b""
    for token_id in ids:
        piece = tokens._inner.id_to_token(token_id)
        if piece is not None and piece not in SPECIAL:
            is_byte = piece.startswith("<0x")
            data_bytes += bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()
    assert "".join(stream(tokens, ids)) == data_bytes.decode(errors="replace").removeprefix(" ")
    if "\ufffd" not in data_bytes.decode(errors="replace"):
        assert "".join(stream(tokens, ids)) == tokens.decode(ids)


@given(raw=st.binary(max_size=12))
def test_invalid_bytes_become_what_python_makes_of_them(raw: bytes) -> None:
    tokens = tokenizer(byte_level_bpe)
    character = {byte: char for char, byte in byte_alphabet().items()}
    ids = [tokens.token_id(character[byte]) for byte in raw]
    assert None not in ids
    assert "".join(stream(tokens, [token_id for token_id in ids if token_id is not None])) == raw.decode(
        errors="replace"
    )


@every_vocabulary
@given(text=st.text(alphabet="ab \u00fc\u65e5\U0001f600the", max_size=20))
def test_no_piece_shows_half_a_character(build: Callable[[], Library], text: str) -> None:
    tokens = tokenizer(build)
    if build is byte_level_bpe:
        assert not any("\ufffd" in piece for piece in stream(tokens, tokens.encode(text).ids))
    shown = "".join(stream(tokens, tokens.encode(text).ids)[:-1])
    assert tokens.decode(tokens.encode(text).ids).startswith(shown)


def test_a_character_cut_into_bytes_comes_with_its_last_token() -> None:
    tokens = tokenizer(sentencepiece_bpe)
    rocket = [tokens.token_id(f"<0x{byte:02X}>") or -1 for byte in "\U0001f680".encode()]
    assert stream(tokens, rocket) == ["", "", "", "\U0001f680", ""]


def test_a_text_that_ends_within_a_character_ends_in_a_replacement() -> None:
    tokens = tokenizer(sentencepiece_bpe)
    rocket = [tokens.token_id(f"<0x{byte:02X}>") or -1 for byte in "\U0001f680".encode()]
    a = tokens.token_id("a") or -1
    assert stream(tokens, rocket[:2]) == ["", "", "\ufffd"]
    assert stream(tokens, [*rocket[:2], a]) == ["", "", "\ufffda", ""]


def test_the_first_space_is_stripped_only_where_no_text_precedes() -> None:
    tokens = tokenizer(sentencepiece_bpe)
    the = tokens.encode("the").ids
    start = tokens.token_id("<s>") or -1
    assert "".join(stream(tokens, the)) == "the"
    assert "".join(stream(tokens, the, [start])) == "the"
    assert "".join(stream(tokens, the, [start, *the])) == " the"


def test_wordpieces_continue_the_words_of_the_prompt() -> None:
    tokens = tokenizer(wordpiece)
    prompt = tokens.encode("the dog").ids
    plural = tokens.token_id("##s") or -1
    assert "".join(stream(tokens, [plural, *tokens.encode("playing").ids], prompt)) == "s playing"


def test_special_and_unknown_ids_are_no_text() -> None:
    for build in BUILDERS:
        tokens = tokenizer(build)
        assert stream(tokens, [1, 2, 10**6]) == ["", "", "", ""]


def test_common_vocabularies_need_no_window() -> None:
    for build in (byte_level_bpe, sentencepiece_bpe, unigram):
        assert isinstance(tokenizer(build).decoder(), TableDecoder)
    for build in (wordpiece, no_decoder):
        assert isinstance(tokenizer(build).decoder(), WindowDecoder)


def test_a_window_forever_ending_in_a_replacement_is_shown_in_the_end() -> None:
    decoder = WindowDecoder(lambda ids: "\ufffd" * len(ids))
    shown = [decoder.push(0) for _ in range(40)]
    assert "".join(shown)
    assert "".join(shown) + decoder.flush() == "\ufffd" * 40


@every_vocabulary
def test_a_token_alone_keeps_its_space_and_special_tokens_their_name(build: Callable[[], Library]) -> None:
    tokens = tokenizer(build)
    assert [tokens.token_text(token_id) for token_id in range(3)] == SPECIAL
    if build is sentencepiece_bpe:
        assert tokens.token_text(tokens.token_id("▁th") or -1) == " th"
        assert tokens.token_text(tokens.token_id("<0xE6>") or -1) == "\ufffd"
        assert tokens.token_text(10**6) == ""
