"""What a request must keep to so that any sampler can serve it."""

from __future__ import annotations

from array import array

import numpy as np

from tgi_gateway.errors import ValidationError
from tgi_gateway.types import Request


def check_token_ids(request: Request, prompt: array[int], vocab_size: int) -> None:
    """Raise `ValidationError` for token ids that the vocabulary lacks. `prompt`, of type "i", holds `input_ids`."""
    for what, ids in (
        ("logit_bias", [token for token, _ in request.sampling.logit_bias]),
        ("stop_token_ids", request.stop.stop_token_ids),
        ("input_ids", np.frombuffer(prompt, dtype=np.intc)),
    ):
        if len(ids) and not (np.min(ids) >= 0 and np.max(ids) < vocab_size):
            raise ValidationError(f"{what} holds a token id outside 0 .. {vocab_size - 1}.")
