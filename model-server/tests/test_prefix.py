"""The radix tree against a dictionary of all prefixes."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tgi_model_server.kv.pages import PageAllocator
from tgi_model_server.kv.prefix import Node, PrefixCache

PAGE = 2


def key_of(tokens: list[int]) -> bytes:
    return array("i", tokens).tobytes()


def chunks(tokens: list[int]) -> list[tuple[int, ...]]:
    """All prefixes of whole pages, shortest first."""
    return [tuple(tokens[:end]) for end in range(PAGE, len(tokens) + 1, PAGE)]


def add(
    cache: PrefixCache, allocator: PageAllocator, tokens: list[int], *, namespace: bytes = b"", step: int = 0
) -> Node:
    """Cache `tokens` as a new sequence would; the caller releases."""
    whole = len(tokens) // PAGE
    found = cache.find(key_of(tokens), whole, namespace=namespace, step=step + 1)
    node, pages = cache.use(found)
    pages = pages + allocator.take(whole - found.pages)
    below, _, left_over = cache.extend(node, found.pages, key_of(tokens), pages, namespace=namespace, step=step)
    allocator.give(left_over)
    cache.check()
    return below


@dataclass(eq=False)
class User:
    namespace: bytes
    tokens: list[int]
    pages: list[int]
    shared: int
    node: Node


class Shadow:
    """The cache beside a dictionary of all cached prefixes: every operation is done to both and compared."""

    def __init__(self, pages: int) -> None:
        self.allocator = PageAllocator(pages)
        self.cache = PrefixCache(PAGE, self.allocator)
        self.model: dict[tuple[bytes, tuple[int, ...]], int] = {}
        """(namespace, prefix) -> page of its last tokens."""
        self.forming: set[tuple[bytes, tuple[int, ...]]] = set()
        """What the current step adds."""
        self.users: list[User] = []
        self.step = 1

    def evict(self, count: int) -> None:
        idle = self.cache.idle_pages
        freed = self.cache.evict(count)
        assert freed >= min(count, idle)
        kept = set(self.cache.owned())
        gone = {key for key, page in self.model.items() if page not in kept}
        assert len(gone) == freed
        for user in self.users:
            for prefix in chunks(user.tokens)[: user.shared]:
                assert (user.namespace, prefix) not in gone, "a page in use was evicted"
        for key in gone:
            del self.model[key]
            self.forming.discard(key)

    def next_step(self) -> None:
        self.step += 1
        self.forming = set()

    def come(self, tokens: list[int], namespace: bytes) -> None:
        """A user takes the longest prefix there is, but never all of its tokens."""
        limit = (len(tokens) - 1) // PAGE
        found = self.cache.find(key_of(tokens), limit, namespace=namespace, step=self.step)
        expected: list[int] = []
        forming = False
        for prefix in chunks(tokens)[:limit]:
            page = self.model.get((namespace, prefix))
            if page is None:
                break
            if (namespace, prefix) in self.forming:
                forming = True
                break
            expected.append(page)
        assert found.pages == len(expected)
        assert found.forming == forming
        node, pages = self.cache.use(found)
        assert pages == expected
        self.users.append(User(namespace, tokens[: len(expected) * PAGE], pages, len(pages), node))

    def grow(self, which: int, tokens: list[int]) -> None:
        """A user hands over pages for `tokens` after its own, if there is room."""
        if not self.users:
            return
        user = self.users[which % len(self.users)]
        grown = user.tokens + tokens
        whole = len(grown) // PAGE
        missing = whole - user.shared - self.allocator.free_pages
        if missing > 0:
            self.evict(missing)
        if self.allocator.free_pages < whole - user.shared:
            return
        before = user.pages + self.allocator.take(whole - user.shared)
        user.tokens = grown[: whole * PAGE]
        user.node, user.pages, left_over = self.cache.extend(
            user.node, user.shared, key_of(grown), before, namespace=user.namespace, step=self.step
        )
        expected_left = []
        for at, prefix in enumerate(chunks(user.tokens)):
            place = (user.namespace, prefix)
            if place not in self.model:
                self.model[place] = before[at]
                self.forming.add(place)
            elif self.model[place] != before[at]:
                expected_left.append(before[at])
        assert left_over == expected_left
        assert user.pages == [self.model[user.namespace, prefix] for prefix in chunks(user.tokens)]
        user.shared = whole
        self.allocator.give(left_over)

    def go(self, which: int) -> None:
        if self.users:
            self.cache.release(self.users.pop(which % len(self.users)).node)

    def check(self) -> None:
        self.cache.check()
        self.allocator.check(self.cache.owned())
        assert sorted(self.model.values()) == sorted(self.cache.owned())
        used = {(user.namespace, prefix) for user in self.users for prefix in chunks(user.tokens)[: user.shared]}
        assert self.cache.idle_pages == len(self.model) - len(used)

    def end(self) -> None:
        while self.users:
            self.go(0)
        self.cache.clear()
        assert self.allocator.free_pages == self.allocator.total
        assert not self.cache.root.children


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class PrefixMachine(RuleBasedStateMachine):
    """Users come with a few tokens of a tiny alphabet, share, grow and go, in any order, in a small pool."""

    @initialize(pages=st.integers(4, 40))
    def begin(self, pages: int) -> None:
        self.shadow = Shadow(pages)

    @rule(count=st.integers(1, 10))
    def evict(self, count: int) -> None:
        self.shadow.evict(count)

    @rule()
    def next_step(self) -> None:
        self.shadow.next_step()

    @rule(tokens=TOKENS, namespace=st.sampled_from([b"", b"salt"]))
    def come(self, tokens: list[int], namespace: bytes) -> None:
        self.shadow.come(tokens, namespace)

    @rule(which=st.integers(0, 9), tokens=TOKENS)
    def grow(self, which: int, tokens: list[int]) -> None:
        self.shadow.grow(which, tokens)

    @rule(which=st.integers(0, 9))
    def go(self, which: int) -> None:
        self.shadow.go(which)

    @invariant()
    def the_books_balance(self) -> None:
        self.shadow.check()

    def teardown(self) -> None:
        if hasattr(self, "shadow"):
            self.shadow.end()


TestPrefixCacheAgainstAllPrefixes = PrefixMachine.TestCase
TestPrefixCacheAgainstAllPrefixes.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("seed", range(8))
def test_long_random_histories_agree_with_a_dictionary_of_all_prefixes(seed: int) -> None:
    draw = random.Random(seed)
    shadow = Shadow(draw.choice([8, 30, 100, 100]))
    for _ in range(600):
        tokens = [draw.randrange(2) for _ in range(draw.randint(1, 14))]
        what = draw.random()
        if what < 0.3:
            shadow.come(tokens, draw.choice([b"", b"", b"salt"]))
        elif what < 0.65:
            shadow.grow(draw.randrange(100), tokens)
        elif what < 0.85 or len(shadow.users) > 8:
            shadow.go(draw.randrange(100))
        elif what < 0.95:
            shadow.next_step()
        else:
            shadow.evict(draw.randint(1, 6))
        shadow.check()
    shadow.end()


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    allocator = PageAllocator(7)
    cache = PrefixCache(PAGE, allocator)
    old, young = [1, 1, 1, 1], [2, 2, 2, 2]
    cache.release(add(cache, allocator, old))
    cache.release(add(cache, allocator, young))
    cache.release(add(cache, allocator, old))
    cache.evict(1)
    assert cache.find(key_of(young), 2, step=9).pages == 1
    cache.evict(1)
    assert cache.find(key_of(young), 2, step=9).pages == 0
    assert cache.find(key_of(old), 2, step=9).pages == 2


def test_a_leaf_goes_before_the_prefix_it_hangs_on() -> None:
    allocator = PageAllocator(9)
    cache = PrefixCache(PAGE, allocator)
    cache.release(add(cache, allocator, [1, 1, 2, 2]))
    cache.release(add(cache, allocator, [1, 1, 3, 3]))
    cache.evict(2)
    assert cache.find(key_of([1, 1]), 1, step=9).pages == 1


def test_a_used_prefix_is_never_evicted() -> None:
    allocator = PageAllocator(9)
    cache = PrefixCache(PAGE, allocator)
    node = add(cache, allocator, [1, 1, 2, 2])
    cache.release(add(cache, allocator, [1, 1, 3, 3]))
    assert cache.evict(100) == 1
    assert cache.find(key_of([1, 1, 2, 2]), 2, step=9).pages == 2
    cache.release(node)
    assert cache.evict(100) == 2
    assert allocator.free_pages == allocator.total


def test_a_prompt_that_is_prefilled_in_chunks_stays_one_edge() -> None:
    allocator = PageAllocator(40)
    cache = PrefixCache(PAGE, allocator)
    tokens = list(range(60))
    pages = allocator.take(30)
    node, depth = cache.root, 0
    for step, whole in enumerate((10, 20, 30)):
        node, _, left_over = cache.extend(node, depth, key_of(tokens), pages[:whole], step=step)
        assert left_over == []
        depth = whole
    assert len(list(cache.nodes())) == 1
    assert cache.use(cache.find(key_of(tokens), 30, step=9))[1] == pages


def test_pages_of_the_step_being_planned_are_forming_until_the_next() -> None:
    allocator = PageAllocator(40)
    cache = PrefixCache(PAGE, allocator)
    add(cache, allocator, [1, 2, 3, 4], step=1)
    now = cache.find(key_of([1, 2, 3, 4, 5]), 2, step=1)
    assert (now.pages, now.forming) == (0, True)
    then = cache.find(key_of([1, 2, 3, 4, 5]), 2, step=2)
    assert (then.pages, then.forming) == (2, False)


def test_other_namespaces_share_nothing() -> None:
    allocator = PageAllocator(40)
    cache = PrefixCache(PAGE, allocator)
    add(cache, allocator, [1, 2, 3, 4], namespace=b"a")
    assert cache.find(key_of([1, 2, 3, 4]), 2, namespace=b"a", step=9).pages == 2
    assert cache.find(key_of([1, 2, 3, 4]), 2, namespace=b"b", step=9).pages == 0
    assert cache.find(key_of([1, 2, 3, 4]), 2, step=9).pages == 0


@pytest.mark.parametrize("diverges_at", [1, 2, 3, 30, 31, 498, 499])
def test_a_long_edge_is_matched_up_to_the_page_where_it_diverges(diverges_at: int) -> None:
    allocator = PageAllocator(600)
    cache = PrefixCache(PAGE, allocator)
    tokens = list(range(1000))
    cache.release(add(cache, allocator, tokens))
    other = tokens.copy()
    other[diverges_at * PAGE + 1] = -1
    assert cache.find(key_of(other), 500, step=9).pages == diverges_at
    assert cache.find(key_of(tokens), diverges_at, step=9).pages == diverges_at


def test_evicting_a_long_edge_page_by_page_copies_it_a_few_times_only() -> None:
    allocator = PageAllocator(4097)
    cache = PrefixCache(PAGE, allocator)
    cache.release(add(cache, allocator, list(range(8192))))
    calls = 0
    while cache.idle_pages:
        cache.evict(1)
        calls += 1
    assert calls < 100
    assert allocator.free_pages == 4096
