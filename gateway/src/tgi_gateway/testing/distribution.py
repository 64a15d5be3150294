"""A next-token distribution without a model: one expected token, and less and less likely ones after it.

The token d places after the expected one (mod vocabulary) has logit ``SPREAD - min(d, SPREAD)``.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from tgi_gateway.types import SamplingParams

SPREAD = 32


def logprob(expected: int, token_id: int, vocab_size: int) -> float:
    """Log-softmax of the raw logits at `token_id`."""
    distance = (token_id - expected) % vocab_size
    return SPREAD - min(distance, SPREAD) - _log_normaliser(vocab_size)


def most_likely(expected: int, n: int, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """The `n` most likely tokens with their log-probabilities, most likely first."""
    tokens = [(expected + distance) % vocab_size for distance in range(min(n, vocab_size))]
    return tuple((token_id, logprob(expected, token_id, vocab_size)) for token_id in tokens)


def expected_in_prompt(prompt: Sequence[int]) -> list[int]:
    """What an echo expects after each of the prompt's beginnings but the whole: that the text so far goes round.

    Element i is the token after the longest proper beginning of ``prompt[: i + 1]`` that is also its end (the failure
    function of Knuth, Morris and Pratt 1977), so that an answer read back is as likely as when it was written.
    """
    borders = [0]
    for at in range(1, len(prompt) - 1):
        border = borders[-1]
        while border and prompt[at] != prompt[border]:
            border = borders[border - 1]
        borders.append(border + (prompt[at] == prompt[border]))
    return [prompt[border] for border in borders[: len(prompt) - 1]]


def choose(
    expected: int,
    vocab_size: int,
    sampling: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    banned: Sequence[int] = (),
) -> int:
    """The next token: logit bias, penalties, temperature, top-k, top-p, min-p, then the arg-max or a draw.

    Only the `SPREAD` most likely tokens and the biased ones are looked at; the others' share is below one in a billion.
    """
    if not sampling.do_sample and expected not in banned and not _has_penalty(sampling) and not sampling.logit_bias:
        return expected
    logits = {
        (expected + distance) % vocab_size: float(SPREAD - min(distance, SPREAD))
        for distance in range(min(SPREAD + len(banned) + len(sampling.logit_bias), vocab_size))
    }
    for token_id, bias in sampling.logit_bias:
        logits[token_id] = bias + SPREAD - min((token_id - expected) % vocab_size, SPREAD)
    for token_id in banned:
        logits.pop(token_id, None)
    _penalise(logits, sampling, prompt, output)
    ranked = sorted(logits.items(), key=lambda item: -item[1])
    if not sampling.do_sample:
        return ranked[0][0]
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    weights = [math.exp((logit - ranked[0][1]) / sampling.temperature) for _, logit in ranked]
    weights = [weight for weight in weights if weight >= sampling.min_p]
    mass, kept, total = 0.0, 0, sum(weights)
    while kept < len(weights) and (kept == 0 or mass < sampling.top_p * total):
        mass += weights[kept]
        kept += 1
    # Seeded by position, not by a running state: who else is in the batch cannot matter.
    draw = random.Random((sampling.seed << 32) | len(output))
    return draw.choices(ranked[:kept], weights[:kept])[0][0]


def _has_penalty(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or bool(sampling.frequency_penalty or sampling.presence_penalty)


def _penalise(logits: dict[int, float], sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> None:
    if sampling.repetition_penalty != 1.0:
        for token_id in {*prompt, *output} & logits.keys():
            logit = logits[token_id]
            logits[token_id] = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
    if sampling.frequency_penalty or sampling.presence_penalty:
        for token_id, count in Counter(output).items():
            if token_id in logits:
                logits[token_id] -= sampling.frequency_penalty * count + sampling.presence_penalty


@lru_cache(maxsize=16)
def _log_normaliser(vocab_size: int) -> float:
    near = sum(math.exp(SPREAD - distance) for distance in range(min(SPREAD, vocab_size)))
    return math.log(near + max(0, vocab_size - SPREAD))
