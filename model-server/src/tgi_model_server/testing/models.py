"""Small random models for tests, and a batch that is stepped by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from tgi_gateway.types import Request, SamplingParams, StopRules
from tgi_model_server.device import AttentionShape
from tgi_model_server.models.config import parse_config
from tgi_model_server.models.registry import build_model
from tgi_model_server.parallel import Shard
from tgi_model_server.plan import PREVIOUS_TOKEN, StepPlan, StepResult
from tgi_model_server.reference import ReferenceOps
from tgi_model_server.runner import Runner
from tgi_model_server.weights.dummy import DummyWeights

SMALL: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
"""config.json of a Llama that runs in a millisecond."""


class _RecordedWeights(DummyWeights):
    """Random weights of a size that gives logits some spread, kept by name."""

    def __init__(self, seed: int) -> None:
        super().__init__(dtype=torch.float32, device=torch.device("cpu"), shard=Shard(), seed=seed)
        self.taken: dict[str, torch.Tensor] = {}

    def _fill(self, target: torch.Tensor, name: str, shape: tuple[int, ...], dim: int, start: int) -> None:
        super()._fill(target, name, shape, dim, start)
        if not name.endswith("norm.weight"):
            target.mul_(50.0 * shape[-1] ** -0.5)
        self.taken[name] = target.clone()


def random_tensors(raw_config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint for `raw_config`, float32, under its name in transformers."""
    config = parse_config(raw_config, "config.json")
    shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, torch.float32, torch.float32)
    weights = _RecordedWeights(seed)
    build_model(config, shape, weights, ReferenceOps(), device=torch.device("cpu"), max_positions=1)
    return weights.taken


def save_random_model(folder: Path, raw_config: Mapping[str, Any] = SMALL, seed: int = 0) -> Path:
    """Write a loadable model folder without a tokenizer; returns `folder`."""
    (folder / "config.json").write_text(json.dumps(dict(raw_config)))
    save_file(random_tensors(raw_config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_ascii_tokenizer(folder: Path, vocab_size: int, special: Sequence[int]) -> None:
    """Write a tokenizer.json with a token for each printable character; all other tokens are special, as `special`."""
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # as byte-level tokenizers write space and newline
    free = [token for token in range(vocab_size) if token not in set(special)]
    vocabulary = dict(zip(characters, free, strict=False))
    others = {f"<{token}>": token for token in sorted({*range(vocab_size)} - {*vocabulary.values()})}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary | others, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(list(others))
    inner.save(str(folder / "tokenizer.json"))


def make_request(
    request_id: int,
    input_ids: Sequence[int],
    *,
    sampling: SamplingParams | None = None,
    max_new_tokens: int = 16,
    logprobs: bool = False,
    top_n_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
) -> Request:
    return Request(
        request_id=request_id,
        input_ids=tuple(input_ids),
        sampling=sampling or SamplingParams(),
        stop=StopRules(max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids),
        logprobs=logprobs,
        top_n_tokens=top_n_tokens,
    )


class HandBatch:
    """Sequences on shuffled pages, each stepped when and as far as a test says."""

    def __init__(self, runner: Runner, seed: int = 0) -> None:
        self._runner = runner
        self._pages = list(range(1, runner.num_pages))
        random.Random(seed).shuffle(self._pages)
        self._slots = list(range(runner.max_sequences))
        random.Random(seed + 1).shuffle(self._slots)
        self._rows: dict[int, _Row] = {}

    def add(self, request: Request, output_ids: Sequence[int] = ()) -> None:
        slot = self._slots.pop()
        self._runner.admit(slot, request, output_ids)
        self._rows[request.request_id] = _Row(slot, [*request.input_ids, *output_ids], len(output_ids))

    def remove(self, request_id: int) -> None:
        """As a preemption does: pages and slot go back."""
        row = self._rows.pop(request_id)
        self._runner.release(row.slot)
        self._slots.append(row.slot)
        self._pages.extend(row.pages)

    def plan(self, *parts: tuple[int, int], targets: Mapping[int, list[int]] | None = None) -> StepPlan:
        """A step of (request id, new tokens) parts; a row that runs out of known tokens is sampled."""
        plan = StepPlan(prompt_targets=dict(targets or {}))
        for request_id, count in parts:
            row = self._rows[request_id]
            new = row.known[row.done : row.done + count]
            new += [PREVIOUS_TOKEN] * (count - len(new))
            row.done += count
            while len(row.pages) * self._runner.page_size < row.done:
                row.pages.append(self._pages.pop())
            if row.done >= len(row.known):
                plan.sample_rows.append(len(plan.slots))
                plan.allow_eos.append(True)
                plan.output_lens.append(row.generated)
                row.generated += 1
            plan.slots.append(row.slot)
            plan.query_lens.append(count)
            plan.kv_lens.append(row.done)
            plan.pages.append(list(row.pages))
            plan.token_ids.extend(new)
        return plan

    def step(self, *parts: tuple[int, int], targets: Mapping[int, list[int]] | None = None) -> StepResult:
        return self._runner.run(self.plan(*parts, targets=targets)).wait()

    def generate(self, request: Request, count: int, *, chunk: int = 1 << 30) -> list[int]:
        """`count` tokens of `request` alone, its prompt in chunks."""
        self.add(request)
        out: list[int] = []
        left = len(request.input_ids)
        while left:
            part = min(left, chunk)
            left -= part
            out += self.step((request.request_id, part)).token_ids
        while len(out) < count:
            out += self.step((request.request_id, 1)).token_ids
        self.remove(request.request_id)
        return out


class _Row:
    def __init__(self, slot: int, known: list[int], generated: int) -> None:
        self.slot = slot
        self.known = known
        self.generated = generated
        self.done = 0
        self.pages: list[int] = []
