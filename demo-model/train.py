"""Trains the demo model on the curriculum and exports it; a GPU needs minutes, a few CPU cores an hour or two.

python train.py --minutes 80                 # the main model, into src/tgi_demo_model/weights
python train.py --size draft --minutes 10    # the small draft, for speculation; none is shipped yet
python train.py --resume                     # goes on after Ctrl-C, which saves
"""

import argparse
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import curriculum
from lessons.exchange import Exchange
from lessons.rendering import Segment, segments
from training.model import DRAFT, MAIN, Decoder, export
from training.muon import Muon
from training.tokenizer import export_tokenizer, train_tokenizer

PACKAGE = Path(__file__).parent / "src" / "tgi_demo_model"
CHUNK = 4096  # conversations drawn, tokenized and sorted by length at a time
MICRO_TOKENS = 2560
MICRO_PER_STEP = 2
EMA_DECAY = 0.995


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [batch, length], right-padded with 0
    positions: Tensor  # flat positions whose next token is learned
    targets: Tensor  # those next tokens


def encode(tokenizer: Tokenizer, talks: list[list[Segment]], longest: int) -> list[tuple[list[int], list[int]]]:
    """(token ids, indexes of trained tokens) per conversation, cut at the longest length."""
    encoded = iter(tokenizer.encode_batch_fast([text for talk in talks for text, _ in talk]))
    rows = []
    for talk in talks:
        ids: list[int] = []
        trained: list[int] = []
        for _, learn in talk:
            piece = next(encoded).ids
            if learn:
                trained.extend(range(len(ids), len(ids) + len(piece)))
            ids.extend(piece)
        rows.append((ids[:longest], [at for at in trained if 0 < at < longest]))
    return rows


