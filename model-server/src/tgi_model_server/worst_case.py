"""The largest steps that an engine's limits allow, run once to see how much memory they need beside weights and pages.

All their pages are page 0, which belongs to nobody, so that a pool of one page is enough for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tgi_gateway.types import Request, SamplingParams, StopRules
from tgi_model_server.device import StepLimits
from tgi_model_server.plan import StepPlan
from tgi_model_server.runner import Runner

_EVERYTHING = SamplingParams(
    do_sample=True,
    temperature=0.7,
    top_k=50,
    top_p=0.9,
    min_p=0.01,
    typical_p=0.9,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    presence_penalty=0.1,
)
_TOP_TOKENS = 5
_ALIKE, _NEW_TOKENS = 8, 16
"""Prompts that begin alike, and the new tokens of each."""
_BESIDE = ((1, 1024), (1, 1 << 30), (4, 1 << 30), (128, 1 << 30))
"""Rows that decode beside a prompt, and the length of all: kernels differ by how much keys are split."""


def run_largest_steps(runner: Runner, limits: StepLimits, *, samples: bool, plain: bool = False) -> None:
    """All of `largest_plans`, every row with all that a request may ask for, or nothing if `plain`.

    `samples`: this rank does.
    """
    slots = range(limits.max_rows)
    if samples:
        sampling, top = (SamplingParams(), 0) if plain else (_EVERYTHING, _TOP_TOKENS)
        for slot in slots:
            request = Request(slot, (0,), sampling, StopRules(2), logprobs=not plain, top_n_tokens=top)
            runner.admit(slot, request, ())
    for plan in largest_plans(limits, runner.page_size):
        runner.run(plan).wait()
    if samples:
        for slot in slots:
            runner.release(slot)


def largest_plans(limits: StepLimits, page_size: int) -> Iterator[StepPlan]:
    """One with as many new tokens as fit, the log-probabilities of its prompts too; one in which all rows decode. Then
    what is not much, but a device may have kernels for it, which nobody should wait for later: the longest prompts that
    begin alike, and rows that decode beside a prompt.
    """
    for tokens, scored in ((limits.max_tokens, True), (limits.max_rows, False)):
        rows: list[tuple[int, int]] = []
        left = tokens
        for row in range(limits.max_rows):
            waiting = limits.max_rows - row - 1
            new = min(limits.max_kv_len, left - waiting)
            left -= new
            # One row is as long as any may become, which decides how wide the tables of pages are.
            rows.append((new, limits.max_kv_len if not waiting else new))
        yield _plan(rows, page_size, scored=scored)
    new = min(_NEW_TOKENS, limits.max_kv_len, limits.max_tokens)
    yield _plan([(new, limits.max_kv_len)] * min(_ALIKE, limits.max_rows, limits.max_tokens // new), page_size)
    several = {(min(rows, limits.max_rows - 1), min(length, limits.max_kv_len)) for rows, length in _BESIDE}
    for beside, length in sorted(several):
        if beside and beside + new <= limits.max_tokens:
            yield _plan([(1, length)] * beside + [(new, length)], page_size)


def _plan(rows: Sequence[tuple[int, int]], page_size: int, *, scored: bool = False) -> StepPlan:
    """Rows of (new tokens, length), all on page 0; with `scored` log-probabilities of all prompts."""
    plan = StepPlan()
    for row, (new, length) in enumerate(rows):
        plan.slots.append(row)
        plan.query_lens.append(new)
        plan.kv_lens.append(length)
        plan.pages.append([0] * -(-length // page_size))
        plan.token_ids.extend([0] * new)
        plan.sample_rows.append(row)
        plan.allow_eos.append(True)
        plan.output_lens.append(1)
        if scored and new > 1:
            plan.prompt_targets[row] = [0] * (new - 1)
    return plan
