"""Parts of tensors read in pieces, through buffers that a device empties when it likes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tgi_gateway.errors import ModelError
from tgi_model_server.parallel import Shard
from tgi_model_server.weights import reader
from tgi_model_server.weights.checkpoint import Checkpoint
from tgi_model_server.weights.loader import CheckpointWeights
from tgi_model_server.weights.reader import Reader, part_of
from tgi_model_server.weights.uploads import PlainUploads, Uploads

CPU = torch.device("cpu")


class LateUploads:
    """Copies as late as it may, as a device with a queue of its own does: when somebody waits for it."""

    def __init__(self) -> None:
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.buffers = 0

    def staging(self, size: int) -> torch.Tensor:
        self.buffers += 1
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
        self._waiting.append((source, target))
        return self.settle

    def settle(self) -> None:
        for source, target in self._waiting:
            target.copy_(source)
        self._waiting.clear()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 256)
    monkeypatch.setattr(reader, "SMALL_BYTES", 16)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("make", [PlainUploads, LateUploads])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_any_part_of_any_tensor_arrives_whole(
    make: Callable[[], Uploads], dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    shapes = [tuple(draw.randint(1, 40) for _ in range(draw.randint(1, 3))) for _ in range(12)] + [(700,), (3, 500)]
    tensors = {f"t{n}": torch.randn(shape).to(torch.bfloat16) for n, shape in enumerate(shapes)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint([tmp_path / "model.safetensors"]) as checkpoint:
        reading = Reader(checkpoint, make())
        wanted, found = [], []
        for name, tensor in tensors.items():
            dim = draw.randrange(tensor.dim())
            start = draw.randrange(tensor.shape[dim])
            size = draw.randint(1, tensor.shape[dim] - start)
            wanted.append(tensor.narrow(dim, start, size).to(dtype))
            # A place in a larger tensor, as the last rank's part of a padded one has.
            room = torch.zeros((*tensor.shape[:dim], size + 2, *tensor.shape[dim + 1 :]), dtype=dtype)
            found.append(room.narrow(dim, 0, size))
            part = part_of(checkpoint.entries[name], torch.bfloat16, dim, start, size)
            told = list(reading.read(part, found[-1]))
            assert told == sorted(told)
            assert told[-1] == part.size == wanted[-1].numel() * 2
        reading.close()
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("small_pieces")
def test_memory_is_bounded_by_a_few_buffers(tmp_path: Path) -> None:
    tensor = torch.randn(100, 200)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    uploads = LateUploads()
    weights = CheckpointWeights(tmp_path, dtype=torch.float16, device=CPU, shard=Shard(), uploads=uploads)
    assert torch.equal(weights.take("a", (100, 200)), tensor.half())
    weights.finish()
    assert uploads.buffers <= reader.MAX_THREADS * 3 // 2


def test_a_large_tensor_is_told_of_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1000)
    save_file({"a": torch.zeros(10, 100)}, tmp_path / "model.safetensors")
    told: list[tuple[int, int]] = []
    weights = CheckpointWeights(
        tmp_path, dtype=torch.float32, device=CPU, shard=Shard(1, 2), progress=lambda *at: told.append(at)
    )
    weights.take("a", (10, 100), split=0)
    assert told == [(2000, 4000), (4000, 4000)]


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100, 100)}, tmp_path / "model.safetensors")
    weights = CheckpointWeights(tmp_path, dtype=torch.float32, device=CPU, shard=Shard())
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read \(the file has become shorter\)"):
        weights.take("a", (100, 100))