def collate(rows: list[tuple[list[int], list[int]]], device: torch.device) -> Batch:
    length = -(-max(len(ids) for ids, _ in rows) // 16) * 16
    table = torch.zeros(len(rows), length, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    for row, (ids, trained) in enumerate(rows):
        table[row, : len(ids)] = torch.tensor(ids)
        positions.extend(row * length + at - 1 for at in trained)
        targets.extend(ids[at] for at in trained)
    return Batch(table.to(device), torch.tensor(positions, device=device), torch.tensor(targets, device=device))


def group(rows: list[tuple[list[int], list[int]]], tokens: int) -> list[list[tuple[list[int], list[int]]]]:
    """Batches of similar lengths with about so many tokens, so that little is padding."""
    batches: list[list[tuple[list[int], list[int]]]] = [[]]
    for row in sorted(rows, key=lambda row: len(row[0])):
        if batches[-1] and (len(batches[-1]) + 1) * len(row[0]) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def training_batches(
    tokenizer: Tokenizer, first_chunk: int, longest: int, device: torch.device
) -> Iterator[tuple[int, Batch]]:
    """(number of the chunk, batch) without end; a chunk number alone says what is in the chunk."""
    chunk = first_chunk
    while True:
        talks = [talk.segments() for talk in islice(curriculum.conversations(1_000_003 + chunk), CHUNK)]
        batches = group(encode(tokenizer, talks, longest), MICRO_TOKENS)
        random.Random(chunk).shuffle(batches)
        for rows in batches:
            yield chunk, collate(rows, device)
        chunk += 1


def graded_segments(exchange: Exchange) -> list[Segment]:
    """The exchange up to its graded answer, of which only that answer counts."""
    last = exchange.graded % len(exchange.messages)
    shown = segments(exchange.messages[: last + 1], exchange.tools, exchange.system)
    final = max(at for at, (_, learn) in enumerate(shown[:-1] if exchange.task == "plain" else shown) if learn)
    return [(text, learn and at >= final) for at, (text, learn) in enumerate(shown)]


@torch.no_grad()
def examine(model: Decoder, tokenizer: Tokenizer, device: torch.device, count: int = 40) -> dict[str, float]:
    """Share of held-out answers predicted right token by token, which is what greedy decoding would say.

    Stories have no single right answer, so for them it is the share of right tokens."""
    scores = {}
    for task in curriculum.EXAMS:
        rows = encode(tokenizer, [graded_segments(exchange) for exchange in curriculum.examination(task, count)], 4096)
        right = 0.0
        for batch_rows in group(rows, 16_384):
            batch = collate(batch_rows, device)
            hits = (model(batch.ids, batch.positions).argmax(-1) == batch.targets).tolist()
            for _, trained in batch_rows:
                own, hits = hits[: len(trained)], hits[len(trained) :]
                right += sum(own) / len(own) if task == "story" else all(own)
        scores[task] = right / len(rows)
    return scores


def learning_rate_factor(progress: float, warm: float) -> float:
    """Warm-up, a plateau, then a linear way down to zero; progress is the share of the time budget that is used."""
    return min(1.0, warm) * min(1.0, max(0.0, (1 - progress) / 0.55))


class Run:
    """One training run: weights, their moving average, optimizers and counters, saved and restored together."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shape = DRAFT if options.size == "draft" else MAIN
        self.checkpoint = options.work / f"{options.size}.pt"
        self.model = Decoder(self.shape).to(self.device)
        self.average = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        # One thread per batch: on shared cores, threads that meet once a step wait less than threads in each product.
        torch.set_num_threads(options.threads)
        workers = 1 if self.device.type == "cuda" else MICRO_PER_STEP
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(options.threads,))
        matrices = [weight for name, weight in self.model.named_parameters() if "proj" in name]
        others = [weight for name, weight in self.model.named_parameters() if "proj" not in name]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=options.matrix_lr, run=self.pool.map),
            torch.optim.AdamW(others, lr=options.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.peaks = [options.matrix_lr, options.other_lr]
        self.step, self.tokens, self.chunk, self.used_s, self.loss = 0, 0, 0, 0.0, float("nan")

    def save(self) -> None:
        self.options.work.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "step": self.step,
            "tokens": self.tokens,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "chunk": self.chunk,
            "used_s": self.used_s,
            "loss": self.loss,
        }
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)

    def restore(self) -> None:
        state: dict[str, Any] = torch.load(self.checkpoint, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.loss = state["step"], state["tokens"], state["loss"]
        self.chunk, self.used_s = state["chunk"] + 1, state["used_s"]

    def averaged(self) -> Decoder:
        model = Decoder(self.shape).to(self.device)
        model.load_state_dict(self.average)
        return model.eval()

    def gradients(self, batch: Batch, wanted: int) -> tuple[float, tuple[Tensor, ...]]:
        """The batch's part of the step's loss and gradients."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(batch.ids, batch.positions)
        loss = F.cross_entropy(logits.float(), batch.targets, reduction="sum") / wanted
        return loss.item(), torch.autograd.grad(loss, list(self.model.parameters()))

    def update(self, batches: list[Batch]) -> None:
        progress = self.used_s / (60 * self.options.minutes)
        factor = learning_rate_factor(progress, (self.step + 1) / 100)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for settings in optimizer.param_groups:
                settings["lr"] = peak * factor
        wanted = sum(len(batch.targets) for batch in batches)
        parts = list(self.pool.map(lambda batch: self.gradients(batch, wanted), batches))
        total = sum(loss for loss, _ in parts)
        for weight, *gradients in zip(self.model.parameters(), *(part for _, part in parts), strict=True):
            weight.grad = torch.stack(gradients).sum(dim=0)
        self.tokens += sum(batch.ids.numel() for batch in batches)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(EMA_DECAY, self.step / (self.step + 10))
            for name, weight in self.model.named_parameters():
                self.average[name].lerp_(weight, 1 - decay)
        self.step += 1
        self.loss = total if self.loss != self.loss else 0.98 * self.loss + 0.02 * total

    def train(self, tokenizer: Tokenizer) -> None:
        options = self.options
        stream = training_batches(tokenizer, self.chunk, options.longest, self.device)
        if not options.no_compile:
            for layer in self.model.layers:
                layer.compile(dynamic=True)
            for _, batch in islice(stream, 2):  # compiled here, because several threads may not compile at once
                self.gradients(batch, 1)
        before, shown, saved = time.monotonic(), time.monotonic(), time.monotonic()
        while self.used_s < 60 * options.minutes:
            drawn = [next(stream) for _ in range(MICRO_PER_STEP)]
            self.chunk = drawn[-1][0]
            self.update([batch for _, batch in drawn])
            now = time.monotonic()
            self.used_s += now - before
            before = now
            if now - shown > 20:
                print(
                    f"step {self.step:6}  {self.used_s / 60:5.1f} min  {self.tokens / 1e6:6.2f} M tokens  "
                    f"{self.tokens / self.used_s:6.0f} tokens/s  loss {self.loss:.4f}",
                    flush=True,
                )
                shown = now
            if now - saved > 60 * options.save_every:
                self.save()
                self.report(tokenizer)
                saved = time.monotonic()

    def report(self, tokenizer: Tokenizer) -> None:
        scores = examine(self.averaged(), tokenizer, self.device)
        print("      held out: " + "  ".join(f"{task} {100 * score:.0f}" for task, score in scores.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("main", "draft"), default="main")
    parser.add_argument("--minutes", type=float, default=75, help="time budget, which the learning rate follows")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--export-only", action="store_true", help="write the weights of the last checkpoint and stop")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of checkpoints and the tokenizer")
    parser.add_argument("--out", type=Path, help="folder of the exported model (default: inside the package)")
    parser.add_argument("--save-every", type=float, default=5, help="minutes between checkpoints")
    parser.add_argument("--longest", type=int, default=2048, help="conversations are cut at this many tokens")
    parser.add_argument("--matrix-lr", type=float, default=0.02, help="peak learning rate of Muon")
    parser.add_argument(
        "--other-lr", type=float, default=0.004, help="peak learning rate of AdamW: embeddings and norms"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per batch of a step")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which needs a C++ compiler")
    options = parser.parse_args()
    torch.manual_seed(0)
    out: Path = options.out or PACKAGE / ("draft" if options.size == "draft" else "weights")

    run = Run(options)
    saved_tokenizer: Path = options.work / "tokenizer.json"
    if saved_tokenizer.exists():
        tokenizer = Tokenizer.from_file(str(saved_tokenizer))
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(run.shape.vocab_size)
        tokenizer.save(str(saved_tokenizer))
    if options.resume or options.export_only:
        run.restore()
    if not options.export_only:
        print(f"{sum(w.numel() for w in run.model.parameters()) / 1e6:.2f} M parameters on {run.device}", flush=True)
        try:
            run.train(tokenizer)
        except KeyboardInterrupt:
            print("interrupted; the checkpoint is being saved, --resume goes on from it")
        run.save()
        run.report(tokenizer)
    export(run.average, run.shape, out)
    export_tokenizer(tokenizer, out, run.shape.max_position_embeddings)
    print(
        f"exported to {out} after {run.step} steps, {run.tokens / 1e6:.1f} M tokens, "
        f"{run.used_s / 60:.1f} minutes, loss {run.loss:.4f}"
    )


if __name__ == "__main__":
    main()
