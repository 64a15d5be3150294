"""What each replica has in its prefix cache, guessed from the prompts it was sent; and who shall get the next one.

A prompt is cut into blocks, and each block's hash covers all blocks before it, so that a set of hashes is a tree of
prefixes. What was not used for longest is forgotten first, leaves before what they grow on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Generic, TypeVar

import msgspec

Name = TypeVar("Name")
"""What a replica is called."""

BLOCK_BYTES = 128
"""About 32 tokens of English."""
MAX_BLOCKS = 1024
"""Of one prompt: who shares 128 KiB with it has the best of it anyway."""
PROMPT_FIELDS = ("tools", "system", "instructions", "messages", "input", "inputs", "prompt", "instances")
"""Of the bodies of all routes, in the order in which templates put them into a prompt."""
APART_FIELDS = ("model", "cache_salt")
"""Requests that differ in one of these share no cached prefix."""


def blocks_of(body: bytes, caller: bytes = b"") -> tuple[int, ...]:
    """The hashes of the prompt's whole blocks, the first ones first; none for what is no JSON object.

    `caller` is the API key: callers share no prefixes.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ()
    apart = [bytes(fields.get(name, b"")) for name in APART_FIELDS]
    prompt = b"\0".join(bytes(fields[name]) for name in PROMPT_FIELDS if name in fields)
    above = blake2b(b"\0".join([caller, *apart])).digest()
    hashes: list[int] = []
    for start in range(0, min(len(prompt) // BLOCK_BYTES, MAX_BLOCKS) * BLOCK_BYTES, BLOCK_BYTES):
        above = blake2b(above + prompt[start : start + BLOCK_BYTES], digest_size=8).digest()
        hashes.append(int.from_bytes(above))
    return tuple(hashes)


class Prefixes(Generic[Name]):
    """The prefixes of every replica, at most `max_blocks` blocks each."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._of: dict[Name, OrderedDict[int, None]] = {}

    def add(self, replica: Name, blocks: Sequence[int]) -> None:
        """`replica` was sent a prompt of these blocks."""
        seen = self._of.setdefault(replica, OrderedDict())
        for block in reversed(blocks):  # the first one is touched last, so that it outlives all that follow it
            seen[block] = None
            seen.move_to_end(block)
        while len(seen) > self._max_blocks:
            seen.popitem(last=False)

    def matched(self, replica: Name, blocks: Sequence[int]) -> int:
        """With how many of these blocks a prompt begins that `replica` has seen."""
        seen = self._of.get(replica, ())
        return bisect_left(blocks, True, key=lambda block: block not in seen)

    def keep(self, replicas: Iterable[Name]) -> None:
        """Forget all others."""
        alive = set(replicas)
        self._of = {replica: seen for replica, seen in self._of.items() if replica in alive}

    def favourite(self, blocks: Sequence[int], loads: Mapping[Name, int], *, slack: int, factor: float) -> Name | None:
        """Of the replicas in `loads` the one that has most of the prompt, the least loaded of several.

        None if nobody has any of it, or if that one has more open requests than ``slack + factor * (the fewest)``:
        then waiting there would cost more than computing the prefix again.
        """
        matched = {replica: self.matched(replica, blocks) for replica in loads}
        most = max(matched.values(), default=0)
        if not most:
            return None
        best = min((replica for replica, count in matched.items() if count == most), key=loads.__getitem__)
        return best if loads[best] <= slack + factor * min(loads.values()) else None

    def __len__(self) -> int:
        """Blocks of all replicas together."""
        return sum(map(len, self._of.values()))
