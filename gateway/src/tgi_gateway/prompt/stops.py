"""Stop strings in a stream of text: one automaton over all of them, one step per character."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

from tgi_gateway.api.generation import StopMatcher


def matcher(stop_strings: Iterable[str], keep: bool) -> StopMatcher | None:
    """A matcher for one stream, or None when there is nothing to find.

    The match that is complete first wins, of those the longest; so the outcome does not depend on how the text is cut
    into tokens. With `keep` (native API) text is shown at once and ends with the stop string; without (OpenAI API)
    text that may still become a stop string is held back, and the stop string is dropped.
    """
    strings = [string for string in stop_strings if string]
    if not strings:
        return None
    automaton = _Automaton(strings)
    return _KeepingMatcher(automaton) if keep else _DroppingMatcher(automaton)


class _Automaton:
    """Aho and Corasick 1975. State 0 is the root; a state stands for the prefix of a stop string read so far."""

    def __init__(self, strings: list[str]) -> None:
        self.edges: list[dict[str, int]] = [{}]
        self.failure = [0]
        self.depth = [0]
        self.source = [""]
        """A stop string that begins with the state's prefix: the held text, without storing it per stream."""
        self.match_length = [0]
        """Length of the longest stop string that ends in the state; 0: none."""
        for string in strings:
            self._insert(string)
        self._link()
        self.first_character = re.compile("|".join(re.escape(char) for char in self.edges[0]))

    def _insert(self, string: str) -> None:
        state = 0
        for depth, char in enumerate(string, 1):
            known = self.edges[state].get(char)
            if known is None:
                known = len(self.edges)
                self.edges[state][char] = known
                self.edges.append({})
                self.failure.append(0)
                self.depth.append(depth)
                self.source.append(string)
                self.match_length.append(0)
            state = known
        self.match_length[state] = len(string)

    def _link(self) -> None:
        queue = deque(self.edges[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self.edges[state].items():
                queue.append(child)
                fallback = self.failure[state]
                while fallback and char not in self.edges[fallback]:
                    fallback = self.failure[fallback]
                self.failure[child] = self.edges[fallback].get(char, 0)
                if not self.match_length[child]:
                    self.match_length[child] = self.match_length[self.failure[child]]

    def run(self, state: int, text: str) -> tuple[int, int]:
        """Read `text` up to the first match. Returns (new state, characters read if matched, else 0)."""
        edges, failure, match_length = self.edges, self.failure, self.match_length
        position, end = 0, len(text)
        while position < end:
            if not state:
                found = self.first_character.search(text, position)
                if found is None:
                    return 0, 0
                position = found.start()
            char = text[position]
            following = edges[state].get(char)
            while following is None and state:
                state = failure[state]
                following = edges[state].get(char)
            state = following or 0
            position += 1
            if match_length[state]:
                return state, position
        return state, 0

    def matched(self, state: int) -> str:
        """The stop string that ends in `state`."""
        read = self.source[state][: self.depth[state]]
        return read[len(read) - self.match_length[state] :]


class _KeepingMatcher:
    def __init__(self, automaton: _Automaton) -> None:
        self.matched: str | None = None
        self._automaton = automaton
        self._state = 0
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        if self._stopped:
            return "", True
        self._state, read = self._automaton.run(self._state, text)
        if read:
            self._stopped = True
            self.matched = self._automaton.matched(self._state)
            return text[:read], True
        return text, False

    def flush(self) -> str:
        return ""


class _DroppingMatcher:
    """Holds back exactly the state's prefix: the longest end of the text that begins a stop string."""

    def __init__(self, automaton: _Automaton) -> None:
        self.matched: str | None = None
        self._automaton = automaton
        self._state = 0
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        if self._stopped:
            return "", True
        automaton, before = self._automaton, self._state
        state, read = automaton.run(before, text)
        self._state = state
        if not before and not state:
            return text, False
        held = automaton.depth[before]
        if read:
            self._stopped = True
            self.matched = automaton.matched(state)
            shown = held + read - automaton.match_length[state]
        else:
            shown = held + len(text) - automaton.depth[state]
        # Only what is released is copied, so a long stop string costs no more per character than a short one.
        return automaton.source[before][: min(shown, held)] + text[: max(shown - held, 0)], bool(read)

    def flush(self) -> str:
        if self._stopped:
            return ""
        held = self._automaton.source[self._state][: self._automaton.depth[self._state]]
        self._state = 0
        return held
