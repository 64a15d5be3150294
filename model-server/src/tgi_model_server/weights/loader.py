"""Weights: what a model asks for by name and shape, and gets in its dtype, on its device, as its rank's part."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from tgi_gateway.errors import ModelError
from tgi_model_server.parallel import Shard
from tgi_model_server.weights.checkpoint import Checkpoint, index_mismatches, weight_files

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""
_FLOATING = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Weights(Protocol):
    """Where a model takes its parameters from."""

    def take(self, name: str, shape: tuple[int, ...], *, split: int | None = None) -> torch.Tensor:
        """The parameter `name` of full `shape`; with `split`, this rank's part along that dimension.

        Raises `ModelError` naming file and tensor.
        """
        ...

    def take_stacked(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, split: bool = True
    ) -> torch.Tensor:
        """Several parameters, one after the other along dimension 0, each split there among the ranks."""
        ...

    def ignore(self, name: str) -> None:
        """The checkpoint may hold `name`, but the model does not use it."""
        ...

    def finish(self) -> None:
        """Everything was taken. Raises `ModelError` for tensors that nobody asked for."""
        ...


class CheckpointWeights:
    """Weights from safetensors files. Only the parts that are asked for are read, straight into their final tensor."""

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, device: torch.device, shard: Shard, progress: Progress | None = None
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        self._device = device
        self._shard = shard
        self._progress = progress
        self._checkpoint = Checkpoint(weight_files(folder))
        missing = index_mismatches(folder, self._checkpoint.entries)
        if missing:
            self._checkpoint.close()
            raise ModelError(f"{folder}: the index promises {', '.join(missing[:5])}, which its file does not hold.")
        self._unused = dict.fromkeys(self._checkpoint.entries)
        self._total = sum(
            _FLOATING.get(entry.dtype, 1) * torch.Size(entry.shape).numel()
            for entry in self._checkpoint.entries.values()
        )
        self._done = 0

    def take(self, name: str, shape: tuple[int, ...], *, split: int | None = None) -> torch.Tensor:
        self._check(name, shape)
        wanted = list(shape)
        if split is not None:
            wanted[split] = self._shard.size(shape[split], name)
        target = torch.empty(wanted, dtype=self._dtype, device=self._device)
        self._copy(name, shape, target, split)
        return target

    def take_stacked(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, split: bool = True
    ) -> torch.Tensor:
        for name, shape in zip(names, shapes, strict=True):
            self._check(name, shape)
        rows = [
            self._shard.size(shape[0], name) if split else shape[0] for name, shape in zip(names, shapes, strict=True)
        ]
        target = torch.empty((sum(rows), *shapes[0][1:]), dtype=self._dtype, device=self._device)
        for name, shape, part in zip(names, shapes, target.split_with_sizes(rows), strict=True):
            self._copy(name, shape, part, 0 if split else None)
        return target

    def ignore(self, name: str) -> None:
        self._unused.pop(name, None)

    def finish(self) -> None:
        # Old checkpoints carry the rotary frequencies, which follow from config.json.
        unused = [name for name in self._unused if not name.endswith("rotary_emb.inv_freq")]
        if unused:
            more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
            raise ModelError(
                f"{self._checkpoint.entries[unused[0]].file}: unexpected tensors {', '.join(unused[:5])}{more}. "
                "config.json and the weights do not belong together."
            )
        self._checkpoint.close()
        if self._progress is not None:
            self._progress(self._total, self._total)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self._checkpoint.entries.get(name)
        if entry is None:
            raise ModelError(f"{self._folder}: tensor {name} {list(shape)} is missing from the weights.")
        if entry.shape != shape:
            raise ModelError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}; config.json asks for {list(shape)}."
            )
        if entry.dtype not in _FLOATING:
            raise ModelError(
                f"{entry.file}: tensor {name} has dtype {entry.dtype}; this engine reads {', '.join(_FLOATING)}."
            )

    def _copy(self, name: str, shape: tuple[int, ...], target: torch.Tensor, split: int | None) -> None:
        index: tuple[slice, ...] = ()
        if split is not None and self._shard.world_size > 1:
            index = (slice(None),) * split + (self._shard.range(shape[split], name),)
        target.copy_(self._checkpoint.read(name, index))
        self._unused.pop(name, None)
        self._done += _FLOATING[self._checkpoint.entries[name].dtype] * torch.Size(shape).numel()
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


class DummyWeights:
    """Random weights from the configuration alone: the same for a name and shape in every run and on every rank."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device, shard: Shard, seed: int = 0) -> None:
        self._dtype = dtype
        self._device = device
        self._shard = shard
        self._seed = seed

    def take(self, name: str, shape: tuple[int, ...], *, split: int | None = None) -> torch.Tensor:
        if name.endswith("norm.weight"):
            full = torch.ones(shape)
        else:
            digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            full = torch.randn(shape, generator=generator) * 0.02
        if split is not None:
            part = self._shard.range(shape[split], name)
            full = full.narrow(split, part.start, part.stop - part.start)
        return full.to(device=self._device, dtype=self._dtype)

    def take_stacked(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, split: bool = True
    ) -> torch.Tensor:
        parts = [self.take(name, shape, split=0 if split else None) for name, shape in zip(names, shapes, strict=True)]
        return torch.cat(parts)

    def ignore(self, name: str) -> None:
        """Nothing is ever left over."""

    def finish(self) -> None:
        """Nothing is ever left over."""
