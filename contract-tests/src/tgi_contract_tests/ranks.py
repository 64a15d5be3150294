"""Ranks of a device, each in a process of its own: what the device's collectives give them, check by check.

The parent calls `run`; each rank is this module as a program, with its task as a line of JSON on standard input.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tgi_contract_tests.device_model import ToyModel, on, plan_of, shape_of
from tgi_gateway.errors import StartError
from tgi_model_server.buckets import pad_plan
from tgi_model_server.device import Bucket, Device, Norm, StepLimits
from tgi_model_server.parallel import Group, Shard
from tgi_model_server.rank_task import connect, name_of, open_store
from tgi_model_server.reference import ReferenceOps
from tgi_model_server.step import StepInput

SIZES = ((1, 7), (33, 96), (5, 1), (64, 1024))
TOKENS = (1, 2, 7)
REFERENCE = ReferenceOps()


@dataclass(frozen=True, slots=True)
class Task:
    """What one rank is told."""

    device: str
    """``module:name`` of what makes the Device."""
    file: str
    """Where the module lies, should it not be importable by its name."""
    shard: Shard
    port: int
    listen_fd: int | None
    """Of rank 0: the socket at `port`."""
    tolerances: Mapping[str, float]
    """By dtype, relative to the largest value."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of all ranks."""

    unavailable: str = ""
    """Why there cannot be so many ranks here: `join` said so."""
    problems: Mapping[str, str] | None = None
    """Check -> what was seen, for those that failed."""


def run(factory: Callable[[], Device], world_size: int, tolerances: Mapping[str, float], patience_s: float) -> Report:
    """Start the ranks, wait for all of them, and put together what they saw."""
    name = name_of(factory)
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", "") or ""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, processes = listener.getsockname()[1], []
        for rank in range(world_size):
            fd = listener.fileno() if rank == 0 else None
            task = Task(name, file, Shard(rank, world_size), port, fd, tolerances)
            process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=() if fd is None else (fd,),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                text=True,
            )
            assert process.stdin is not None
            process.stdin.write(json.dumps(asdict(task)) + "\n")
            process.stdin.close()
            process.stdin = None  # communicate() would flush it
            processes.append(process)
    return _gather(processes, patience_s)


def _gather(processes: Sequence[subprocess.Popen[str]], patience_s: float) -> Report:
    deadline = time.monotonic() + patience_s
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() not in (None, 0) for process in processes):
                break  # the others wait for it in vain
            time.sleep(0.02)
        late = [rank for rank, process in enumerate(processes) if process.poll() is None]
    finally:
        for process in processes:
            process.kill()
    problems: dict[str, str] = {}
    for rank, process in enumerate(processes):
        out, errors = process.communicate()
        told = json.loads(out) if out else {}
        if "unavailable" in told:
            return Report(unavailable=told["unavailable"])
        for check, seen in told.get("problems", {}).items():
            problems.setdefault(check, f"rank {rank}: {seen}")
        if not told and rank not in late:
            problems["all"] = f"rank {rank} ended with {process.returncode}: {errors.strip()[-600:]}"
    if late and "all" not in problems:
        problems["all"] = f"ranks {late} were not done after {patience_s:g} s"
    return Report(problems=problems)


# A rank.


