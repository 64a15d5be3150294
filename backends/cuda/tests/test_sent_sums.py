"""Sums that one product sends and the next one adds up: the kernels on a CPU, ranks one after the other."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulation import EmulatedLauncher

from tgi_backend_cuda.collectives import CudaGroup
from tgi_backend_cuda.exchange import Exchange
from tgi_backend_cuda.native.linear import NOTHING_SENT, Inboxes, LinearTuning, LinearTunings
from tgi_backend_cuda.native.ops import NativeOps
from tgi_backend_cuda.ops import CudaOps
from tgi_model_server.device import Norm
from tgi_model_server.kernels.launch import Tuning
from tgi_model_server.parallel import Group, Shard

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="emulated kernels are compiled by g++"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
TUNING = LinearTuning(warps=4, stages=3, blocks=1, prefetch=256)
CAPACITY, OWN, OUTPUTS = 512, 72, 70


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels are kept from one test to the next."""
    return tmp_path_factory.mktemp("emulated")


class Ranks:
    """All ranks of one group, whose memory is this process's."""

    def __init__(self, folder: Path, world: int) -> None:
        self.memory = torch.full((world, 3, world, CAPACITY), NOTHING_SENT, dtype=torch.int16)
        addresses = tuple(each.data_ptr() for each in self.memory)
        nowhere = torch.zeros(2, world, 2, dtype=torch.int64)
        self.groups = []
        for shard in (Shard(rank, world) for rank in range(world)):
            exchange = Exchange(shard, nowhere, nowhere[0])
            inboxes = Inboxes(addresses, CAPACITY, shard.rank, torch.zeros(3, dtype=torch.int32), exchange.stop)
            self.groups.append(CudaGroup(Group(shard), exchange, inboxes))
        tunings = LinearTunings(TUNING, TUNING, TUNING, TUNING, TUNING)
        launchers = [EmulatedLauncher(folder, multiprocessors=5, seed=100 * rank) for rank in range(world)]
        self.ops = [CudaOps(Tuning(), NativeOps(launcher, tunings), lambda _: None) for launcher in launchers]
        self.all = range(world)


class Sum:
    """What the ranks of a group bring to one sum, and the sum."""

    def __init__(self, ranks: Ranks, tokens: int, hidden: int, dtype: torch.dtype, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=draw).to(dtype)

        self.ranks = ranks
        self.x = [random(tokens, OWN) for _ in ranks.all]
        self.weights = [random(hidden, OWN) / 8 for _ in ranks.all]
        # These come to minus zero, in float16.
        for x, weight in zip(self.x, self.weights, strict=True):
            x[:, 0] = -0.25
            weight[:3] = 0
            weight[:3, 0] = 2.0**-24
        self.bias = random(hidden)
        self.bias[:3] = 0
        self.residual = random(tokens, hidden)
        self.norm = Norm(random(hidden), 1e-5)
        self.next = random(OUTPUTS, hidden)
        total = torch.zeros(tokens, hidden)
        for rank in ranks.all:
            total += ranks.ops[rank].linear(self.x[rank], self.weights[rank], self.bias_of(rank)).float()
        self.total = (total + self.residual.float()).to(dtype)

    def bias_of(self, rank: int) -> torch.Tensor | None:
        return None if rank else self.bias

    def send(self, rank: int) -> torch.Tensor:
        ranks = self.ranks
        given = (self.x[rank], self.weights[rank], self.bias_of(rank), self.residual, ranks.groups[rank])
        total = ranks.ops[rank].linear_reduce(*given, normed_next=True)
        assert ranks.ops[rank]._arriving is not None, "it was not sent"
        return total.fill_(float("nan"))

    def receivers(self, rank: int) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        ops = self.ranks.ops[rank]
        return [
            lambda x: ops.norm_linear(x, self.norm, self.next, None),
            lambda x: ops.norm_gated(x, self.norm, self.next, None),
            lambda x: ops.logits(x, self.norm, self.next),
        ]


