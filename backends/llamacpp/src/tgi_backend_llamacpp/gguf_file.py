"""A GGUF file's header, read and checked in Python: native code gets to see only files whose sizes are true.

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. Every length is compared with the bytes that are left
before anything is read or allocated, every tensor must lie within the file, and lists that belong together must be of
one length.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

from tgi_gateway.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 1024
DEFAULT_ALIGNMENT = 32
_MAX_ELEMENTS = (1 << 60) - 1

_T = TypeVar("_T")

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | list[int] | list[float] | list[str]

_SCALARS: Mapping[int, struct.Struct] = {
    kind: struct.Struct(f"<{code}") for kind, code in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]

TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""Number -> name, elements of a block, bytes of a block. What is not here cannot be checked, and is refused."""
_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64")
_WEIGHTS = (".weight", ".bias", ".lora_a", ".lora_b")
"""Ends of the names of tensors that products and sums are made with; others may be tables of whole numbers."""
_TABLES = ("tid2eid",)
"""Parts of the names of tables that are called weights."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the header. `shape` as ggml counts: the fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: str
    size: int
    """Bytes."""
    offset: int
    """From the beginning of the file."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A header that is true to its file."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Tensor]

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, value, "a whole number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def strings(self, key: str) -> list[str]:
        """Empty if there is no such list."""
        return self._items(key, str, "texts")

    def wholes(self, key: str) -> list[int]:
        """Empty if there is no such list."""
        return self._items(key, int, "whole numbers")

    def numbers(self, key: str) -> list[float]:
        """Empty if there is no such list."""
        return self._items(key, float, "numbers")

    def _items(self, key: str, kind: type[_T], what: str) -> list[_T]:
        value = self.metadata.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self._wrong(key, value, f"a list of {what}")
        return value  # type: ignore[return-value]

    def _wrong(self, key: str, value: object, wanted: str) -> ModelError:
        got = "missing" if value is None else f"{type(value).__name__}"
        return broken(self.path, f"its entry {key} is {got}, not {wanted}")


def broken(path: Path, why: str) -> ModelError:
    """The refusal of a file."""
    return ModelError(f"{path} is not a sound GGUF file: {why}. Get the file again, or convert the model again")


