"""The prefix cache: a radix tree whose edges are runs of KV pages.

After RadixAttention (Zheng et al. 2024, SGLang, section 3). A key is a string of bytes, `TOKEN_BYTES` per token, so
that a whole edge is compared by one memcmp; edges begin and end at page borders. Users of a path are counted in each
node on it: only nodes nobody uses may be evicted, least recently used leaf first.

Pages enter when the step that computes them starts, not when it ends, so that the next step's newcomers can already
read them; within the step itself they count as *forming* and are not handed out.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from tgi_model_server.kv.pages import PageAllocator

TOKEN_BYTES = array("i").itemsize


class Node:
    """An edge of the tree together with its lower end."""

    __slots__ = ("children", "entry", "formed", "key", "pages", "parent", "step", "users")

    def __init__(self, parent: Node | None, entry: bytes, key: bytes, pages: list[int], step: int, formed: int) -> None:
        self.parent = parent
        self.entry = entry
        """Key in the parent's `children`: the edge's first page, below the root preceded by the namespace."""
        self.key = key
        self.pages = pages
        self.step = step
        """The last step that added pages to this edge ..."""
        self.formed = formed
        """... and how many it had before."""
        self.children: dict[bytes, Node] = {}
        self.users = 0
        """Sequences whose prefix ends here or below."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What `find` found: `pages` whole pages, the last `within` of them on the edge `node`."""

    node: Node
    within: int
    pages: int
    forming: bool
    """More of the key is being computed in the very step that is being planned."""


