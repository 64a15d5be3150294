"""The batched sampler against a dumb one that treats one row at a time in plain Python."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from tgi_gateway.types import Request, SamplingParams, StopRules
from tgi_model_server.plan import StepPlan
from tgi_model_server.sampling import filters
from tgi_model_server.sampling.sampler import Sampler
from tgi_model_server.sampling.uniform import uniform

VOCABULARY, EOS, SLOTS = 40, 1, 12


def softmax(logits: Sequence[float]) -> list[float]:
    highest = max(logits)
    weights = [math.exp(value - highest) for value in logits]
    return [weight / sum(weights) for weight in weights]


def dumb_distribution(request: Request, output: Sequence[int], logits: Sequence[float], allow_eos: bool) -> list[float]:
    """Probabilities that the next token is drawn from; a greedy request's are 0 or 1. Clear, not fast."""
    sampling, out = request.sampling, list(logits)
    for token, bias in sampling.logit_bias:
        out[token] += bias
    for token in {*request.input_ids, *output}:
        out[token] = (
            out[token] / sampling.repetition_penalty if out[token] > 0 else out[token] * sampling.repetition_penalty
        )
    for token, count in Counter(output).items():
        out[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    if not allow_eos:
        for token in (EOS, *request.stop.stop_token_ids):
            out[token] = -math.inf
    if not sampling.do_sample:
        best = out.index(max(out))
        return [float(token == best) for token in range(VOCABULARY)]
    out = [value / sampling.temperature for value in out]
    if sampling.top_k:
        smallest = sorted(out, reverse=True)[min(sampling.top_k, VOCABULARY) - 1]
        out = [value if value >= smallest else -math.inf for value in out]
    if sampling.top_p < 1:
        probabilities, total, keep = softmax(out), 0.0, set[int]()
        for token in sorted(range(VOCABULARY), key=lambda token: -probabilities[token]):
            if keep and total >= sampling.top_p:
                break
            keep.add(token)
            total += probabilities[token]
        out = [value if token in keep else -math.inf for token, value in enumerate(out)]
    if sampling.min_p:
        probabilities = softmax(out)
        least = sampling.min_p * max(probabilities)
        out = [value if p >= least else -math.inf for value, p in zip(out, probabilities, strict=True)]
    if sampling.typical_p < 1:
        probabilities = softmax(out)
        entropy = -sum(p * math.log(p) for p in probabilities if p)
        distance = [abs(-math.log(p) - entropy) if p else math.inf for p in probabilities]
        total, last = 0.0, 0.0
        for token in sorted(range(VOCABULARY), key=lambda token: distance[token]):
            last = distance[token]
            total += probabilities[token]
            if total >= sampling.typical_p:
                break
        out = [value if far <= last else -math.inf for value, far in zip(out, distance, strict=True)]
    return softmax(out)


def dumb_draw(probabilities: Sequence[float], number: float) -> int:
    total = 0.0
    for token, probability in enumerate(probabilities):
        total += probability
        if total > number and probability:
            return token
    return max(token for token, probability in enumerate(probabilities) if probability)


def near_a_border(probabilities: Sequence[float], number: float) -> bool:
    """Whether rounding alone could decide the draw."""
    total = 0.0
    for probability in probabilities:
        total += probability
        if abs(total - number) < 1e-5:
            return True
    return False


def random_sampling(rng: random.Random) -> SamplingParams:
    def maybe(value: float, neutral: float) -> float:
        return value if rng.random() < 0.4 else neutral

    return SamplingParams(
        do_sample=rng.random() < 0.7,
        temperature=maybe(rng.uniform(0.3, 2.0), 1.0),
        top_k=int(maybe(rng.randrange(1, 60), 0)),
        top_p=maybe(rng.uniform(0.1, 0.99), 1.0),
        min_p=maybe(rng.uniform(0.01, 0.5), 0.0),
        typical_p=maybe(rng.uniform(0.2, 0.95), 1.0),
        seed=rng.getrandbits(64),
        repetition_penalty=maybe(rng.uniform(0.8, 1.8), 1.0),
        frequency_penalty=maybe(rng.uniform(-1, 1), 0.0),
        presence_penalty=maybe(rng.uniform(-1, 1), 0.0),
        logit_bias=((rng.randrange(VOCABULARY), rng.uniform(-5, 5)),) if rng.random() < 0.3 else (),
    )


def make_sampler() -> Sampler:
    return Sampler(vocab_size=VOCABULARY, max_sequences=SLOTS, eos_token_ids=[EOS], device=torch.device("cpu"))


def make_request(sampling: SamplingParams, *, prompt: Sequence[int] = (2, 3), **others: object) -> Request:
    stop = StopRules(8, stop_token_ids=(7,))
    return Request(1, tuple(prompt), sampling, stop, **others)  # type: ignore[arg-type]


def plan_of(slots: Sequence[int], output_lens: Sequence[int], allow_eos: Sequence[bool] | None = None) -> StepPlan:
    rows = len(slots)
    return StepPlan(
        slots=list(slots),
        query_lens=[1] * rows,
        sample_rows=list(range(rows)),
        allow_eos=list(allow_eos or [True] * rows),
        output_lens=list(output_lens),
    )


@pytest.mark.parametrize("seed", range(25))
def test_every_row_is_chosen_as_the_dumb_sampler_chooses_it(seed: int) -> None:
    rng = random.Random(seed)
    sampler, outputs, requests = make_sampler(), dict[int, list[int]](), dict[int, Request]()
    for step in range(12):
        for slot in range(SLOTS):
            if slot not in requests and rng.random() < 0.5:
                prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 9))]
                outputs[slot] = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(4))]
                requests[slot] = make_request(random_sampling(rng), prompt=prompt)
                sampler.admit(slot, requests[slot], outputs[slot])
            elif slot in requests and rng.random() < 0.15:
                sampler.release(slot)
                del requests[slot]
        slots = [slot for slot in rng.sample(sorted(requests), len(requests)) if rng.random() < 0.8]
        if not slots:
            continue
        allow_eos = [rng.random() < 0.5 for _ in slots]
        logits = torch.randn(len(slots), VOCABULARY, generator=torch.Generator().manual_seed(seed * 100 + step)) * 3
        sampled = sampler.sample(logits.clone(), plan_of(slots, [len(outputs[slot]) for slot in slots], allow_eos))
        tokens = sampled.tokens.tolist()
        for row, slot in enumerate(slots):
            request = requests[slot]
            wanted = dumb_distribution(request, outputs[slot], logits[row].tolist(), allow_eos[row])
            number = uniform(request.sampling.seed, len(outputs[slot]))
            if not request.sampling.do_sample or not near_a_border(wanted, number):
                assert tokens[row] == dumb_draw(wanted, number), request.sampling
            outputs[slot].append(tokens[row])
            assert int(sampler.last_tokens[slot]) == tokens[row]


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_depends_on_seed_and_index_but_not_on_the_other_rows(seed: int) -> None:
    rng = random.Random(seed)
    mine = make_request(SamplingParams(do_sample=True, temperature=1.3, top_p=0.95, seed=seed))
    logits = torch.randn(SLOTS, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    alone = make_sampler()
    alone.admit(3, mine, [])
    expected = int(alone.sample(logits[:1].clone(), plan_of([3], [5])).tokens)
    crowd = make_sampler()
    for slot in range(SLOTS):
        crowd.admit(slot, mine if slot == 8 else make_request(random_sampling(rng)), [])
    order = [8, *(slot for slot in range(SLOTS) if slot != 8)]
    assert int(crowd.sample(logits.clone(), plan_of(order, [5] * SLOTS)).tokens[0]) == expected


@pytest.mark.parametrize("seed", range(10))
def test_a_few_candidates_give_the_same_choice_as_sorting_a_large_vocabulary(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.tensor([[0.1], [1.0], [3.0], [9.0]])
    logits = torch.randn(4, 5000, generator=generator) * sharpness
    mass = torch.rand(4, 1, generator=generator) * 0.98 + 0.01
    for kind in (filters.top_p, filters.typical_p):
        quick, sorted_ = kind(logits, mass, peek=True), kind(logits, mass, peek=False)
        assert torch.equal(quick, sorted_)
        assert torch.equal(quick[1:2], kind(logits[1:2], mass[1:2], peek=True))
        kept = quick.isfinite().sum(-1)
        assert kept[0] > 256 or kept[3] < 256


def test_a_draw_never_hits_an_impossible_token_at_the_borders_of_the_numbers() -> None:
    logits = torch.full((3, 1000), -math.inf)
    logits[0, [255, 256, 999]] = 0.0
    logits[1, 999] = -3.0
    logits[2, [0, 511]] = torch.tensor([0.0, -30.0])
    for number in (0.0, 2.0**-32, 1 / 3, 0.5, 2 / 3, 1 - 2.0**-32):
        drawn = filters.draw(logits, torch.full((3, 1), number, dtype=torch.float64))
        assert logits.gather(1, drawn[:, None]).isfinite().all(), number


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0] + [-math.inf] * (VOCABULARY - 4)])
    sampler, counts, draws = make_sampler(), Counter[int](), 4000
    sampler.admit(0, make_request(SamplingParams(do_sample=True, seed=11)), [])
    for index in range(draws):
        counts[int(sampler.sample(logits.clone(), plan_of([0], [index])).tokens)] += 1
    for token, probability in enumerate(softmax(logits[0, :4].tolist())):
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[token] - draws * probability) < 4 * deviation
    assert sum(counts[token] for token in range(4)) == draws


