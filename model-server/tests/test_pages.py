"""The page allocator against a set, and its own alarm."""

import random

import pytest

from tgi_model_server.kv.pages import PADDING_PAGE, PageAllocator


def test_every_page_but_the_padding_page_is_given_out_once() -> None:
    allocator = PageAllocator(10)
    assert allocator.total == allocator.free_pages == 9
    assert sorted(allocator.take(9)) == list(range(1, 10))
    assert allocator.free_pages == 0


@pytest.mark.parametrize("seed", range(5))
def test_random_takes_and_gives_never_lose_or_double_a_page(seed: int) -> None:
    draw = random.Random(seed)
    allocator = PageAllocator(50)
    held: list[list[int]] = []
    for _ in range(500):
        if held and draw.random() < 0.5:
            allocator.give(held.pop(draw.randrange(len(held))))
        else:
            count = draw.randint(0, min(12, allocator.free_pages))
            taken = allocator.take(count)
            assert len(taken) == count
            held.append(taken)
        allocator.check(*held)
        assert allocator.free_pages + sum(map(len, held)) == allocator.total


def test_check_tells_a_page_with_two_owners_one_with_none_and_a_foreign_one() -> None:
    allocator = PageAllocator(5)
    taken = allocator.take(2)
    with pytest.raises(AssertionError, match="without owner"):
        allocator.check()
    with pytest.raises(AssertionError, match="two owners"):
        allocator.check(taken, taken[:1])
    with pytest.raises(AssertionError, match="not ours"):
        allocator.check(taken, [PADDING_PAGE])
    allocator.give([*taken, taken[0]])
    with pytest.raises(AssertionError, match="two owners"):
        allocator.check()


def test_a_pool_without_a_usable_page_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        PageAllocator(1)
