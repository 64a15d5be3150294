"""A checkpoint: the safetensors files of a model folder and where each tensor lies in them."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError, safe_open

from tgi_gateway.errors import ModelError
from tgi_model_server.models.config import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LENGTH_BYTES = 8
"""Of the header's length, with which a file begins."""


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of `folder`: those of its index, else the single one, else all. Raises `ModelError`."""
    index = read_json(folder / INDEX)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{folder / INDEX}: weight_map is missing or not an object of file names.")
        files = tuple(folder / name for name in sorted(set(weight_map.values())))
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ModelError(f"{folder / INDEX} names files that are missing: {_some(absent)}.")
        return files
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
        hint = f" It holds {_some(others)}: convert them to safetensors first." if others else ""
        raise ModelError(f"{folder} holds no *.safetensors file.{hint}")
    return files


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint, not yet read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: ``F32``, ``BF16``, ..."""
    begin: int
    """Of its first byte in the file."""
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


class Checkpoint:
    """Open safetensors files: where their tensors are, and the bytes of them."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises `ModelError` for a file that is damaged and for a tensor that two files hold."""
        self._files: dict[Path, int] = {}
        self._mapped: dict[Path, mmap.mmap] = {}
        self.entries: dict[str, Entry] = {}
        try:
            for file in files:
                self._open(file)
        except BaseException:
            self.close()
            raise

    def _open(self, file: Path) -> None:
        try:
            # The library checks the header against itself and the file, but does not tell where tensors begin.
            with safe_open(str(file), framework="pt"):
                pass
            descriptor = self._files[file] = os.open(file, os.O_RDONLY)
            size = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
            header = json.loads(os.pread(descriptor, size, _LENGTH_BYTES))
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{file} is damaged or incomplete ({error}). Download it again.") from error
        first = _LENGTH_BYTES + size
        for name, described in header.items():
            if name == "__metadata__":
                continue
            if name in self.entries:
                raise ModelError(f"Tensor {name} is in two files: {self.entries[name].file} and {file}.")
            begin, end = described["data_offsets"]
            shape = tuple(described["shape"])
            self.entries[name] = Entry(file, shape, described["dtype"], first + begin, first + end)

    def read(self, file: Path, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on. From any thread. Raises `ModelError`."""
        descriptor, left = self._files[file], into
        try:
            if hasattr(os, "posix_fadvise"):
                # All of it is asked of the disk at once, rather than as much as the kernel likes to read ahead.
                os.posix_fadvise(descriptor, offset, len(into), os.POSIX_FADV_WILLNEED)
            while left:
                count = os.preadv(descriptor, [left], offset)
                if not count:
                    raise EOFError("the file has become shorter")
                offset, left = offset + count, left[count:]
        except (OSError, EOFError) as error:
            raise ModelError(f"{file} cannot be read ({error}). Download it again.") from error

    def map(self, file: Path) -> mmap.mmap:
        """The whole file as memory, valid until `close`: for what lies in many small pieces."""
        if file not in self._mapped:
            self._mapped[file] = mmap.mmap(self._files[file], 0, prot=mmap.PROT_READ)
        return self._mapped[file]

    def close(self) -> None:
        for mapped in self._mapped.values():
            mapped.close()
        self._mapped.clear()
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def index_mismatches(folder: Path, entries: Mapping[str, Entry]) -> list[str]:
    """Tensors that the index promises but their file does not hold."""
    index = read_json(folder / INDEX) or {}
    return sorted(
        name
        for name, file in index.get("weight_map", {}).items()
        if name not in entries or entries[name].file.name != file
    )


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
