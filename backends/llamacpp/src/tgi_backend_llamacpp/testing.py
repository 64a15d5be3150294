"""A language model of integers over what llama.cpp offers: cells that belong to sequences, found by position.

A token's cell is a hash of everything before it, read back from the cells of its own sequence. So a wrong, stale or
missing cell changes the answer, which `toy_answer` knows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from tgi_backend_llamacpp.sequences import Saved, SequenceMap
from tgi_gateway.types import NO_LOGPROB, Request
from tgi_model_server.kv.pages import PageAllocator
from tgi_model_server.kv.prefix import PrefixCache
from tgi_model_server.plan import StepPlan, StepResult
from tgi_model_server.testing.runner import choose, mix, most_likely


class CellStore:
    """`native.Context`, in Python: sequence -> position -> the hash that is kept there, as a list to share."""

    def __init__(self, cells: int, sequences: int) -> None:
        self.cells = cells
        self.saves = self.loads = 0
        self.sequences: list[dict[int, list[int]]] = [{} for _ in range(sequences)]
        self.most_used = 0

    @property
    def used(self) -> int:
        return len({id(cell) for sequence in self.sequences for cell in sequence.values()})

    def copy(self, source: int, target: int, begin: int, end: int) -> None:
        for position in range(begin, end):
            if position in self.sequences[source]:
                assert position not in self.sequences[target], "a sequence has one cell for a position"
                self.sequences[target][position] = self.sequences[source][position]

    def remove(self, sequence: int, begin: int = -1, end: int = -1) -> None:
        held = self.sequences[sequence]
        for position in [p for p in held if (begin < 0 or p >= begin) and (end < 0 or p < end)]:
            del held[position]

    def save(self, sequence: int) -> Saved:
        self.saves += 1
        text = json.dumps([(position, cell[0]) for position, cell in self.sequences[sequence].items()])
        return np.frombuffer(text.encode(), np.uint8)

    def load(self, sequence: int, saved: Saved) -> None:
        assert not self.sequences[sequence]
        self.loads += 1
        self.sequences[sequence].update((position, [value]) for position, value in json.loads(saved.tobytes()))
        self._count()

    def clear(self) -> None:
        for sequence in self.sequences:
            sequence.clear()

    def decode(self, sequence: int, position: int, token: int) -> None:
        held = self.sequences[sequence]
        assert position == max(held, default=-1) + 1, "positions follow each other"
        assert len(held) == position, "no position is missing before"
        before = held[position - 1][0] if position else 0
        held[position] = [mix(before, token)]
        self._count()

    def _count(self) -> None:
        self.most_used = max(self.most_used, self.used)
        assert self.most_used <= self.cells, "no room in the KV cache"

    def row(self, sequence: int) -> list[int]:
        held = self.sequences[sequence]
        return [held[position][0] for position in range(len(held))]


class CellRunner:
    """A Runner that holds its pages in a `CellStore` by way of a `SequenceMap`."""

    pipeline_depth = 1

    def __init__(self, *, page_size: int, num_pages: int, max_sequences: int, max_saved: int | None = None) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.max_sequences = max_sequences
        self.vocab, self.eos = 50, 0
        self.store = CellStore((num_pages - 1) * page_size, max_sequences + 1)
        self.map = SequenceMap(self.store, page_size, max_sequences, max_saved)
        self._slots: dict[int, tuple[Request, list[int]]] = {}

    def attach(self, pages: PageAllocator, prefix: PrefixCache | None) -> None:
        self.map.attach(pages, prefix)

    def admit(self, slot: int, request: Request, output_ids: Sequence[int], constraint: object = None) -> None:
        assert constraint is None
        self._slots[slot] = (request, list(output_ids))

    def release(self, slot: int) -> None:
        del self._slots[slot]
        self.map.release(slot)
        self.map.check()

    def run(self, plan: StepPlan) -> _Done:
        starts = [kv_len - query_len for kv_len, query_len in zip(plan.kv_lens, plan.query_lens, strict=True)]
        self.map.prepare(plan.slots, starts, plan.pages)
        self.map.check()
        at = 0
        result = StepResult([], [])
        for row, (slot, start, query_len) in enumerate(zip(plan.slots, starts, plan.query_lens, strict=True)):
            for place in range(query_len):
                self.store.decode(slot, start + place, plan.token_ids[at + place])
            at += query_len
            if row in plan.prompt_targets:
                result.prompt_logprobs[row] = [-1.0] * len(plan.prompt_targets[row])
            if row in plan.prompt_top:
                result.prompt_top[row] = [most_likely(each, plan.prompt_top[row]) for each in plan.prompt_targets[row]]
        for row, allow_eos in zip(plan.sample_rows, plan.allow_eos, strict=True):
            request, output = self._slots[plan.slots[row]]
            cells = self.store.row(plan.slots[row])
            token = choose(cells, request, output, allow_eos, self.vocab, self.eos)
            output.append(token)
            result.token_ids.append(token)
            result.logprobs.append(NO_LOGPROB)
        return _Done(result)


class _Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result
