"""The parts of an answer, and the scanner with which parsers take a growing text apart.

A parser is a coroutine over a `Scanner`: written as if the whole text were there, it waits wherever the next piece is
needed. So what it finds does not depend on how the text is cut into tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Text:
    """More of what the model says to the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The model calls this function; `CallArguments` up to the next `CallBegin` are its."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of the newest call: a JSON object as text, as the model writes it."""

    text: str


Delta: TypeAlias = Text | Thought | CallBegin | CallArguments


class AnswerParser(Protocol):
    """Takes one answer apart. Joined over all calls, the parts are the same however the text is cut."""

    def push(self, text: str) -> list[Delta]: ...

    def flush(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        ...


class Malformed(Exception):
    """What looked like a call is none."""


Emit: TypeAlias = Callable[[str], None]
Steps: TypeAlias = Generator[None, None, None]
_SPACE = re.compile(r"\s*")
_SCALAR_END = re.compile(r"[,\]}\s]")
_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_STOP = re.compile(r'["\\]')


class Scanner:
    """Text that arrives in pieces. Methods that may have to wait are generators: ``yield from`` them."""

    def __init__(self) -> None:
        self.buffer = ""
        self.ended = False
        self._out: list[Delta] = []
        self._kept: str | None = None
        """Text since `checkpoint`."""
        self._space = ""
        """White space at the end of the text so far, which is dropped if a call follows or all that follows one."""
        self._called = False
        self._thought_space = ""

    # What parsers emit.

    def text(self, text: str) -> None:
        shown = (self._space + text).rstrip()
        self._called = self._called and not shown
        self._space = (self._space + text)[len(shown) :]
        if shown:
            self._out.append(Text(shown))

    def thought(self, text: str) -> None:
        shown = (self._thought_space + text).rstrip()
        self._thought_space = (self._thought_space + text)[len(shown) :]
        if shown:
            self._out.append(Thought(shown))

    def begin(self, name: str) -> None:
        """From here on there is no way back to `checkpoint`."""
        self._kept = None
        self._space = ""
        self._called = True
        self._out.append(CallBegin(name))

    def arguments(self, text: str) -> None:
        if text:
            self._out.append(CallArguments(text))

    def finish(self) -> None:
        """The answer has ended."""
        if self._space and not self._called:
            self._out.append(Text(self._space))
            self._space = ""

    def taken(self) -> list[Delta]:
        """What was emitted since the last call, neighbours of a kind joined."""
        out, self._out = self._out, []
        return joined(out)

    # Going back.

    def checkpoint(self, before: str = "") -> None:
        """`restore` will give `before` and all that is consumed from now on as text."""
        self._kept = before

    def restore(self) -> None:
        """What was consumed since `checkpoint` is text after all; nothing after a call has begun."""
        kept, self._kept = self._kept, None
        if kept:
            self.text(kept)

    def forget(self) -> None:
        """What was consumed since `checkpoint` is settled."""
        self._kept = None

    @property
    def committed(self) -> bool:
        """Whether a call has begun since `checkpoint`."""
        return self._kept is None

    # Reading.

    def take(self, count: int) -> str:
        part, self.buffer = self.buffer[:count], self.buffer[count:]
        if self._kept is not None:
            self._kept += part
        return part

    def more(self) -> Steps:
        """Wait for more text. Raises `Malformed` if there is none."""
        if self.ended:
            raise Malformed
        yield

    def peek(self) -> Generator[None, None, str]:
        """The next character that is no white space, which is consumed up to there; empty at the end."""
        while True:
            space = _SPACE.match(self.buffer)
            assert space is not None
            self.take(space.end())
            if self.buffer or self.ended:
                return self.buffer[:1]
            yield

    def starts_with(self, *texts: str) -> Generator[None, None, str]:
        """The longest of `texts` that comes next, consumed; empty if none does."""
        while not self.ended and any(text.startswith(self.buffer) and text != self.buffer for text in texts):
            yield
        found = max((text for text in texts if self.buffer.startswith(text)), key=len, default="")
        return self.take(len(found))

    def until(self, marks: Collection[str], emit: Emit) -> Generator[None, None, str]:
        """Emit what comes before the first of `marks`, which is consumed and returned; empty at the end."""
        while True:
            found = [(at, -len(mark), mark) for mark in marks if (at := self.buffer.find(mark)) >= 0]
            if found:
                at, _, mark = min(found)
                emit(self.take(at))
                self.take(len(mark))
                return mark
            held = 0 if self.ended else held_back(self.buffer, marks)
            emit(self.take(len(self.buffer) - held))
            if self.ended:
                return ""
            yield

    def rest(self, emit: Emit) -> Steps:
        """Emit everything that still comes."""
        yield from self.until((), emit)

    def literal(self, text: str) -> Steps:
        """Consume `text` after white space. Raises `Malformed` if something else comes."""
        yield from self.peek()
        if not (yield from self.starts_with(text)):
            raise Malformed

    def string(self) -> Generator[None, None, str]:
        """Consume a JSON string and return its value. Raises `Malformed`."""
        parts: list[str] = []
        yield from self.value(parts.append)
        try:
            value = json.loads("".join(parts), strict=False)
        except ValueError:
            raise Malformed from None
        if not isinstance(value, str):
            raise Malformed
        return value

    def value(self, emit: Emit) -> Steps:
        """Emit one JSON value as it grows, without judging what is inside. Raises `Malformed` where it is cut short."""
        first = yield from self.peek()
        if first in ("{", "[", '"'):
            yield from self._nested(emit)
        elif first in ("", ",", "}", "]", ":"):
            raise Malformed
        else:
            while (end := _SCALAR_END.search(self.buffer)) is None:
                emit(self.take(len(self.buffer)))
                yield from self.more()
            emit(self.take(end.start()))

    def _nested(self, emit: Emit) -> Steps:
        depth, in_string, escaped = 0, False, False
        while True:
            at = 0
            while at < len(self.buffer):
                if escaped:
                    escaped = False
                    at += 1
                    continue
                found = (_STRING_STOP if in_string else _STRUCTURE).search(self.buffer, at)
                if found is None:
                    at = len(self.buffer)
                    break
                at = found.end()
                char = found.group()
                if char == "\\":
                    escaped = True
                elif char == '"':
                    in_string = not in_string
                else:
                    depth += 1 if char in "{[" else -1
                if depth == 0 and not in_string:
                    emit(self.take(at))
                    return
            emit(self.take(at))
            yield from self.more()


class CoroutineParser:
    """An `AnswerParser` made of a coroutine."""

    def __init__(self, scanner: Scanner, steps: Steps) -> None:
        self._scanner = scanner
        self._steps: Steps | None = steps

    def push(self, text: str) -> list[Delta]:
        self._scanner.buffer += text
        return self._advance()

    def flush(self) -> list[Delta]:
        self._scanner.ended = True
        while self._steps is not None:
            self._run()
        self._scanner.finish()
        return self._scanner.taken()

    def _advance(self) -> list[Delta]:
        if self._steps is not None:
            self._run()
        return self._scanner.taken()

    def _run(self) -> None:
        assert self._steps is not None
        try:
            next(self._steps)
        except StopIteration:
            self._steps = None


def held_back(text: str, marks: Collection[str]) -> int:
    """Length of the longest end of `text` with which one of `marks` may begin."""
    longest = max(map(len, marks), default=0) - 1
    tail = text[-longest:] if longest > 0 else ""
    if not any(mark[0] in tail for mark in marks):
        return 0  # as nearly always
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(mark.startswith(end) for mark in marks):
            return length
    return 0


def joined(deltas: Sequence[Delta]) -> list[Delta]:
    """The same with neighbours of one kind as one."""
    out: list[Delta] = []
    for delta in deltas:
        last = out[-1] if out else None
        if isinstance(delta, CallBegin) or type(last) is not type(delta):
            out.append(delta)
        else:
            assert not isinstance(last, CallBegin | None)
            out[-1] = type(last)(last.text + delta.text)
    return out
