"""Static shapes: which bucket a step runs in, and the padding that fills it."""

from __future__ import annotations

from collections.abc import Iterable

from tgi_model_server.device import Bucket
from tgi_model_server.plan import StepPlan


def choose_bucket(plan: StepPlan, buckets: Iterable[Bucket]) -> Bucket | None:
    """The smallest bucket that holds `plan`; None if none does.

    Spare tokens need a padding row to belong to. Where a bucket is for decoding only, every padding row has a token;
    elsewhere it may have none.
    """
    best: Bucket | None = None
    for bucket in buckets:
        rows, tokens = bucket.num_rows - len(plan.slots), bucket.num_tokens - plan.num_tokens
        only_decode = bucket.num_tokens == bucket.num_rows
        fits = rows == tokens == 0 or (0 < rows <= tokens if only_decode else rows > 0 and tokens >= 0)
        if fits and (best is None or (bucket.num_tokens, bucket.num_rows) < (best.num_tokens, best.num_rows)):
            best = bucket
    return best


def pad_plan(plan: StepPlan, bucket: Bucket, page_size: int) -> StepPlan:
    """`plan` with padding rows at its end, which write to page 0 and are not sampled; some may have no tokens."""
    rows, tokens = bucket.num_rows - len(plan.slots), bucket.num_tokens - plan.num_tokens
    lens = [tokens // rows + (row < tokens % rows) for row in range(rows)] if rows else []
    return StepPlan(
        slots=plan.slots + [0] * rows,
        query_lens=plan.query_lens + lens,
        kv_lens=plan.kv_lens + lens,
        pages=[*plan.pages, *([0] * -(-size // page_size) for size in lens)],
        token_ids=plan.token_ids + [0] * tokens,
        sample_rows=plan.sample_rows,
        allow_eos=plan.allow_eos,
        output_lens=plan.output_lens,
        prompt_targets=plan.prompt_targets,
        prompt_top=plan.prompt_top,
    )
