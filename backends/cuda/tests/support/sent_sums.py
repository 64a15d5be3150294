"""Part of `two_gpus.py`: sums that one product sends and the next one adds up, beside the same through an exchange."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tgi_backend_cuda.collectives import CudaGroup
from tgi_backend_cuda.native.ops import SENT_TOKENS
from tgi_backend_cuda.ops import CudaOps
from tgi_model_server.device import Norm

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY = 4096, 32, 8, 128, 14336, 128256
LAYERS = 32
DTYPES = (torch.bfloat16, torch.float16)
_cuda: Any = torch.cuda  # whose streams and events have no types


@dataclass
class Layer:
    """One rank's part."""

    norm: Norm
    qkv: torch.Tensor
    out: torch.Tensor
    middle_norm: Norm
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass
class Decoder:
    """The products of decoder layers, attention left out: the out-projection takes what comes first of q, k and v."""

    group: CudaGroup
    ops: CudaOps
    layers: list[Layer]
    head: torch.Tensor
    bias: torch.Tensor | None
    start: torch.Tensor
    """[tokens, hidden], which each rank has its own of."""
    attended: torch.Tensor | None = None
    """The out-projection's input, if not the output of q, k and v."""
    kept: list[torch.Tensor] = field(default_factory=list)

    def forward(self, sent: bool, keep: bool = True) -> list[torch.Tensor]:
        """All sums and products, the logits last. `sent`: by the products themselves."""
        ops, kept = self.ops, []
        x = self.group.all_reduce(self.start.clone())
        for layer in self.layers:
            qkv = ops.norm_linear(x, layer.norm, layer.qkv, None)
            x = self._add(qkv if self.attended is None else self.attended, layer.out, x, sent)
            inner = ops.norm_gated(x, layer.middle_norm, layer.gate_up, None)
            if keep:
                kept += [qkv, x.clone(), inner]
            x = self._add(inner, layer.down, x, sent)
        logits = ops.logits(x, self.layers[0].norm, self.head)
        return [*kept, x, logits]

    def forward_alone(self) -> torch.Tensor:
        """With no exchange: what the products alone take."""
        ops, x = self.ops, self.start.clone()
        for layer in self.layers:
            qkv = ops.norm_linear(x, layer.norm, layer.qkv, None)
            x = ops.linear_add(qkv if self.attended is None else self.attended, layer.out, None, x)
            x = ops.linear_add(ops.norm_gated(x, layer.middle_norm, layer.gate_up, None), layer.down, None, x)
        return ops.logits(x, self.layers[0].norm, self.head)

    def _add(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, sent: bool) -> torch.Tensor:
        total = self.ops.linear_reduce(x, weight, self.bias, residual, self.group, normed_next=sent)
        assert sent == (self.ops._arriving is not None), "this size is to be sent by the product"
        return total