@dataclass(slots=True)
class Rank:
    """One rank and what it has to check. Every check is run by all ranks together, in the same order."""

    device: Device
    group: Group
    tolerances: Mapping[str, float]
    check: str = ""
    """The one under way."""
    problems: dict[str, str] = field(default_factory=dict)
    """Check -> what was seen first. A check goes on after it, because the other ranks do."""

    def demand(self, kept: bool, seen: str) -> None:
        if not kept:
            self.problems.setdefault(self.check, seen)

    def all_reduce(self) -> None:
        for dtype in self.tolerances:
            for rows, columns in SIZES:
                parts = [_random(dtype, rows, columns, rank) for rank in range(self.group.world_size)]
                found = self.group.all_reduce(self.own(parts))
                wanted = torch.stack([part.float() for part in parts]).sum(0)
                self.close(found, wanted, dtype, f"the sum of {dtype} [{rows}, {columns}]")
                self.same_bits(found, f"the sum of {dtype} [{rows}, {columns}]")

    def all_gather(self) -> None:
        for dtype in self.tolerances:
            for rows, columns in SIZES:
                parts = [_random(dtype, rows, columns, rank) for rank in range(self.group.world_size)]
                found = self.group.all_gather(self.own(parts)).cpu()
                right = torch.equal(found, torch.cat(parts, dim=1))
                self.demand(
                    right, f"parts of {dtype} [{rows}, {columns}] came as {list(found.shape)}, not side by side"
                )

    def broadcast(self) -> None:
        for rows, columns in SIZES:
            tokens = torch.arange(rows * columns, dtype=torch.int32) + 1000 * self.group.rank
            x = tokens.to(self.device.torch_device)
            self.group.broadcast(x)
            right = torch.equal(x.cpu(), torch.arange(rows * columns, dtype=torch.int32))
            self.demand(right, f"{x[:4].tolist()} ... instead of what rank 0 has")

    def minimum(self) -> None:
        for least in (0, 7, 1 << 40):
            found = self.group.minimum(least + self.group.rank)
            self.demand(found == least, f"the least of {least} and more was {found}")

    def linear_reduce(self) -> None:
        """Also left to the operation that norms it next: that one, and what it fills in, are as if it had not been."""
        ops, rank = self.device.ops, self.group.rank
        for dtype in self.tolerances:
            norm, after = _random(dtype, 1, 96, 1)[0], _random(dtype, 80, 96, 2)
            theirs, packed = Norm(on(self.device, norm), 1e-5), ops.pack_linear(on(self.device, after))
            ours, wide = Norm(norm.float(), 1e-5), after.float()
            for tokens in TOKENS:
                xs = [_random(dtype, tokens, 64, 10 + at) for at in range(self.group.world_size)]
                weights = [_random(dtype, 96, 64, 40 + at) / 8 for at in range(self.group.world_size)]
                bias, residual = _random(dtype, 1, 96, 3)[0], _random(dtype, tokens, 96, 4)
                wanted = residual.float() + bias.float()
                for one, weight in zip(xs, weights, strict=True):
                    wanted += REFERENCE.linear(one.float(), weight.float(), None)
                weight, added = (
                    ops.pack_linear(on(self.device, weights[rank])),
                    on(self.device, bias) if not rank else None,
                )

                def reduce(normed_next: bool, weight: Any = weight, added: Any = added) -> torch.Tensor:
                    x, old = on(self.device, xs[rank]), on(self.device, residual)  # noqa: B023 - called at once
                    return ops.linear_reduce(x, weight, added, old, self.group, normed_next=normed_next)

                what = f"linear_reduce of {dtype} [{tokens}, 96]"
                plain = reduce(False)
                self.close(plain, wanted, dtype, what)
                self.same_bits(plain, what)
                for name in ("norm_linear", "norm_gated", "logits"):
                    arguments = (theirs, packed) if name == "logits" else (theirs, packed, None)
                    given = (ours, wide) if name == "logits" else (ours, wide, None)
                    total = reduce(True)
                    found = getattr(ops, name)(total, *arguments)
                    self.close(found, getattr(REFERENCE, name)(wanted, *given), dtype, f"{name} after {what}")
                    self.close(total, wanted, dtype, f"what {name} leaves of {what}")
                    self.same_bits(total, f"what {name} leaves of {what}")

    def order(self) -> None:
        """Many exchanges right behind each other, none of which waits."""
        ranks, kept = self.group.world_size, []
        for at in range(60):
            x = torch.full((1 + at % 5, 8), float(at + self.group.rank), device=self.device.torch_device)
            kept.append((self.group.all_reduce(x.clone()), self.group.all_gather(x.clone())))
        for at, (total, parts) in enumerate(kept):
            sums = ranks * at + sum(range(ranks))
            right = bool((total == sums).all()) and parts[0, ::8].tolist() == [at + rank for rank in range(ranks)]
            self.demand(right, f"exchange {at} of 60 gave {total[0, :2].tolist()} and {parts[0].tolist()}")

    def capture(self) -> None:
        """A captured step with exchanges in it gives what the eager one gives."""
        for dtype in self.tolerances:
            shape = shape_of(getattr(torch, dtype))
            page = self.device.kv_layout(shape).page_size
            limits = StepLimits(max_rows=4, max_tokens=32, max_kv_len=64)
            bucket = next(iter(self.device.buckets(limits)), Bucket(4, 32))
            model = ToyModel(self.device, shape, pages=64)

            def forward(step: StepInput, model: ToyModel = model) -> torch.Tensor:
                return self.group.all_gather(self.group.all_reduce(model.forward(step)))

            plans = [pad_plan(plan_of(page, [(1, 3 + n)]), bucket, page) for n in range(3)]
            with torch.inference_mode():
                step = model.input(plans[0], bucket)
                captured = self.device.capture(forward, step, bucket)
                for plan in plans:
                    model.reset()
                    wanted = forward(model.input(plan, bucket)).cpu()
                    model.reset()
                    found = captured(model.refill(step, plan, bucket))
                    self.close(found[:1], wanted[:1].float(), dtype, f"the captured step of {bucket}")

    def same_bits(self, found: torch.Tensor, what: str) -> None:
        bits = zlib.crc32(found.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        least, most = self.group.minimum(bits), -self.group.minimum(-bits)  # both, on every rank
        self.demand(least == bits == most, f"{what} has other bits on other ranks")

    def own(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return on(self.device, parts[self.group.rank])

    def close(self, found: torch.Tensor, wanted: torch.Tensor, dtype: str, what: str) -> None:
        if found.shape != wanted.shape:
            self.demand(False, f"{what} has shape {list(found.shape)} instead of {list(wanted.shape)}")
            return
        off = (found.cpu().float() - wanted).abs().max().item()
        allowed = self.tolerances[dtype] * max(1.0, wanted.abs().max().item())
        self.demand(off <= allowed, f"{what} is off by {off:.3g} where {allowed:.3g} is allowed")


CHECKS: Mapping[str, Callable[[Rank], None]] = {
    check.__name__: check
    for check in (
        Rank.minimum,
        Rank.broadcast,
        Rank.all_reduce,
        Rank.all_gather,
        Rank.linear_reduce,
        Rank.order,
        Rank.capture,
    )
}


def _random(dtype: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def _make(task: Task) -> Device:
    module_name, _, path = task.device.partition(":")
    with suppress(ModuleNotFoundError):
        module: Any = importlib.import_module(module_name)
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, task.file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    made: Any = module
    for part in path.split("."):
        made = getattr(made, part)
    device: Device = made()
    return device


def main() -> int:
    raw = json.loads(sys.stdin.readline())
    task = Task(**raw | {"shard": Shard(**raw["shard"])})
    device = _make(task)
    try:
        if task.shard.world_size > 1:
            device.join(task.shard)
        group = connect(device, task.shard, open_store(task.port, task.shard.world_size, task.listen_fd))
    except StartError as error:
        print(json.dumps({"unavailable": str(error)}), flush=True)
        return 1
    rank = Rank(device, group, task.tolerances)
    for rank.check, check in CHECKS.items():
        try:
            check(rank)
        except Exception as error:
            rank.demand(False, f"{type(error).__name__}: {error}")
    print(json.dumps({"problems": rank.problems}), flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    # Not through the interpreter's end: a library's threads may wait for other ranks for ever.
    os._exit(code)
