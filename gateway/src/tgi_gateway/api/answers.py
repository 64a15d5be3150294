"""Answers taken apart: words, thoughts and tool calls, whichever way the model writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tgi_gateway.api.generation import Piece
from tgi_gateway.prompt.answer import CallArguments, CallBegin, Delta, Text, Thought
from tgi_gateway.prompt.reasoning import Marks
from tgi_gateway.prompt.tools import Family, Tool, parser


@dataclass(slots=True)
class Call:
    """A call of a tool."""

    id: str
    name: str
    arguments: str = ""
    """A JSON object, unless the answer was cut short or the model wrote something else."""


@dataclass(frozen=True, slots=True)
class CallOpened:
    """The answer's call number `index` begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallGrown:
    """More of the arguments of call number `index`."""

    index: int
    text: str


Part: TypeAlias = Text | Thought | CallOpened | CallGrown


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers to one request are to be read."""

    family: Family | None = None
    """None: calls are not looked for."""
    tools: tuple[Tool, ...] = ()
    marks: Marks | None = None
    """How the model writes thoughts, unless its family tells."""
    opened: bool = False
    """The prompt ends inside a thought."""
    thoughts: bool = True
    """Whether thoughts are told apart; else they stay in the words."""
    parallel: bool = True
    """Whether an answer may hold several calls."""
    earlier_calls: int = 0
    """Calls in the conversation so far."""
    visible: frozenset[int] = frozenset()
    """Special tokens that are read as text."""

    @property
    def plain(self) -> bool:
        """Whether an answer is just its text."""
        return self.family is None and (self.marks is None or not self.thoughts)


class Reader:
    """Reads one answer and keeps what it has read."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.words: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[Call] = []
        self.thinking_tokens = 0
        """Tokens up to the end of the thoughts."""
        marks = reading.marks if reading.thoughts else None
        self._parser = None if reading.plain else parser(reading.family, reading.tools, marks, reading.opened)
        self._thinking = reading.opened and reading.thoughts
        self.whole = False
        """The only call that the answer may hold is complete: what comes after it is left out."""

    def read(self, pieces: Sequence[Piece]) -> list[Part]:
        """What comes to light with the next tokens."""
        return [part for piece in pieces for part in self.push(piece)]

    def push(self, piece: Piece) -> list[Part]:
        text = "" if piece.special else piece.text
        if self._parser is None:
            return self._kept([Text(text)] if text else [])
        parts = self._kept(self._parser.push(text))
        if parts:
            self._thinking = isinstance(parts[-1], Thought)
        if self._thinking:
            self.thinking_tokens += 1
        return parts

    def finish(self, rest: str = "") -> list[Part]:
        """What is left at the end; `rest` is text that no token carries."""
        if self._parser is None:
            return self._kept([Text(rest)] if rest else [])
        return self._kept([*self._parser.push(rest), *self._parser.flush()])

    def _kept(self, deltas: Sequence[Delta]) -> list[Part]:
        return [part for delta in deltas if (part := self._keep(delta)) is not None]

    def _keep(self, delta: Delta) -> Part | None:
        if self.whole:
            return None
        match delta:
            case Thought(text) if self.reading.thoughts:
                self.thoughts.append(text)
                return delta
            case Text(text) | Thought(text):
                self.words.append(text)
                return Text(text)
            case CallBegin(name):
                if self.calls and not self.reading.parallel:
                    self.whole = True
                    return None
                assert self.reading.family is not None
                call = Call(self.reading.family.new_id(name, self.reading.earlier_calls + len(self.calls)), name)
                self.calls.append(call)
                return CallOpened(len(self.calls) - 1, call.id, name)
            case CallArguments(text):
                self.calls[-1].arguments += text
                self.whole = not self.reading.parallel and _is_json(self.calls[-1].arguments)
                return CallGrown(len(self.calls) - 1, text)


def _is_json(text: str) -> bool:
    """Whether it is the whole text of an object."""
    if not text.rstrip().endswith("}"):
        return False  # as nearly always
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return True


__all__ = ["Call", "CallGrown", "CallOpened", "Part", "Reader", "Reading", "Text", "Thought"]
