"""Several GPUs: are exchanges between them right, eagerly and in graphs, and how long do they take?

    python backends/cuda/tests/two_gpus.py [--gpus 2] [--rounds 1000] [--sums]

Needs nothing but torch, Triton, the project's packages and `support` on the path. Ends with 0 if everything was right.
"""

from __future__ import annotations

import argparse
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from sent_sums import SentSums

from tgi_backend_cuda.collectives import CudaGroup
from tgi_backend_cuda.device import CudaDevice
from tgi_model_server.parallel import Group, Shard, TorchGroup
from tgi_model_server.rank_task import open_store

HIDDEN = 4096
VOCABULARY = 128_256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 300)
CALLS, REPLAYS = 50, 20
_cuda: Any = torch.cuda  # whose streams and events have no types


class Rank:
    """One GPU's part of every check; all ranks do the same in the same order."""

    def __init__(self, shard: Shard, port: int, listen_fd: int | None) -> None:
        chip = CudaDevice()
        chip.join(shard)
        self.shard = shard
        self.device = chip.torch_device
        self.nccl: Group = TorchGroup(shard, "nccl", open_store(port, shard.world_size, listen_fd), self.device)
        began_s = time.monotonic()
        self.fast = chip.collectives(self.nccl)
        self.ops = chip.ops
        self.say(f"{type(self.fast).__name__} after {time.monotonic() - began_s:.2f} s")

    def say(self, text: str) -> None:
        if self.shard.rank == 0:
            print(text, flush=True)

    def of(self, rank: int, seed: int, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What `rank` brings."""
        generator = torch.Generator(self.device).manual_seed(seed * 64 + rank)
        return torch.randn(size, generator=generator, device=self.device).to(dtype)

    def check_sum(self, found: torch.Tensor, seed: int, residual: torch.Tensor | None, what: str) -> None:
        size, dtype = tuple(found.shape), found.dtype
        everyone = [self.of(rank, seed, size, dtype) for rank in range(self.shard.world_size)]
        wanted = torch.stack(everyone).double().sum(0)
        if residual is not None:
            wanted += residual.double()
        off = (found.double() - wanted).abs().max().item()
        # NCCL, and the addition after it, round once more.
        limit = 2 * TOLERANCES[dtype] * max(wanted.abs().max().item(), 1.0)
        assert off <= limit, f"rank {self.shard.rank}: {what}: off by {off}, at most {limit}"
        bits = found.view(torch.uint8).to(torch.int64)
        places = torch.arange(bits.numel(), device=self.device).view(bits.shape) % 8191 + 1
        mine = int((bits * places).sum())
        assert self.nccl.minimum(mine) == -self.nccl.minimum(-mine), f"{what}: ranks have different bits"

    def check_eager(self) -> None:
        for dtype in DTYPES:
            for rows in (*ROWS, 1000):
                for columns in (2, 62, HIDDEN):
                    what = f"{dtype} [{rows}, {columns}]"
                    self.check_sum(self.fast.all_reduce(self.mine(rows, (rows, columns), dtype)), rows, None, what)
                    residual = self.of(99, rows, (rows, columns), dtype)
                    found = self.fast.all_reduce_add(self.mine(rows, (rows, columns), dtype), residual.clone())
                    self.check_sum(found, rows, residual, f"{what} with a residual")
                    everyone = [self.of(rank, rows, (rows, columns), dtype) for rank in range(self.shard.world_size)]
                    gathered = self.fast.all_gather(self.mine(rows, (rows, columns), dtype))
                    assert torch.equal(gathered, torch.cat(everyone, dim=1)), f"gather of {what}"
                    sent = self.mine(rows, (rows, columns), dtype)
                    self.fast.broadcast(sent)
                    assert torch.equal(sent, everyone[0]), f"broadcast of {what}"
        self.say("eager: sums, sums with a residual, gathers and broadcasts are right")

    def mine(self, seed: int, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.of(self.shard.rank, seed, size, dtype)

    def check_graphs(self, rounds: int) -> None:
        """Graphs of several sizes, short and long ones, replayed in a random order with new numbers each time."""
        recorded = []
        for rows in (1, 3, 32, 256, 600):
            x = torch.zeros(rows, HIDDEN, dtype=torch.bfloat16, device=self.device)
            residual = torch.zeros_like(x)

            def forward(x: torch.Tensor = x, residual: torch.Tensor = residual) -> tuple[torch.Tensor, torch.Tensor]:
                total = self.fast.all_reduce_add(x.clone(), residual.clone())
                # A second one at once: the others may still be reading the first.
                return total, self.fast.all_reduce(x.clone())

            recorded.append((x, residual, record(forward)))
        draw = random.Random(7)
        for number in range(rounds):
            x, residual, replay = draw.choice(recorded)
            x.copy_(self.mine(number, tuple(x.shape), x.dtype))
            residual.copy_(self.of(99, number, tuple(x.shape), x.dtype))
            total, plain = replay()
            if number % 10 == 0:
                self.check_sum(total, number, residual, f"graph round {number} [{x.shape[0]}, {HIDDEN}]")
                self.check_sum(plain, number, None, f"graph round {number}, second sum")
        self.say(f"graphs: {rounds} replays of five sizes in a random order are right")

    def time_all(self) -> None:
        one_shot = torch_one_shot(self.device)
        self.say(
            f"\n{'bf16 rows of 4096':>20} {'ours us':>10} {'with residual':>14} {'torch one-shot':>15} {'NCCL us':>10}"
        )
        for rows in ROWS[:-1]:
            x = torch.zeros(rows, HIDDEN, dtype=torch.bfloat16, device=self.device)
            residual = torch.zeros_like(x)
            times = [
                microseconds(self.fast.all_reduce, x),
                microseconds(self.fast.all_reduce_add, x, residual),
                microseconds(one_shot, x) if one_shot is not None else float("nan"),
                microseconds(self.nccl.all_reduce, x),
            ]
            self.say(f"{rows:>20} " + " ".join(f"{each:>14.2f}" for each in times))
        for rows in (1, 4, 16, 64):
            part = torch.zeros(rows, VOCABULARY // self.shard.world_size, device=self.device)
            ours = microseconds(self.fast.all_gather, part)
            theirs = microseconds(self.nccl.all_gather, part)
            self.say(f"logits of {rows} rows gathered: {ours:.2f} us, NCCL {theirs:.2f} us")
        ids = torch.zeros(64, dtype=torch.int32, device=self.device)
        ours, theirs = (microseconds(group.broadcast, ids) for group in (self.fast, self.nccl))
        self.say(f"64 tokens broadcast: {ours:.2f} us, NCCL {theirs:.2f} us")

    def check_abort(self) -> None:
        """Last: rank 0 waits for ranks that never come, until it is told to stop."""
        if not isinstance(self.fast, CudaGroup):
            return
        self.nccl.minimum(0)
        if self.shard.rank == 0:
            threading.Timer(0.5, self.fast._exchange.abort).start()
            began_s = time.monotonic()
            self.fast.all_reduce(torch.zeros(1, HIDDEN, dtype=torch.bfloat16, device=self.device))
            torch.cuda.synchronize()
            waited_s = time.monotonic() - began_s
            assert 0.3 < waited_s < 5.0, f"waited {waited_s:.2f} s"
            self.say(f"abort: ended a vain wait after {waited_s:.2f} s")
        self.nccl.minimum(0)


def record(forward: Callable[[], Any]) -> Callable[[], Any]:
    """`forward` as a graph; what it returns is overwritten at each replay."""
    stream = _cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = forward()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def microseconds(call: Callable[..., object], *given: torch.Tensor) -> float:
    """Of one call among many in a graph."""

    def many() -> None:
        for _ in range(CALLS):
            call(*given)

    replay = record(many)
    replay()
    torch.cuda.synchronize()
    begin, end = (_cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPLAYS):
        replay()
    end.record()
    torch.cuda.synchronize()
    taken_ms: float = begin.elapsed_time(end)
    return taken_ms * 1000 / REPLAYS / CALLS


def torch_one_shot(device: torch.device) -> Callable[[torch.Tensor], object] | None:
    """torch's own kernel of this kind, copy into its buffer included; None where it cannot run."""
    from torch.distributed import _symmetric_memory as symmetric

    try:
        buffer = symmetric.empty(max(ROWS) * HIDDEN, dtype=torch.bfloat16, device=device)
        world = dist.group.WORLD
        assert world is not None
        symmetric.rendezvous(buffer, world)
        name = world.group_name
    except RuntimeError:
        return None

    def call(x: torch.Tensor) -> object:
        part = buffer[: x.numel()]
        part.copy_(x.view(-1))
        return torch.ops.symm_mem.one_shot_all_reduce(part, "sum", name)

    return call


def run_rank(rank: int, world: int, port: int, listen_fd: int | None, rounds: int, only_sums: bool) -> None:
    with torch.inference_mode():
        one = Rank(Shard(rank, world), port, listen_fd)
        if not only_sums:
            one.check_eager()
            one.check_graphs(rounds)
            one.time_all()
        if isinstance(one.fast, CudaGroup) and one.fast.inboxes is not None:
            sums = SentSums(one.fast, one.ops, one.device, record, one.say)
            sums.check()
            sums.time()
            if only_sums:
                sums.check_abort()
        if not only_sums:
            one.check_abort()
    one.say("\nall right")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--sums", action="store_true", help="only the sums that products send themselves")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds for everything")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--listen-fd", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        run_rank(given.rank, given.gpus, given.port, given.listen_fd, given.rounds, given.sums)
        return 0
    found = torch.cuda.device_count()
    if found < given.gpus:
        print(f"--gpus is {given.gpus}; torch finds {found}.")
        return 2
    listener = socket.create_server(("127.0.0.1", 0))
    shared = ["--gpus", str(given.gpus), "--rounds", str(given.rounds), "--port", str(listener.getsockname()[1])]
    shared += ["--sums"] if given.sums else []
    started = []
    for rank in range(given.gpus):
        own = ["--rank", str(rank), *(["--listen-fd", str(listener.fileno())] if rank == 0 else [])]
        passed = (listener.fileno(),) if rank == 0 else ()
        started.append(subprocess.Popen([sys.executable, __file__, *shared, *own], pass_fds=passed))
    deadline_s = time.monotonic() + given.timeout
    codes: list[int | None] = [None] * given.gpus
    while None in codes and time.monotonic() < deadline_s and all(code in (None, 0) for code in codes):
        time.sleep(0.2)
        codes = [process.poll() for process in started]
    for process in started:
        process.kill()
    print(f"exit codes of the ranks: {codes}")
    return 0 if codes == [0] * given.gpus else 1


if __name__ == "__main__":
    sys.exit(main())