@pytest.mark.parametrize(
    ("world", "tokens", "dtype", "sizes", "receivers"),
    [
        (2, 1, torch.bfloat16, (8, 200, 512), (0, 1, 2)),
        (2, 2, torch.bfloat16, (200, 256), (1,)),
        (3, 2, torch.float16, (72, 136), (0,)),
    ],
)
def test_a_sent_sum_has_the_bits_of_an_exchange_and_so_has_what_is_made_of_it(
    folder: Path, world: int, tokens: int, dtype: torch.dtype, sizes: tuple[int, ...], receivers: tuple[int, ...]
) -> None:
    ranks = Ranks(folder, world)
    for hidden in sizes:
        for number in range(3):
            one, receiver = Sum(ranks, tokens, hidden, dtype, number), receivers[number % len(receivers)]
            wanted = one.receivers(0)[receiver](one.total)
            residual = one.residual.clone()
            sent = [one.send(rank) for rank in ranks.all]
            for rank, total in zip(ranks.all, sent, strict=True):
                assert torch.equal(one.receivers(rank)[receiver](total), wanted)
                assert torch.equal(total, one.total)
            assert torch.equal(one.residual, residual), "other blocks read it"


def test_a_receiver_polls_for_the_numbers_of_a_rank_that_is_late_and_takes_no_stale_ones(folder: Path) -> None:
    ranks = Ranks(folder, 2)
    for seed in range(4):  # the inboxes are full of older messages, also of more tokens
        one = Sum(ranks, 1 + seed % 2, 200, torch.bfloat16, seed)
        early = one.send(0)
        polling = threading.Thread(target=one.receivers(0)[seed % 2], args=(early,))
        if seed < 2:
            late = one.send(1)
            polling.start()
        else:
            polling.start()
            time.sleep(0.2)
            assert polling.is_alive(), "it did not wait for rank 1"
            late = one.send(1)
        polling.join()
        one.receivers(1)[seed % 2](late)
        assert torch.equal(early, one.total)
        assert torch.equal(late, one.total)


def test_a_receiver_ends_when_nobody_may_wait_any_more(folder: Path) -> None:
    ranks = Ranks(folder, 2)
    one = Sum(ranks, 1, 200, torch.bfloat16, 5)
    polling = threading.Thread(target=one.receivers(0)[1], args=(one.send(0),))
    polling.start()
    time.sleep(0.1)
    assert polling.is_alive()
    ranks.groups[0].abort()
    polling.join(20)
    assert not polling.is_alive()


def test_a_broken_promise_that_a_sum_is_normed_next_is_noticed(folder: Path) -> None:
    ranks = Ranks(folder, 2)
    ops = ranks.ops[0]

    def send() -> tuple[Sum, torch.Tensor]:
        ops._arriving = None
        one = Sum(ranks, 1, 200, torch.bfloat16, 1)
        return one, one.send(0)

    one, _ = send()
    with pytest.raises(AssertionError, match="normed next"):
        ops.linear(one.x[0], one.weights[0], None)
    one, total = send()
    with pytest.raises(AssertionError, match="normed next"):
        ops.norm_linear(total.clone(), one.norm, one.next, None)


def test_sums_that_are_not_normed_next_or_of_more_tokens_go_through_the_group(folder: Path) -> None:
    ranks = Ranks(folder, 2)

    class Counting(CudaGroup):
        added = 0

        def all_reduce_add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            self.added += 1
            return residual + x

    group = Counting(Group(Shard(0, 2)), ranks.groups[0]._exchange, ranks.groups[0].inboxes)
    ops = ranks.ops[0]
    for tokens, normed_next in ((1, False), (3, True)):
        one = Sum(ranks, tokens, 200, torch.bfloat16, tokens)
        ops.linear_reduce(one.x[0], one.weights[0], None, one.residual, group, normed_next=normed_next)
        assert ops._arriving is None
    assert group.added == 2
