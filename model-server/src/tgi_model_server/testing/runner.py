"""ToyRunner: a language model of integers over a real paged store, and `toy_answer`, what it must say.

A token's "keys and values" are a hash of everything before it, read back from the page of the token before; the next
token is a hash of all of a row's pages. So a wrong, stale or missing page, a lost sampling state or a misplaced token
changes the answer. With depth 2 a step runs when it is waited for, as late as on a real chip, and the runner checks
that nothing in flight is given to somebody else meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tgi_gateway.types import NO_LOGPROB, Request
from tgi_model_server.plan import PREVIOUS_TOKEN, StepPlan, StepResult

_MASK = (1 << 64) - 1


def mix(left: int, right: int) -> int:
    """Two integers to 64 well-mixed bits (the finalizer of splitmix64)."""
    x = (left * 0x9E3779B97F4A7C15 + right + 1) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def choose(cells: Sequence[int], request: Request, output: Sequence[int], allow_eos: bool, vocab: int, eos: int) -> int:
    state = request.sampling.seed if request.sampling.do_sample else 0
    for cell in cells:
        state = mix(state, cell)
    for token in output:
        state = mix(state, token)
    token = state % vocab
    if not allow_eos and token in (eos, *request.stop.stop_token_ids):
        token = next(t for t in range(vocab) if t not in (eos, *request.stop.stop_token_ids))
    return token


def most_likely(token: int, wanted: int) -> tuple[tuple[int, float], ...]:
    """What is told as the most likely tokens where `token` is."""
    return tuple((token + n, _logprob(token + n)) for n in range(wanted))


def _logprob(token: int) -> float:
    return -1.0 - token / 8


def toy_answer(request: Request, *, vocab: int, eos: int) -> list[int]:
    """The tokens that ToyRunner generates for `request` when nothing interferes."""
    cells: list[int] = []
    for token in request.input_ids:
        cells.append(mix(cells[-1] if cells else 0, token))
    output: list[int] = []
    stop = request.stop
    while len(output) < stop.max_new_tokens:
        token = choose(cells, request, output, len(output) >= stop.min_new_tokens, vocab, eos)
        output.append(token)
        if (token == eos and not stop.ignore_eos) or token in stop.stop_token_ids:
            break
        cells.append(mix(cells[-1], token))
    return output


@dataclass(slots=True)
class _Slot:
    request: Request
    output: list[int]
    last: int = PREVIOUS_TOKEN


@dataclass(slots=True, eq=False)
class _Output:
    """One step: done at once with depth 1, when waited for with depth 2."""

    runner: ToyRunner
    plan: StepPlan
    touched: dict[int, set[int]]
    """Page -> slots that read or write it."""
    result: StepResult | None = None
    error: Exception | None = None

    def wait(self) -> StepResult:
        self.runner.run_until(self)
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


@dataclass(slots=True)
class ToyRunner:
    """A Runner. `break_step` may return an error for a plan, which then fails instead of running.

    The error comes out of `wait`, with depth 1 or if it is a MemoryError already out of `run`.
    """

    page_size: int = 4
    num_pages: int = 64
    max_sequences: int = 8
    pipeline_depth: int = 1
    vocab: int = 50
    eos: int = 0
    break_step: Callable[[StepPlan], Exception | None] = lambda _plan: None
    steps: int = 0
    largest_step: int = 0
    """Tokens."""
    _store: list[int] = field(default_factory=list)
    _slots: dict[int, _Slot] = field(default_factory=dict)
    _admitted: set[int] = field(default_factory=set)
    _stream: deque[_Output | Callable[[], None]] = field(default_factory=deque)
    """What the chip has been told and has not done yet, in order."""

    def __post_init__(self) -> None:
        self._store = [mix(7, cell) for cell in range(self.num_pages * self.page_size)]

    def admit(self, slot: int, request: Request, output_ids: Sequence[int], constraint: object = None) -> None:
        assert constraint is None, "a toy has no words"
        assert slot not in self._admitted
        self._admitted.add(slot)
        state = _Slot(request, list(output_ids))
        self._tell(lambda: self._slots.__setitem__(slot, state))

    def release(self, slot: int) -> None:
        self._admitted.remove(slot)
        for told in self._stream:
            assert not isinstance(told, _Output) or slot not in told.plan.slots, "the slot is in flight"
        self._tell(lambda: self._slots.__delitem__(slot))

    def run(self, plan: StepPlan) -> _Output:
        plan = StepPlan(
            list(plan.slots),
            list(plan.query_lens),
            list(plan.kv_lens),
            [list(pages) for pages in plan.pages],
            list(plan.token_ids),
            list(plan.sample_rows),
            list(plan.allow_eos),
            list(plan.output_lens),
            {row: list(targets) for row, targets in plan.prompt_targets.items()},
            dict(plan.prompt_top),
        )
        self.steps += 1
        self.largest_step = max(self.largest_step, plan.num_tokens)
        output = _Output(self, plan, self._check(plan), error=self.break_step(plan))
        if output.error is not None and (self.pipeline_depth == 1 or isinstance(output.error, MemoryError)):
            raise output.error
        self._tell(output)
        return output

    def run_until(self, output: _Output) -> None:
        """Let the chip work off what it was told, up to and including `output`."""
        while output in self._stream:
            told = self._stream.popleft()
            if not isinstance(told, _Output):
                told()
            elif told.error is None:
                told.result = self._run(told.plan)

    def _tell(self, told: _Output | Callable[[], None]) -> None:
        self._stream.append(told)
        if self.pipeline_depth == 1:
            while self._stream:
                first = self._stream.popleft()
                if not isinstance(first, _Output):
                    first()
                elif first.error is None:
                    first.result = self._run(first.plan)

    def _check(self, plan: StepPlan) -> dict[int, set[int]]:
        """Assert that the plan is well formed and writes no page that another sequence uses in a step in flight."""
        rows = len(plan.slots)
        assert 0 < rows == len(plan.query_lens) == len(plan.kv_lens) == len(plan.pages)
        assert len(set(plan.slots)) == rows
        assert set(plan.slots) <= self._admitted
        assert sum(plan.query_lens) == len(plan.token_ids)
        assert min(plan.query_lens) >= 1
        assert plan.sample_rows == sorted(set(plan.sample_rows))
        assert len(plan.sample_rows) == len(plan.allow_eos) == len(plan.output_lens)
        touched: dict[int, set[int]] = {}
        writers: dict[int, int] = {}
        for slot, query, kv, pages in zip(plan.slots, plan.query_lens, plan.kv_lens, plan.pages, strict=True):
            assert kv <= len(pages) * self.page_size
            assert all(0 < page < self.num_pages for page in pages)
            assert len(set(pages)) == len(pages)
            for page in pages:
                touched.setdefault(page, set()).add(slot)
            for position in range(kv - query, kv):
                assert writers.setdefault(pages[position // self.page_size], slot) == slot, "two rows write one page"
        for page, writer in writers.items():
            assert touched[page] == {writer}, "a row reads a page that another row of this step writes"
            for told in self._stream:
                if isinstance(told, _Output):
                    assert told.touched.get(page, {writer}) == {writer}, "a page in flight has a new owner"
        return touched

    def _run(self, plan: StepPlan) -> StepResult:
        store, size, result = self._store, self.page_size, StepResult([], [])
        targets, at = plan.cache_slots(size), 0
        sampled = {row: index for index, row in enumerate(plan.sample_rows)}
        for row, (slot, query, kv, pages) in enumerate(
            zip(plan.slots, plan.query_lens, plan.kv_lens, plan.pages, strict=True)
        ):
            state = self._slots[slot]
            start = kv - query
            previous = store[pages[(start - 1) // size] * size + (start - 1) % size] if start else 0
            for token, cell in zip(plan.token_ids[at : at + query], targets[at : at + query], strict=True):
                previous = mix(previous, state.last if token == PREVIOUS_TOKEN else token)
                store[cell] = previous
            at += query
            following = plan.prompt_targets.get(row)
            if following is not None:
                result.prompt_logprobs[row] = [_logprob(token) for token in following]
                if row in plan.prompt_top:
                    result.prompt_top[row] = [most_likely(token, plan.prompt_top[row]) for token in following]
            if row not in sampled:
                continue
            index = sampled[row]
            assert plan.output_lens[index] == len(state.output)
            cells = [store[pages[position // size] * size + position % size] for position in range(kv)]
            token = choose(cells, state.request, state.output, plan.allow_eos[index], self.vocab, self.eos)
            state.last = token
            state.output.append(token)
            result.token_ids.append(token)
            result.logprobs.append(_logprob(token) if state.request.logprobs else NO_LOGPROB)
            if state.request.top_n_tokens:
                result.top[index] = most_likely(token, state.request.top_n_tokens)
        return result