def read_gguf(path: Path) -> GgufFile:
    """Read and check a header. Raises `ModelError` that names the first thing which is wrong."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise broken(path, "it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).read()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def read_model(path: Path) -> list[GgufFile]:
    """The header of a model and, where it is split into several files, of all its parts. Raises `ModelError`."""
    first = read_gguf(path)
    count = first.whole("split.count", 1)
    if count <= 1:
        return [first]
    name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if name is None or int(name[2]) != 1 or int(name[3]) != count:
        raise ModelError(
            f"{path} is a part of a model in {count} files. Name the first, which ends in -00001-of-{count:05}.gguf"
        )
    parts = [first, *(read_gguf(path.with_name(f"{name[1]}-{at:05}-of-{name[3]}.gguf")) for at in range(2, count + 1))]
    names = [tensor for part in parts for tensor in part.tensors]
    if len(names) != len(set(names)) or len(names) != first.whole("split.tensors.count", len(names)):
        raise broken(path, "its parts do not belong together")
    return parts


class _Reader:
    """Goes through a header once. Nothing is read that the file does not have."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._size = len(content)
        self._at = len(MAGIC)

    def read(self) -> GgufFile:
        version = self._number(_U32, "version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise self._broken(
                "it is big-endian, which this machine is not" if swapped else f"version {version} is none of 2 and 3"
            )
        tensor_count = self._count(_U64, 24, "tensors")
        entry_count = self._count(_U64, 13, "metadata entries")
        metadata: dict[str, Value] = {}
        for _ in range(entry_count):
            key = self._text("a key", MAX_NAME_BYTES)
            if key in metadata:
                raise self._broken(f"its entry {key} comes twice")
            metadata[key] = self._value(key)
        infos = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._broken(f"its alignment is {alignment}, not a power of 2 of at least 8")
        data = -(-self._at // alignment) * alignment
        found = GgufFile(self._path, metadata, self._placed(infos, data, alignment))
        self._check_vocabulary(found)
        return found

    def _placed(self, infos: list[Tensor], data: int, alignment: int) -> dict[str, Tensor]:
        """The tensors by name, each within the file and none on top of another."""
        placed: dict[str, Tensor] = {}
        for info in infos:
            if info.name in placed:
                raise self._broken(f"its tensor {info.name} comes twice")
            if info.offset % alignment:
                raise self._broken(f"tensor {info.name} begins at {info.offset}, which is no multiple of {alignment}")
            if info.offset > self._size or data + info.offset + info.size > self._size:
                raise self._broken(
                    f"tensor {info.name} ends at byte {data + info.offset + info.size} of a file of {self._size}"
                )
            placed[info.name] = replace(info, offset=data + info.offset)
        end = 0
        for tensor in sorted(placed.values(), key=lambda each: each.offset):
            if tensor.offset < end:
                raise self._broken(f"tensor {tensor.name} lies on another one")
            end = tensor.offset + tensor.size
        return placed

    def _tensor(self) -> Tensor:
        name = self._text("a tensor's name", MAX_NAME_BYTES)
        dimensions = self._number(_U32, name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._broken(f"tensor {name} has {dimensions} dimensions; allowed are 1 to {MAX_DIMENSIONS}")
        shape = tuple(self._number(_U64, name) for _ in range(dimensions))
        elements = math.prod(shape)
        if not 1 <= elements <= _MAX_ELEMENTS or max(shape) > _MAX_ELEMENTS:
            raise self._broken(f"tensor {name} has the impossible shape {list(shape)}")
        number = self._number(_U32, name)
        if number not in TENSOR_TYPES:
            raise self._broken(f"tensor {name} is of type {number}, which this version does not know")
        kind, block, block_bytes = TENSOR_TYPES[number]
        if name.endswith(_WEIGHTS) and not any(part in name for part in _TABLES):
            # llama.cpp ends the process at an operation that it does not have for a type.
            if dimensions == 1 and kind != "F32":
                raise self._broken(f"tensor {name} is a vector of {kind}; vectors are F32")
            if kind in _NO_WEIGHTS:
                raise self._broken(f"tensor {name} is of type {kind}, in which there are no weights")
        if shape[0] % block:
            raise self._broken(f"rows of tensor {name} have {shape[0]} elements; {kind} needs a multiple of {block}")
        return Tensor(name, shape, kind, elements // block * block_bytes, self._number(_U64, name))

    def _value(self, key: str) -> Value:
        kind = self._number(_U32, key)
        if kind == _STRING:
            return self._text(key)
        if kind != _ARRAY:
            return self._scalar(kind, key)
        inner = self._number(_U32, key)
        if inner == _ARRAY:
            raise self._broken(f"its entry {key} is a list of lists")
        if inner == _STRING:
            return [self._text(key) for _ in range(self._count(_U64, 8, key))]
        layout = self._layout(inner, key)
        count = self._count(_U64, layout.size, key)
        values = struct.unpack_from(f"<{count}{layout.format[1:]}", self._content, self._at)
        self._at += count * layout.size
        return list(values)

    def _scalar(self, kind: int, key: str) -> Value:
        layout = self._layout(kind, key)
        self._need(layout.size, key)
        value: int | float | bool = layout.unpack_from(self._content, self._at)[0]
        self._at += layout.size
        return value

    def _layout(self, kind: int, key: str) -> struct.Struct:
        layout = _SCALARS.get(kind)
        if layout is None:
            raise self._broken(f"its entry {key} is of the unknown type {kind}")
        return layout

    def _text(self, what: str, most: int | None = None) -> str:
        length = self._count(_U64, 1, what)
        if most is not None and not 1 <= length <= most:
            raise self._broken(f"{what} has {length} bytes; allowed are 1 to {most}")
        raw = self._content[self._at : self._at + length]
        self._at += length
        # Tokens may be halves of characters.
        return raw.decode("utf-8", "replace" if most is None else "backslashreplace")

    def _count(self, layout: struct.Struct, least_bytes: int, what: str) -> int:
        """A number of things of at least so many bytes each, which must be there."""
        count = self._number(layout, what)
        if count * least_bytes > self._size - self._at:
            raise self._broken(f"{what}: it claims {count}, and {self._size - self._at} bytes are left")
        return count

    def _number(self, layout: struct.Struct, what: str) -> int:
        self._need(layout.size, what)
        value: int = layout.unpack_from(self._content, self._at)[0]
        self._at += layout.size
        return value

    def _need(self, count: int, what: str) -> None:
        if count > self._size - self._at:
            raise self._broken(f"it ends within {what}")

    def _check_vocabulary(self, found: GgufFile) -> None:
        """Lists by token must be of one length, and special tokens must exist: they are used as indices."""
        tokens = found.strings("tokenizer.ggml.tokens")
        if not tokens:
            return
        for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
            values = found.metadata.get(key)
            if values is not None and (not isinstance(values, list) or len(values) != len(tokens)):
                raise self._broken(f"{key} does not have one entry for each of the {len(tokens)} tokens")
        for key, value in found.metadata.items():
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and not _is_index(value, len(tokens)):
                raise self._broken(f"{key} is {value}; there are {len(tokens)} tokens")
        embedding = found.tensors.get("token_embd.weight")
        if embedding is not None and embedding.shape[-1] != len(tokens):
            raise self._broken(f"it has {len(tokens)} tokens and embeddings for {embedding.shape[-1]}")

    def _broken(self, why: str) -> ModelError:
        return broken(self._path, why)


def _is_index(value: object, length: int) -> bool:
    # The largest 32-bit number stands for "none" in some files.
    return isinstance(value, int) and (0 <= value < length or value in (-1, (1 << 32) - 1))
