"""A checkpoint: the safetensors files of a model folder and where each tensor lies in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from tgi_gateway.errors import ModelError
from tgi_model_server.models.config import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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


class Checkpoint:
    """Open safetensors files. Tensors are mapped, not read, until something is copied out of them."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises `ModelError` for a file that is damaged and for a tensor that two files hold."""
        self._files: dict[Path, Any] = {}
        self.entries: dict[str, Entry] = {}
        try:
            for file in files:
                self._open(file)
        except BaseException:
            self.close()
            raise

    def _open(self, file: Path) -> None:
        try:
            # The context manager protocol is all that safe_open offers to close a file.
            opened = safe_open(str(file), framework="pt").__enter__()  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged or incomplete ({error}). Download it again.") from error
        self._files[file] = opened
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            if name in self.entries:
                raise ModelError(f"Tensor {name} is in two files: {self.entries[name].file} and {file}.")
            part = opened.get_slice(name)
            self.entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())

    def read(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        """The tensor, or the part of it that `index` selects; valid until `close`."""
        file = self.entries[name].file
        try:
            tensor: torch.Tensor = (
                self._files[file].get_slice(name)[index] if index else self._files[file].get_tensor(name)
            )
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: tensor {name} cannot be read ({error}). Download the file again.") from error
        return tensor

    def close(self) -> None:
        for opened in self._files.values():
            opened.__exit__(None, None, None)
        self._files.clear()

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
