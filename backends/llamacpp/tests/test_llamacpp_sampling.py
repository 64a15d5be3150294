"""The sampler without torch chooses and scores as the torch engine's does."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tgi_backend_llamacpp import filters
from tgi_backend_llamacpp.sampling import Sampler
from tgi_gateway.types import Request, SamplingParams, StopRules
from tgi_model_server.plan import StepPlan
from tgi_model_server.sampling import filters as torch_filters
from tgi_model_server.sampling.sampler import Sampler as TorchSampler


def logits(seed: int, size: int) -> filters.Row:
    return (np.random.default_rng(seed).standard_normal(size) * 4).astype(np.float32)


@pytest.mark.parametrize("size", [50, 5000])
@pytest.mark.parametrize("seed", range(5))
def test_filters_keep_what_the_torch_filters_keep(seed: int, size: int) -> None:
    row = logits(seed, size)
    batch = torch.from_numpy(row)[None]
    part = torch.tensor([[0.3 + 0.1 * seed]], dtype=torch.float32)
    k = 1 + 7 * seed
    expected = {
        "top_k": torch_filters.top_k(batch, torch.tensor([[k]]), k),
        "top_p": torch_filters.top_p(batch, part, peek=True),
        "min_p": torch_filters.min_p(batch, part / 10),
        "typical_p": torch_filters.typical_p(batch, part, peek=True),
    }
    value = float(part)
    ours = {name: row.copy() for name in expected}
    filters.top_k(ours["top_k"], k)
    filters.top_p(ours["top_p"], value)
    filters.min_p(ours["min_p"], float(part / 10))
    filters.typical_p(ours["typical_p"], value)
    for name, kept in expected.items():
        assert np.isfinite(ours[name]).tolist() == torch.isfinite(kept[0]).tolist(), name
        uniform = random.Random(seed).random()
        drawn = torch_filters.draw(kept, torch.tensor([[uniform]], dtype=torch.float64))
        assert filters.draw(ours[name], uniform) == int(drawn), name


REQUESTS = [
    SamplingParams(),
    SamplingParams(do_sample=True, temperature=0.8, seed=3),
    SamplingParams(do_sample=True, temperature=1.4, top_k=30, top_p=0.9, seed=1 << 63),
    SamplingParams(do_sample=True, min_p=0.02, typical_p=0.8, seed=5, repetition_penalty=1.3),
    SamplingParams(frequency_penalty=0.7, presence_penalty=0.4, logit_bias=((7, 3.0), (9, -2.0))),
    SamplingParams(repetition_penalty=0.7),
]


def test_tokens_and_scores_are_those_of_the_torch_sampler() -> None:
    size, rows = 600, len(REQUESTS)
    ours = Sampler(size, [2])
    theirs = TorchSampler(vocab_size=size, max_sequences=rows, eos_token_ids=[2], device=torch.device("cpu"))
    for slot, sampling in enumerate(REQUESTS):
        stop = StopRules(50, min_new_tokens=3, stop_token_ids=(5,))
        one = Request(slot, (1, 7, 7, 20), sampling, stop, logprobs=True, top_n_tokens=slot % 3)
        ours.admit(slot, one, [8, 8], None)
        theirs.admit(slot, one, [8, 8])
    for step in range(30):
        plan = StepPlan(
            slots=list(range(rows)),
            query_lens=[1] * rows,
            kv_lens=[6 + step] * rows,
            sample_rows=list(range(rows)),
            allow_eos=[step > 0] * rows,
            output_lens=[2 + step] * rows,
        )
        both = np.stack([logits(100 * step + row, size) for row in range(rows)])
        expected = theirs.sample(torch.from_numpy(both.copy()), plan)
        result = ours.sample(both, plan, None)
        assert result.token_ids == expected.tokens.tolist()
        assert expected.logprobs is not None
        both[:] = np.nan  # the next step's come to the same place before anybody asks for scores
        assert list(map(float, result.logprobs)) == pytest.approx(expected.logprobs.tolist(), abs=1e-5)
        assert expected.top_ids is not None
        for row, top in result.top.items():
            assert [token for token, _ in top] == expected.top_ids[row, : len(top)].tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_ends_its_own_request_alone(value: float) -> None:
    sampler = Sampler(50, [0])
    for slot, sampling in enumerate([SamplingParams(), SamplingParams(do_sample=True, seed=1), SamplingParams()]):
        sampler.admit(slot, Request(slot, (1,), sampling, StopRules(9), logprobs=True), [], None)
    rows = np.stack([logits(row, 50) for row in range(3)])
    rows[0, 7] = rows[1, 8] = value
    plan = StepPlan(
        slots=[0, 1, 2], query_lens=[1] * 3, kv_lens=[2] * 3, pages=[[1], [2], [3]], token_ids=[1] * 3,
        sample_rows=[0, 1, 2], allow_eos=[True] * 3, output_lens=[0] * 3,
    )  # fmt: skip
    result = sampler.sample(rows, plan, None)
    assert sorted(result.endings) == [0, 1]
    assert len(result.logprobs) == 3
    assert result.token_ids[2] == int(rows[2].argmax())
    assert np.isfinite(float(result.logprobs[2]))
