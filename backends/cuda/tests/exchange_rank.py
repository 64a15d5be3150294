"""One rank of `test_exchange`: random exchanges with the others through memory that all have mapped.

TRITON_INTERPRET=1 python exchange_rank.py FILE RANK WORLD_SIZE ROUNDS SEED
"""

from __future__ import annotations

import mmap
import random
import sys
from pathlib import Path

import torch

from tgi_backend_cuda.exchange import BLOCK, Exchange
from tgi_model_server.parallel import Shard

WORDS = 3 * BLOCK
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter cuts off where chips round.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def of_rank(rank: int, seed: int, dtype: torch.dtype, size: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed * 64 + rank)).to(dtype)


def one_round(exchange: Exchange, rank: int, world: int, draw: random.Random) -> None:
    dtype = draw.choice(DTYPES)
    rows, columns = draw.choice([(1, 2), (1, 64), (3, 10), (2, BLOCK), (5, 2 * BLOCK), (1, 3 * BLOCK)])
    if rows * columns * dtype.itemsize > WORDS * 4:
        rows, columns = 1, 128
    seed = draw.randrange(1 << 40)
    everyone = [of_rank(each, seed, dtype, (rows, columns)) for each in range(world)]
    mine = everyone[rank].clone()
    assert exchange.takes(mine)
    kind = draw.choice(["sum", "sum", "add", "gather", "broadcast"])
    if kind == "gather":
        found = exchange.gather(mine)
        wanted = torch.cat(everyone, dim=1)
        assert torch.equal(found, wanted), kind
        return
    if kind == "broadcast":
        exchange.broadcast(mine)
        assert torch.equal(mine, everyone[0]), kind
        return
    wanted = torch.stack(everyone).double().sum(0)
    residual = None
    if kind == "add":
        residual = of_rank(world, seed, dtype, (rows, columns))
        wanted += residual.double()
    found = exchange.sum(mine, residual)
    assert found is (mine if residual is None else residual)
    off = (found.double() - wanted).abs().max().item()
    assert off <= TOLERANCES[dtype] * max(wanted.abs().max().item(), 1.0), f"{kind} of {dtype}: off by {off}"
    print(found.view(torch.int16).sum().item(), end=" ")  # the same bits everywhere, which the test compares


def main(file: Path, rank: int, world: int, rounds: int, seed: int) -> None:
    torch.set_num_threads(1)
    each = 2 * world * WORDS * 8
    with file.open("r+b") as opened:
        shared = mmap.mmap(opened.fileno(), world * each)
    inboxes = torch.frombuffer(shared, dtype=torch.int64).view(world, 2, world, WORDS)
    addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes])
    exchange = Exchange(Shard(rank, world), inboxes[rank], addresses)
    draw = random.Random(seed)
    for _ in range(rounds):
        one_round(exchange, rank, world, draw)
    # Rank 0 leaves; the others would wait for ever.
    if rank:
        exchange.abort()
        exchange.sum(torch.ones(8))
    print("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
