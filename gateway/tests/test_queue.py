"""The queue: against a sorted list, and fair between tenants."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tgi_gateway.host.queue import Queue, Ticket
from tgi_gateway.types import Request, SamplingParams, StopRules


def ticket(number: int, priority: int = 0, tenant: str = "", prompt_tokens: int = 1) -> Ticket:
    request = Request(number, (1,) * prompt_tokens, SamplingParams(), StopRules(1), priority=priority, tenant=tenant)
    return Ticket(request, number, arrived_at=float(number))


def pop(queue: Queue) -> Ticket:
    first = queue.peek()
    assert first is not None
    queue.take(first)
    return first


def test_lower_priority_enters_first_and_equals_in_order_of_arrival() -> None:
    queue = Queue()
    for number, priority in enumerate([5, 0, 5, -1, 0]):
        queue.add(ticket(number, priority))
    assert [pop(queue).number for _ in range(5)] == [3, 1, 4, 0, 2]


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
    assert [pop(queue).number for _ in range(2)] == [1, 2]
    assert queue.peek() is None


def test_waiting_prompt_tokens_are_counted_however_tickets_leave() -> None:
    queue = Queue()
    for number in range(4):
        queue.add(ticket(number, prompt_tokens=10 + number))
    assert queue.prompt_tokens == 46
    pop(queue)
    queue.cancel(2)
    assert queue.prompt_tokens == 24
    queue.clear()
    assert queue.prompt_tokens == 0


def test_tenants_take_turns_by_the_tokens_they_were_served() -> None:
    queue = Queue()
    for number in range(6):
        queue.add(ticket(number, tenant="many", prompt_tokens=10))
    queue.add(ticket(6, tenant="few", prompt_tokens=10))
    queue.add(ticket(7, tenant="few", prompt_tokens=30))
    queue.add(ticket(8, tenant="few", prompt_tokens=10))
    assert [pop(queue).number for _ in range(9)] == [0, 6, 1, 7, 2, 3, 4, 8, 5]


def test_output_counts_and_priority_comes_before_fairness() -> None:
    queue = Queue()
    for number, (tenant, priority) in enumerate([("a", 0), ("b", 0), ("a", 1), ("b", -1)]):
        queue.add(ticket(number, priority, tenant))
    queue.charge("a", 100)
    assert [pop(queue).number for _ in range(4)] == [3, 1, 0, 2]


def test_a_pause_saves_nothing_up() -> None:
    queue = Queue()
    queue.add(ticket(0, tenant="steady", prompt_tokens=1000))
    pop(queue)
    queue.add(ticket(1, tenant="steady", prompt_tokens=10))
    queue.add(ticket(2, tenant="steady", prompt_tokens=10))
    queue.add(ticket(3, tenant="back", prompt_tokens=10))
    queue.add(ticket(4, tenant="back", prompt_tokens=10))
    assert [pop(queue).number for _ in range(4)] == [1, 3, 2, 4]


def test_those_that_are_passed_over_keep_their_place() -> None:
    queue = Queue()
    for number in range(3):
        queue.add(ticket(number))
    second = queue.peek({0})
    assert second is not None
    queue.take(second)
    assert [pop(queue).number for _ in range(2)] == [0, 2]
    assert queue.peek() is None


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
            assert pop(queue).number == model.pop(0)[1]
        elif action == "cancel" and model:
            victim = data.draw(st.sampled_from(model))
            model.remove(victim)
            assert queue.cancel(victim[1]) is not None
        first = queue.peek()
        assert (first.number if first else None) == (model[0][1] if model else None)
        assert len(queue) == len(model)
    assert [each.number for each in queue.clear()] == [number for _, number in model]
