"""Penalties: repetition, frequency, presence, over exactly one request's prompt and output."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tgi_model_server.transfer import pinned_copy


class TokenCounts:
    """Per slot, how often each token was generated and whether the prompt holds it. On the device, so that counting a
    sampled token needs no round trip to the host. Allocated when the first request with a penalty comes.
    """

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device) -> None:
        self._size = (max_sequences, vocab_size)
        self._device = device
        self._output: torch.Tensor | None = None
        self._prompt: torch.Tensor | None = None

    def reset(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """A new request in `slot`."""
        if self._output is None or self._prompt is None:
            self._output = torch.zeros(self._size, dtype=torch.int32, device=self._device)
            self._prompt = torch.zeros(self._size, dtype=torch.bool, device=self._device)
        vocab_size = self._size[1]
        generated = torch.tensor(list(output), dtype=torch.int64).bincount(minlength=vocab_size)
        seen = torch.tensor(list(prompt), dtype=torch.int64).bincount(minlength=vocab_size) > 0
        self._output[slot].copy_(pinned_copy(generated.int().numpy(), torch.int32, self._device), non_blocking=True)
        self._prompt[slot].copy_(pinned_copy(seen.numpy(), torch.bool, self._device), non_blocking=True)

    def add(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """One more token for each of `slots`, int64 [rows]; a slot occurs once."""
        assert self._output is not None, "reset() comes first"
        self._output.index_put_((slots, tokens), self._output[slots, tokens] + 1)

    def penalize(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        repetition: torch.Tensor,
        frequency: torch.Tensor,
        presence: torch.Tensor,
    ) -> torch.Tensor:
        """float32 logits [rows, vocabulary] after the penalties, each float32 [rows, 1]."""
        assert self._output is not None
        assert self._prompt is not None
        counts = self._output.index_select(0, slots)
        generated = counts > 0
        repeated = generated | self._prompt.index_select(0, slots)
        scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(repeated, scaled, logits)
        return logits - counts * frequency - generated * presence
