"""Plans for other ranks: what is sent of a page list, and what arrives. Random histories are in `test_loop`."""

from __future__ import annotations

import pytest

from tgi_model_server.plan import StepPlan
from tgi_model_server.plan_wire import PlanDecoder, PlanEncoder


def decode_row(slot: int, pages: list[int]) -> StepPlan:
    return StepPlan([slot], [1], [len(pages)], [pages], [5], [0], [True], [1])


def test_a_list_that_grows_is_sent_once() -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    pages = list(range(1, 3001))
    first = encoder.encode(decode_row(2, pages))
    assert decoder.decode(first).pages == [pages]
    pages += [4000, 4001]
    second = encoder.encode(decode_row(2, pages))
    assert len(first) > 3000
    assert len(second) < 200
    assert decoder.decode(second).pages == [pages]
    assert decoder.decode(encoder.encode(decode_row(2, pages))).pages == [pages]


def test_another_list_in_the_slot_is_sent_whole_even_if_it_begins_alike() -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    decoder.decode(encoder.encode(decode_row(0, [1, 2, 3])))
    decoder.decode(encoder.encode(decode_row(1, [8])))
    for pages in ([1, 2, 3], [9, 8], [9, 8, 7, 6]):
        plan = StepPlan([1, 0], [1, 1], [2, 2], [pages, list(pages)], [5, 5])
        assert decoder.decode(encoder.encode(plan)).pages == [pages, pages]


def test_a_list_that_shrinks_breaks_the_word_given_in_the_plan() -> None:
    encoder = PlanEncoder()
    pages = [1, 2, 3]
    encoder.encode(decode_row(0, pages))
    pages.pop()
    with pytest.raises(AssertionError, match="only grows"):
        encoder.encode(decode_row(0, pages))
