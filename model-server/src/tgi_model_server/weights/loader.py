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

    def take(
        self, name: str, shape: tuple[int, ...], *, split: int | None = None, padded: bool = False
    ) -> torch.Tensor:
        """The parameter `name` of full `shape`; with `split`, this rank's part along that dimension.

        A `padded` one need not come out even: all parts are as large, the last ones end in zeros. Raises `ModelError`
        naming file and tensor.
        """
        ...

    def take_stacked(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, pieces: Sequence[int] = ()
    ) -> torch.Tensor:
        """Several parameters, one after the other along dimension 0, each split there among the ranks.

        `pieces`: into how many each can be cut. Where they are fewer than ranks, neighbours get the same one.
        """
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

    def take(
        self, name: str, shape: tuple[int, ...], *, split: int | None = None, padded: bool = False
    ) -> torch.Tensor:
        self._check(name, shape)
        if split is None:
            target = self._empty(shape)
            self._copy(name, target, ())
            return target
        part = _part(self._shard, shape[split], name, padded)
        before, after = shape[:split], shape[split + 1 :]
        target = self._empty((*before, part.stop - part.start, *after))
        present = max(min(part.stop, shape[split]) - part.start, 0)
        if present < target.shape[split]:
            target.zero_()
        if present:
            index = (slice(None),) * split + (slice(part.start, part.start + present),)
            self._copy(name, target.narrow(split, 0, present), index if self._shard.world_size > 1 else ())
        else:
            self.ignore(name)
        return target

    def take_stacked(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, pieces: Sequence[int] = ()
    ) -> torch.Tensor:
        for name, shape in zip(names, shapes, strict=True):
            self._check(name, shape)
        ranges = _ranges(self._shard, names, shapes, pieces)
        sizes = [part.stop - part.start for part in ranges]
        target = self._empty((sum(sizes), *shapes[0][1:]))
        for name, part, rows in zip(names, ranges, target.split_with_sizes(sizes), strict=True):
            self._copy(name, rows, (part,) if self._shard.world_size > 1 else ())
        return target

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

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

    def _copy(self, name: str, target: torch.Tensor, index: tuple[slice, ...]) -> None:
        """`index` () is the whole tensor."""
        target.copy_(self._checkpoint.read(name, index))
        self._unused.pop(name, None)
        entry = self._checkpoint.entries[name]
        self._done += _FLOATING[entry.dtype] * torch.Size(entry.shape).numel()
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


class DummyWeights:
    """Random weights from the configuration alone: the same for a name and shape in every run and on every rank."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device, shard: Shard, seed: int = 0) -> None:
        self._dtype = dtype
        self._device = device
        self._shard = shard
        self._seed = seed

    def take(
        self, name: str, shape: tuple[int, ...], *, split: int | None = None, padded: bool = False
    ) -> torch.Tensor:
        full = self._random(name, shape)
        if split is not None:
            part = _part(self._shard, shape[split], name, padded)
            full = full.narrow(split, min(part.start, shape[split]), max(min(part.stop, shape[split]) - part.start, 0))
            missing = part.stop - part.start - full.shape[split]
            if missing:
                size = (*shape[:split], missing, *shape[split + 1 :])
                full = torch.cat((full, torch.zeros(size)), dim=split)
        return full.to(device=self._device, dtype=self._dtype)

    def take_stacked(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, pieces: Sequence[int] = ()
    ) -> torch.Tensor:
        ranges = _ranges(self._shard, names, shapes, pieces)
        whole = [self.take(name, shape) for name, shape in zip(names, shapes, strict=True)]
        return torch.cat([each[part] for each, part in zip(whole, ranges, strict=True)])

    def _random(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """float32"""
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randn(shape, generator=generator) * 0.02

    def ignore(self, name: str) -> None:
        """Nothing is ever left over."""

    def finish(self) -> None:
        """Nothing is ever left over."""


def _part(shard: Shard, whole: int, what: str, padded: bool) -> slice:
    return shard.padded_range(whole) if padded else shard.range(whole, what)


def _ranges(
    shard: Shard, names: Sequence[str], shapes: Sequence[tuple[int, ...]], pieces: Sequence[int]
) -> list[slice]:
    """This rank's rows of each stacked tensor."""
    return [
        shard.among(count).range(shape[0], name)
        for name, shape, count in zip(names, shapes, pieces or [shard.world_size] * len(names), strict=True)
    ]