def test_uniform_numbers_are_spread_and_differ_between_neighbouring_seeds() -> None:
    numbers = [uniform(seed, index) for seed in range(40) for index in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    tenths = Counter(int(number * 10) for number in numbers)
    assert all(320 < tenths[tenth] < 480 for tenth in range(10))
    assert uniform((1 << 64) - 1, 0) != uniform(0, 0)


def test_logprobs_are_those_of_the_raw_logits_and_only_for_rows_that_asked() -> None:
    sampler = make_sampler()
    sampling = SamplingParams(do_sample=True, temperature=0.2, top_k=1, logit_bias=((9, 100.0),))
    sampler.admit(0, make_request(SamplingParams()), [])
    sampler.admit(1, make_request(sampling, logprobs=True), [])
    sampler.admit(2, make_request(SamplingParams(), top_n_tokens=3), [])
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))
    sampled = sampler.sample(logits.clone(), plan_of([0, 1, 2], [0, 0, 0]))
    raw = logits.log_softmax(-1)
    assert list(sampled.scored) == [1, 2]
    assert int(sampled.tokens[1]) == 9
    assert sampled.logprobs is not None
    assert sampled.top_ids is not None
    torch.testing.assert_close(sampled.logprobs, torch.stack([raw[1, 9], raw[2, sampled.tokens[2]]]))
    assert list(sampled.top_sizes) == [0, 3]
    assert sampled.top_ids[1].tolist() == raw[2].topk(3).indices.tolist()