class PrefixCache:
    """Owns the pages of finished and of running sequences' prefixes; evicted ones go back to `allocator`."""

    def __init__(self, page_size: int, allocator: PageAllocator) -> None:
        self.page_size = page_size
        self.root = Node(None, b"", b"", [], -1, 0)
        self.cached_pages = 0
        self.idle_pages = 0
        """Cached pages that nobody uses: as good as free."""
        self._allocator = allocator
        self._page_bytes = page_size * TOKEN_BYTES
        # Nodes without users, oldest use first. `release` enters a path from its lower end to its upper, hence no node
        # stands before one of its descendants, and the first is always a leaf.
        self._idle: OrderedDict[Node, None] = OrderedDict()

    def find(self, key: bytes, max_pages: int, *, namespace: bytes = b"", step: int = 0) -> Prefix:
        """The longest cached prefix of `key`, at most `max_pages` long, that step number `step` may read.

        Costs one dictionary look-up and one memcmp per edge on the way, whatever else is cached.
        """
        page_bytes = self._page_bytes
        end = max_pages * page_bytes
        node, within, at = self.root, 0, 0
        entry = namespace + key[:page_bytes]
        while at < end:
            child = node.children.get(entry)
            if child is None:
                break
            edge = child.key
            below = at + len(edge)
            formed = child.step != step or child.formed == len(child.pages)
            if formed and below <= end and key.startswith(edge, at):
                node, within, at = child, len(child.pages), below
                entry = key[at : at + page_bytes]
                continue
            common = self._common_pages(edge, key, at, min(below, end))
            usable = common if formed else min(common, child.formed)
            if usable:
                node, within, at = child, usable, at + usable * page_bytes
            return Prefix(node, within, at // page_bytes, usable < common)
        return Prefix(node, within, at // page_bytes, False)

    def use(self, prefix: Prefix) -> tuple[Node, list[int]]:
        """Become a user of `prefix`, found since the tree last changed: the node to `release`, and the page ids."""
        node = prefix.node
        if prefix.within < len(node.pages):
            node = self._split(node, prefix.within)
        self._add_user(node, self.root)
        runs: list[list[int]] = []
        upper: Node | None = node
        while upper is not None:
            runs.append(upper.pages)
            upper = upper.parent
        if len(runs) == 2:
            return node, runs[0].copy()
        pages: list[int] = []
        for run in reversed(runs):
            pages += run
        return node, pages

    def extend(
        self, node: Node, depth: int, key: bytes, pages: list[int], *, namespace: bytes = b"", step: int = 0
    ) -> tuple[Node, list[int], list[int]]:
        """Hand over the pages beyond `depth` of a user of `node`, which ends `depth` pages below the root.

        `key` and `pages` are those of the whole prefix, from the root. Where the tree has a page for the same tokens
        already, that one counts. Returns the node to release from now on, the prefix's pages as the tree has them, and
        the caller's pages that were left over: they are still the caller's, to give back when no step reads them.
        """
        page_bytes = self._page_bytes
        start, bottom = node, node
        at, end = depth * page_bytes, len(pages) * page_bytes
        assert len(key) >= end
        shared: list[int] = []
        while at < end:
            entry = key[at : at + page_bytes]
            if bottom is self.root:
                entry = namespace + entry
            child = bottom.children.get(entry)
            if child is None:
                break
            below = at + len(child.key)
            if below > end or not key.startswith(child.key, at):
                child = self._split(child, self._common_pages(child.key, key, at, min(below, end)))
            shared += child.pages
            at += len(child.key)
            bottom = child
        left_over = pages[depth : depth + len(shared)]
        if at < end:
            fresh = pages[depth + len(shared) :]
            edge = key[at:end]
            self.cached_pages += len(fresh)
            if bottom is start and bottom.users == 1 and not bottom.children and bottom is not self.root:
                # Only the caller uses this leaf: it grows, so that a prompt prefilled in chunks stays one edge.
                if bottom.step != step:
                    bottom.step, bottom.formed = step, len(bottom.pages)
                bottom.key += edge
                bottom.pages += fresh
            else:
                entry = edge[:page_bytes]
                if bottom is self.root:
                    entry = namespace + entry
                leaf = Node(bottom, entry, edge, fresh, step, 0)
                bottom.children[entry] = leaf
                # Counted as idle for the moment until its user is entered.
                self._idle[leaf] = None
                self.idle_pages += len(fresh)
                bottom = leaf
        self._add_user(bottom, start)
        if shared:
            pages = pages[:depth] + shared + pages[depth + len(shared) :]
        return bottom, pages, left_over

    def release(self, node: Node) -> None:
        """One user of the path to `node` less."""
        step: Node | None = node
        while step is not None and step is not self.root:
            step.users -= 1
            assert step.users >= 0
            if not step.users:
                self._idle[step] = None
                self.idle_pages += len(step.pages)
            step = step.parent

    def evict(self, count: int) -> int:
        """Give at least `count` idle pages back to the allocator, or all there are; returns how many.

        The least recently used leaf shrinks from its end. It loses an eighth at once, so that copying what is left of
        a long edge costs O(1) per page.
        """
        freed = 0
        while freed < count and self._idle:
            leaf = next(iter(self._idle))
            assert not leaf.children
            assert leaf.parent is not None
            have = len(leaf.pages)
            drop = max(count - freed, have // 8)
            if drop >= have:
                drop = have
                del leaf.parent.children[leaf.entry]
                del self._idle[leaf]
                self._allocator.give(leaf.pages)
            else:
                self._allocator.give(leaf.pages[have - drop :])
                del leaf.pages[have - drop :]
                leaf.key = leaf.key[: (have - drop) * self._page_bytes]
                leaf.formed = min(leaf.formed, have - drop)
            freed += drop
        self.cached_pages -= freed
        self.idle_pages -= freed
        return freed

    def clear(self) -> None:
        """Evict everything that nobody uses."""
        self.evict(self.idle_pages)

    def owned(self) -> Iterator[int]:
        """All pages in the tree. O(pages): for tests and debugging."""
        for node in self.nodes():
            yield from node.pages

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root. O(nodes): for tests and debugging."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Assert the tree's invariants. O(pages): for tests and debugging."""
        cached = idle = 0
        for node in self.nodes():
            assert node.pages, "an edge without pages"
            assert len(node.key) == len(node.pages) * self._page_bytes
            assert node.parent is not None
            assert node.parent.children[node.entry] is node
            assert node.entry.endswith(node.key[: self._page_bytes])
            assert node.users >= sum(child.users for child in node.children.values())
            assert (node.users == 0) == (node in self._idle)
            assert 0 <= node.formed <= len(node.pages)
            cached += len(node.pages)
            idle += 0 if node.users else len(node.pages)
        assert cached == self.cached_pages
        assert idle == self.idle_pages
        position = {node: at for at, node in enumerate(self._idle)}
        for node, at in position.items():
            assert all(position[child] < at for child in node.children.values())

    def _add_user(self, node: Node, above: Node) -> None:
        """Count one user more in every node from `node` up to, but without, `above`."""
        while node is not above:
            if not node.users:
                del self._idle[node]
                self.idle_pages -= len(node.pages)
            node.users += 1
            assert node.parent is not None
            node = node.parent

    def _common_pages(self, edge: bytes, key: bytes, at: int, end: int) -> int:
        """Whole pages that `edge` and ``key[at:end]`` begin with, by bisection: O(bytes) copied, O(log pages) steps."""
        page_bytes = self._page_bytes
        low, high = 0, (end - at) // page_bytes
        if key.startswith(edge[: high * page_bytes], at):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            if key.startswith(edge[low * page_bytes : middle * page_bytes], at + low * page_bytes):
                low = middle
            else:
                high = middle
        return low

    def _split(self, node: Node, upper_pages: int) -> Node:
        """Cut the edge of `node`; the new upper part is returned and must get a user next.

        The lower part stays the same object, because users of the whole edge hold on to it.
        """
        assert 0 < upper_pages < len(node.pages)
        assert node.parent is not None
        cut = upper_pages * self._page_bytes
        upper = Node(
            node.parent,
            node.entry,
            node.key[:cut],
            node.pages[:upper_pages],
            node.step,
            min(node.formed, upper_pages),
        )
        upper.users = node.users
        node.parent.children[node.entry] = upper
        node.parent = upper
        node.key = node.key[cut:]
        node.pages = node.pages[upper_pages:]
        node.formed = max(0, node.formed - upper_pages)
        node.entry = node.key[: self._page_bytes]
        upper.children[node.entry] = node
        if not upper.users:
            self._idle[upper] = None
        return upper