@dataclass
class SentSums:
    """All ranks do the same in the same order."""

    group: CudaGroup
    ops: CudaOps
    device: torch.device
    record: Callable[[Callable[[], Any]], Callable[[], Any]]
    say: Callable[[str], None]

    def random(self, seed: int, *size: int, dtype: torch.dtype, own: bool = True, scale: float = 1.0) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed * 64 + (self.group.rank if own else 63))
        return (torch.randn(size, generator=generator, device=self.device) * scale).to(dtype)

    def decoder(self, tokens: int, dtype: torch.dtype, layers: int, *, real: bool) -> Decoder:
        """`real`: with as many heads as an 8B model, whose q, k and v no product takes as they are."""
        world = self.group.world_size
        heads = HEADS * HEAD_DIM // world
        stacked, inner = (heads + 2 * KV_HEADS * HEAD_DIM // world if real else heads), INNER // world

        def weight(seed: int, rows: int, columns: int) -> torch.Tensor:
            return self.ops.pack_linear(self.random(seed, rows, columns, dtype=dtype, scale=columns**-0.5))

        def norm(seed: int) -> Norm:
            return Norm(self.random(seed, HIDDEN, dtype=dtype, own=False, scale=0.2) + 1, 1e-5)

        made = [
            Layer(
                norm(10 * at),
                weight(10 * at + 1, stacked, HIDDEN),
                weight(10 * at + 2, HIDDEN, heads),
                norm(10 * at + 3),
                weight(10 * at + 4, 2 * inner, HIDDEN),
                weight(10 * at + 5, HIDDEN, inner),
            )
            for at in range(layers)
        ]
        bias = self.random(6, HIDDEN, dtype=dtype) if self.group.rank == 0 and not real else None
        start = self.random(7, tokens, HIDDEN, dtype=dtype)
        attended = self.random(8, tokens, heads, dtype=dtype) if real else None
        head = weight(9, VOCABULARY // world if real else 1000, HIDDEN)
        return Decoder(self.group, self.ops, made, head, bias, start, attended)

    def check(self, sizes: Sequence[int] = SENT_TOKENS, replays: int = 300) -> None:
        """Bit for bit the same, eagerly and from graphs of several sizes in a random order."""
        recorded = []
        for dtype in DTYPES:
            for tokens in sizes:
                decoder = self.decoder(tokens, dtype, 2, real=False)
                self.compare(decoder.forward(True), decoder.forward(False), f"eager {dtype} [{tokens}]")
                sent, plain = (self.record(partial(decoder.forward, way)) for way in (True, False))
                recorded.append((decoder, sent, plain))
        self.say("sums: sent ones are those of exchanges to the bit, eagerly")
        draw = random.Random(11)
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        for number in range(replays):
            decoder, sent_graph, plain_graph = draw.choice(recorded)
            decoder.start.copy_(self.random(100 + number, *decoder.start.shape, dtype=decoder.start.dtype))
            for _ in range(draw.choice([1, 1, 3])):
                found = sent_graph()
            for one, other in zip(found, plain_graph(), strict=True):
                wrong += (one != other).sum()
            wrong += sum((~each.isfinite()).sum() for each in found)
        assert int(wrong) == 0, f"rank {self.group.rank}: {int(wrong)} numbers of {replays} replays differ"
        self.say(f"sums: {replays} replays of graphs of all sizes in a random order are right")

    def compare(self, found: list[torch.Tensor], wanted: list[torch.Tensor], what: str) -> None:
        for at, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert other.isfinite().all(), f"rank {self.group.rank}, {what}: result {at} is not finite"
            off = int((one != other).sum())
            most = float((one.float() - other.float()).abs().max())
            assert torch.equal(one, other), f"rank {self.group.rank}, {what}: {off} of result {at} differ, by {most}"

    def time(self, sizes: Sequence[int] = SENT_TOKENS) -> None:
        """Of an 8B model's products in one graph."""
        for number in sizes:
            decoder = self.decoder(number, torch.bfloat16, LAYERS, real=True)
            graphs = [
                self.record(partial(decoder.forward, True, keep=False)),
                self.record(partial(decoder.forward, False, keep=False)),
                self.record(decoder.forward_alone),
            ]
            times: list[list[float]] = [[], [], []]
            for _ in range(5):
                for graph, own in zip(graphs, times, strict=True):
                    own.append(self.microseconds(graph))
            sent, plain, alone = (sorted(each)[len(each) // 2] for each in times)
            spread = "; ".join(" ".join(f"{each:.0f}" for each in own) for own in times)
            sums = 2 * LAYERS
            self.say(
                f"{number} tokens, {LAYERS} layers: sent {sent:.0f} us, exchanged {plain:.0f}, neither {alone:.0f}: "
                f"{(sent - alone) / sums:.2f} and {(plain - alone) / sums:.2f} us a sum    ({spread})"
            )

    def microseconds(self, replay: Callable[[], Any], replays: int = 10) -> float:
        self.group.all_reduce(torch.zeros(8, device=self.device))
        replay()
        begin, end = (_cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            replay()
        end.record()
        torch.cuda.synchronize()
        taken_ms: float = begin.elapsed_time(end)
        return taken_ms * 1000 / replays

    def check_abort(self) -> None:
        """Last: rank 0 polls for numbers that never come, until it is told to stop."""
        decoder = self.decoder(1, torch.bfloat16, 1, real=False)
        decoder.forward(True)
        self.group.all_reduce(torch.zeros(8, device=self.device))
        torch.cuda.synchronize()
        self.group.minimum(0)
        if self.group.rank == 0:
            layer, began_s = decoder.layers[0], time.monotonic()
            threading.Timer(0.5, self.group._exchange.abort).start()
            x = torch.zeros(1, layer.out.shape[1], dtype=torch.bfloat16, device=self.device)
            total = self.ops.linear_reduce(x, layer.out, None, decoder.start, self.group, normed_next=True)
            self.ops.norm_gated(total, layer.middle_norm, layer.gate_up, None)
            torch.cuda.synchronize()
            waited_s = time.monotonic() - began_s
            assert 0.3 < waited_s < 5.0, f"waited {waited_s:.2f} s"
            self.say(f"abort: ended a vain poll for a sum after {waited_s:.2f} s")
        self.group.minimum(0)