def test_greedy_ignores_temperature_and_filters() -> None:
    sampler = make_sampler()
    sampler.admit(0, make_request(SamplingParams(temperature=5.0, top_k=3, top_p=0.1)), [])
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(4))
    assert int(sampler.sample(logits.clone(), plan_of([0], [0])).tokens) == int(logits.argmax())


def test_a_reused_slot_knows_nothing_of_the_request_before() -> None:
    heavy = SamplingParams(frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=3.0)
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(5)).abs()
    used, fresh = make_sampler(), make_sampler()
    used.admit(0, make_request(heavy, prompt=range(VOCABULARY)), list(range(20)))
    used.sample(logits.clone(), plan_of([0], [0]))
    used.release(0)
    for sampler in (used, fresh):
        sampler.admit(0, make_request(heavy), [5])
    found = [int(sampler.sample(logits.clone(), plan_of([0], [1])).tokens) for sampler in (used, fresh)]
    assert found[0] == found[1]


def test_watermark_raises_the_part_of_the_vocabulary_that_the_previous_token_decides() -> None:
    sampler = make_sampler()
    sampler.admit(0, make_request(SamplingParams(watermark=True), prompt=[4, 6]), [])
    generator = torch.Generator().manual_seed(15485863 * 6)
    green = set(torch.randperm(VOCABULARY, generator=generator)[: VOCABULARY // 2].tolist())
    logits = torch.zeros(1, VOCABULARY)
    chosen = int(sampler.sample(logits, plan_of([0], [0])).tokens)
    assert chosen in green
    assert {token for token in range(VOCABULARY) if logits[0, token] == 2.0} == green
