"""The queue against a sorted list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tgi_gateway.host.queue import Queue, Ticket
from tgi_gateway.types import Request, SamplingParams, StopRules


def ticket(number: int, priority: int = 0) -> Ticket:
    request = Request(number, (1,), SamplingParams(), StopRules(1), priority=priority)
    return Ticket(request, number, arrived_at=float(number))


def test_lower_priority_enters_first_and_equals_in_order_of_arrival() -> None:
    queue = Queue()
    for number, priority in enumerate([5, 0, 5, -1, 0]):
        queue.add(ticket(number, priority))
    assert [queue.pop().number for _ in range(5)] == [3, 1, 4, 0, 2]


def test_a_cancelled_ticket_never_comes_out() -> None:
    queue = Queue()
    for number in range(3):
        queue.add(ticket(number))
    taken = queue.cancel(0)
    assert taken is not None
    assert taken.number == 0
    assert queue.cancel(0) is None
    assert 0 not in queue
    assert len(queue) == 2
    assert [queue.pop().number for _ in range(2)] == [1, 2]
    assert queue.peek() is None


def test_cancelled_prompts_are_not_kept_while_others_wait() -> None:
    queue = Queue()
    queue.add(ticket(0))
    for number in range(1, 1000):
        queue.add(ticket(number))
        queue.cancel(number)
    assert len(queue._heap) < 32
    assert queue.pop().number == 0


def test_clear_returns_the_living_in_order() -> None:
    queue = Queue()
    for number, priority in enumerate([1, 0, 1]):
        queue.add(ticket(number, priority))
    queue.cancel(0)
    assert [each.number for each in queue.clear()] == [1, 2]
    assert len(queue) == 0
    assert queue.peek() is None


@given(
    st.lists(st.one_of(st.tuples(st.just("add"), st.integers(-2, 2)), st.sampled_from(["pop", "cancel"]))), st.data()
)
def test_it_behaves_as_a_list_sorted_by_priority_and_arrival(
    actions: list[tuple[str, int] | str], data: st.DataObject
) -> None:
    queue, model = Queue(), list[tuple[int, int]]()
    for number, action in enumerate(actions):
        if isinstance(action, tuple):
            queue.add(ticket(number, action[1]))
            model = sorted([*model, (action[1], number)])
        elif action == "pop" and model:
            assert queue.pop().number == model.pop(0)[1]
        elif action == "cancel" and model:
            victim = data.draw(st.sampled_from(model))
            model.remove(victim)
            assert queue.cancel(victim[1]) is not None
        first = queue.peek()
        assert (first.number if first else None) == (model[0][1] if model else None)
        assert len(queue) == len(model)
    assert [each.number for each in queue.clear()] == [number for _, number in model]
