"""A header that lies is refused with a word on where, and never read past what is there."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tgi_backend_llamacpp.gguf_file import TENSOR_TYPES, read_gguf, read_model
from tgi_gateway.errors import ModelError


def small(path: Path, **changes: Any) -> Path:
    """A file with two tensors, three tokens and one lie at most."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(changes.get("tokens", ["a", "b", "c"]))
    writer.add_token_scores(changes.get("scores", [0.0, 1.0, 2.0]))
    writer.add_eos_token_id(changes.get("eos", 2))
    writer.add_tensor("token_embd.weight", np.zeros((3, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def patched(path: Path, change: Callable[[bytearray], None]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def after(content: bytearray, text: str) -> int:
    """The place behind a key or name."""
    return content.index(text.encode()) + len(text)


def put(place: Callable[[bytearray], int], layout: str, value: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(layout, content, place(content), value)


NAME = "output_norm.weight"
LIES: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "magic": (lambda content: content.__setitem__(slice(0, 4), b"GGML"), "does not begin with GGUF"),
    "version": (put(lambda _: 4, "<I", 1), "version 1"),
    "big-endian": (put(lambda _: 4, ">I", 3), "big-endian"),
    "tensor count": (put(lambda _: 8, "<Q", 1 << 60), "tensors: it claims"),
    "entry count": (put(lambda _: 16, "<Q", 1 << 40), "metadata entries: it claims"),
    "key length": (put(lambda _: 24, "<Q", 1 << 63), "a key: it claims"),
    "value type": (put(lambda c: after(c, "general.architecture"), "<I", 77), "unknown type 77"),
    "text length": (put(lambda c: after(c, "general.architecture") + 4, "<Q", 1 << 35), "it claims"),
    "list length": (put(lambda c: after(c, "tokenizer.ggml.scores") + 8, "<Q", 1 << 61), "it claims"),
    "list type": (put(lambda c: after(c, "tokenizer.ggml.scores") + 4, "<I", 9), "a list of lists"),
    "dimensions": (put(lambda c: after(c, NAME), "<I", 4_000_000), "dimensions"),
    "no elements": (put(lambda c: after(c, NAME) + 4, "<Q", 0), "impossible shape"),
    "overflow": (put(lambda c: after(c, NAME) + 4, "<Q", (1 << 62) + 1), "impossible shape"),
    "too many elements": (put(lambda c: after(c, NAME) + 4, "<Q", 1 << 33), "ends at byte"),
    "tensor type": (put(lambda c: after(c, NAME) + 12, "<I", 99), "type 99"),
    "type of a vector": (put(lambda c: after(c, NAME) + 12, "<I", 1), "vectors are F32"),
    "type of a matrix": (put(lambda c: after(c, "token_embd.weight") + 20, "<I", 26), "there are no weights"),
    "blocks": (put(lambda c: after(c, "token_embd.weight") + 20, "<I", 8), "needs a multiple of 32"),
    "offset": (put(lambda c: after(c, NAME) + 16, "<Q", 1 << 62), "ends at byte"),
    "crooked offset": (put(lambda c: after(c, NAME) + 16, "<Q", 33), "no multiple of 32"),
    "on top of another": (put(lambda c: after(c, NAME) + 16, "<Q", 0), "lies on another"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_told_by_name(tmp_path: Path, lie: str) -> None:
    change, told = LIES[lie]
    path = patched(small(tmp_path / "model.gguf"), change)
    with pytest.raises(ModelError) as raised:
        read_gguf(path)
    assert told in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scores": [0.0]}, "one entry for each of the 3 tokens"),
        ({"eos": 3}, "eos_token_id is 3; there are 3 tokens"),
        ({"tokens": ["a", "b"], "scores": [0.0, 1.0], "eos": 1}, "2 tokens and embeddings for 3"),
    ],
)
def test_lists_by_token_must_belong_together(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        read_gguf(small(tmp_path / "model.gguf", **changes))


def test_a_sound_file_is_read_as_its_own_library_reads_it(demo_gguf: Path) -> None:
    ours, theirs = read_gguf(demo_gguf), gguf.GGUFReader(demo_gguf)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(tensor.shape.tolist())
        assert (mine.type, mine.size, mine.offset) == (tensor.tensor_type.name, tensor.n_bytes, tensor.data_offset)
    assert ours.strings("tokenizer.ggml.tokens") == theirs.fields["tokenizer.ggml.tokens"].contents()


def test_block_sizes_are_those_of_the_library() -> None:
    known = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert all(known.get(number, entry) == entry for number, entry in TENSOR_TYPES.items())


def test_a_file_cut_anywhere_is_refused(demo_gguf: Path, tmp_path: Path) -> None:
    content = demo_gguf.read_bytes()
    rng = random.Random(0)
    path = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 23, 24, *(rng.randrange(len(content)) for _ in range(40)), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ModelError):
            read_gguf(path)


def test_flipped_bytes_of_a_header_are_refused_or_harmless(demo_gguf: Path, tmp_path: Path) -> None:
    sound = demo_gguf.read_bytes()
    header = min(tensor.offset for tensor in read_gguf(demo_gguf).tensors.values())
    rng = random.Random(1)
    path, refused = tmp_path / "flipped.gguf", 0
    for _ in range(60):
        content = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            content[rng.choice([rng.randrange(header), rng.randrange(2000)])] = rng.randrange(256)
        path.write_bytes(content)
        try:
            read_gguf(path)
        except ModelError:
            refused += 1
    assert refused > 10


def test_parts_of_a_split_model_are_all_checked(tmp_path: Path, demo_gguf: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_gguf(tmp_path / "absent.gguf")
    assert [part.path for part in read_model(demo_gguf)] == [demo_gguf]
    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("a", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"m-00002-of-00002\.gguf cannot be read"):
        read_model(tmp_path / "m-00001-of-00002.gguf")
