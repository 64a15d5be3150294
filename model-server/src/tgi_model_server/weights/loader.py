"""Weights: what a model asks for by name and shape, and gets in its dtype, on its device, as its rank's part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from tgi_gateway.errors import ModelError
from tgi_model_server.parallel import Shard
from tgi_model_server.weights.checkpoint import Checkpoint, index_mismatches, weight_files
from tgi_model_server.weights.reader import Reader, part_of
from tgi_model_server.weights.uploads import Uploads, uploads_to

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""
_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        """The source may hold `name`, but the model does not use it."""
        ...

    def finish(self) -> None:
        """Everything was taken. Raises `ModelError` for tensors that nobody asked for."""
        ...


class RankWeights:
    """The rank's parts of the tensors of some source, each put straight into its place in a final tensor."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device, shard: Shard) -> None:
        self._dtype = dtype
        self._device = device
        self._shard = shard

    def take(
        self, name: str, shape: tuple[int, ...], *, split: int | None = None, padded: bool = False
    ) -> torch.Tensor:
        self._expect(name, shape)
        dim = split or 0
        part = slice(0, shape[dim])
        if split is not None:
            part = self._shard.padded_range(shape[dim]) if padded else self._shard.range(shape[dim], name)
        target = self._empty((*shape[:dim], part.stop - part.start, *shape[dim + 1 :]))
        present = max(min(part.stop, shape[dim]) - part.start, 0)
        if present < target.shape[dim]:
            target.zero_()
        if present:
            self._fill(target.narrow(dim, 0, present), name, shape, dim, part.start)
        else:
            self.ignore(name)
        return target

    def take_stacked(
        self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, pieces: Sequence[int] = ()
    ) -> torch.Tensor:
        for name, shape in zip(names, shapes, strict=True):
            self._expect(name, shape)
        shards = [self._shard.among(count) for count in pieces or [self._shard.world_size] * len(names)]
        parts = [shard.range(shape[0], name) for shard, shape, name in zip(shards, shapes, names, strict=True)]
        sizes = [part.stop - part.start for part in parts]
        target = self._empty((sum(sizes), *shapes[0][1:]))
        for rows, name, shape, part in zip(target.split_with_sizes(sizes), names, shapes, parts, strict=True):
            self._fill(rows, name, shape, 0, part.start)
        return target

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def ignore(self, name: str) -> None:
        """Nothing is missed unless the source keeps account."""

    def finish(self) -> None:
        """Nothing is left over unless the source keeps account."""

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises `ModelError` where the source lacks such a tensor."""

    def _fill(self, target: torch.Tensor, name: str, shape: tuple[int, ...], dim: int, start: int) -> None:
        """Put into `target` what `name`, of full `shape`, holds from `start` on along `dim`."""
        raise NotImplementedError


class CheckpointWeights(RankWeights):
    """Weights from safetensors files. Only the parts that are asked for are read."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard,
        progress: Progress | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        super().__init__(dtype=dtype, device=device, shard=shard)
        self._folder = folder
        self._progress = progress
        self._checkpoint = Checkpoint(weight_files(folder))
        missing = index_mismatches(folder, self._checkpoint.entries)
        if missing:
            self._checkpoint.close()
            raise ModelError(f"{folder}: the index promises {', '.join(missing[:5])}, which its file does not hold.")
        self._unused = dict.fromkeys(self._checkpoint.entries)
        self._reader = Reader(self._checkpoint, uploads or uploads_to(device), ranks=shard.world_size)
        self._total = sum(entry.size for entry in self._checkpoint.entries.values())
        self._done = 0

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
        self._reader.close()
        self._checkpoint.close()
        if self._progress is not None:
            self._progress(self._total, self._total)

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
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

    def _fill(self, target: torch.Tensor, name: str, shape: tuple[int, ...], dim: int, start: int) -> None:  # noqa: ARG002
        entry = self._checkpoint.entries[name]
        part = part_of(entry, _FLOATING[entry.dtype], dim, start, target.shape[dim])
        done = self._done
        for read in self._reader.read(part, target):
            self._tell(done + entry.size * read // part.size)
        self._done = done + entry.size
        self._unused.pop(name, None)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(min(done, self._total), self._total)
