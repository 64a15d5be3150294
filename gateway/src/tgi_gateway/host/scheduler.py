"""Admission: which waiting tickets may enter the engine now, and which requests never can. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from tgi_gateway.backend import Capabilities, Capacity, ModelInfo, refuse_unsupported
from tgi_gateway.errors import ValidationError
from tgi_gateway.types import Request

GROWTH_TOKENS = 64
"""Room for output that a request must find free, beside its prompt, to enter. Reserving all of `max_new_tokens` would
leave most of the memory unused; reserving nothing would make the engine preempt what has just entered."""

PATIENCE_S = 5.0
"""How long later requests may pass one that finds no room."""
MAX_PASSED = 16
"""How many that find no room are looked beyond."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the engine can still take."""

    sequences: int
    kv_tokens: int


def needed_kv_tokens(request: Request) -> int:
    """KV tokens that must be free for `request` to enter."""
    return len(request.input_ids) + min(request.stop.max_new_tokens, GROWTH_TOKENS)


def room(capacity: Capacity, *, running: int, unseen_kv_tokens: int) -> Room:
    """The room behind `capacity`, which may not yet know of the latest submits.

    `running` requests were submitted and have not ended. Those of them without a token so far may not be in
    `capacity.free_kv_tokens` yet: `unseen_kv_tokens` is the sum of what they need.
    """
    return Room(
        sequences=min(capacity.free_sequences, capacity.max_sequences - running),
        kv_tokens=capacity.free_kv_tokens - unseen_kv_tokens,
    )


def room_after(request: Request, room: Room, *, alone: bool) -> Room | None:
    """The room left when `request` enters; None if it must wait.

    `alone`: nothing runs, so it can only enter;
    a capacity that says otherwise is late.
    """
    needed = needed_kv_tokens(request)
    if not alone and (room.sequences < 1 or room.kv_tokens < needed):
        return None
    return Room(room.sequences - 1, room.kv_tokens - needed)


def may_pass(request: Request, first: Request, *, blocked_s: float, passed_by_tokens: int) -> bool:
    """Whether `request`, for which there is room, may enter before `first`, which waits for more of it.

    Backfilling (Lifka 1995, EASY) with two bounds, because nobody knows when room will come: `first` is passed for so
    long and by so many KV tokens at most. Then the engine empties until it fits.
    """
    return (
        request.priority == first.priority
        and blocked_s <= PATIENCE_S
        and passed_by_tokens + needed_kv_tokens(request) <= needed_kv_tokens(first)
    )


def refuse_impossible(request: Request, model: ModelInfo, capabilities: Capabilities) -> None:
    """Raise ValidationError (or Unsupported) for a request that this engine can never run to its end."""
    prompt_tokens, max_new_tokens = len(request.input_ids), request.stop.max_new_tokens
    if prompt_tokens == 0:
        raise ValidationError("`inputs` cannot be empty")
    if max_new_tokens < 1:
        raise ValidationError("`max_new_tokens` must be strictly positive")
    if prompt_tokens > model.max_input_tokens:
        raise ValidationError(f"`inputs` must have less than {model.max_input_tokens} tokens. Given: {prompt_tokens}")
    total_limit = min(model.max_total_tokens, model.max_batch_total_tokens)
    if prompt_tokens + max_new_tokens > total_limit:
        raise ValidationError(
            f"`inputs` tokens + `max_new_tokens` must be <= {total_limit}. "
            f"Given: {prompt_tokens} `inputs` tokens and {max_new_tokens} `max_new_tokens`"
        )
    if request.stop.min_new_tokens > max_new_tokens:
        raise ValidationError(
            f"`min_new_tokens` is {request.stop.min_new_tokens}, more than `max_new_tokens`, {max_new_tokens}"
        )
    # Those of the prompt are checked in the HTTP worker where they do not come from the tokenizer, and by each engine.
    for name, token_ids in (
        ("logit_bias", [token_id for token_id, _ in request.sampling.logit_bias]),
        ("stop_token_ids", request.stop.stop_token_ids),
    ):
        unknown = model.unknown_token(token_ids)
        if unknown is not None:
            raise ValidationError(f"`{name}` has token id {unknown}; this model knows 0 to {model.vocab_size - 1}")
    refuse_unsupported(request, capabilities)
