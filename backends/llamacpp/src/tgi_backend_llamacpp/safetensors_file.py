"""Tensors of a safetensors model as float32 arrays, one at a time, bfloat16 included; needs no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_gateway.errors import ModelError

_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> npt.NDArray[np.float32]:
        """float32 of this shape."""
        count = int(np.prod(self.shape, dtype=np.int64))
        if self.kind == "BF16":
            halves = np.fromfile(self.path, np.uint16, count, offset=self.offset)
            return (halves.astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        code = {"F64": np.float64, "F32": np.float32, "F16": np.float16}[self.kind]
        return np.fromfile(self.path, code, count, offset=self.offset).astype(np.float32).reshape(self.shape)


def open_model(folder: Path) -> Mapping[str, Entry]:
    """All tensors of the folder by name. Raises `ModelError` for a file that is not whole."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelError(f"{folder} has neither a GGUF file nor *.safetensors weights")
    found: dict[str, Entry] = {}
    for path in paths:
        found |= _read_header(path)
    return found


def _read_header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > size - 8:
            raise ModelError(f"{path} ends within its header. Download the model again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            entries = {
                name: Entry(path, str(entry["dtype"]), tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} has a broken header ({error}). Download the model again") from error
    for name, entry in entries.items():
        if entry.kind not in _WIDTHS:
            raise ModelError(f"{path}: tensor {name} is of type {entry.kind}, which cannot be converted")
        if entry.offset < 0 or entry.offset + int(np.prod(entry.shape, dtype=object)) * _WIDTHS[entry.kind] > size:
            raise ModelError(f"{path} ends within tensor {name}. Download the model again")
    return entries
