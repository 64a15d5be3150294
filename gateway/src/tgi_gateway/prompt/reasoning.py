"""Reasoning: what a model thinks before it answers, told apart from the answer by the marks of its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tgi_gateway.prompt.answer import Scanner, Steps


@dataclass(frozen=True, slots=True)
class Marks:
    """What a family writes around its thoughts."""

    begin: str
    end: str

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt ends inside a thought, because the template has written the mark itself."""
        return prompt.rstrip().endswith(self.begin)


REASONING: Mapping[str, Marks] = {
    "think": Marks("<think>", "</think>"),
    "mistral": Marks("[THINK]", "[/THINK]"),
    "command_r": Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    "seed": Marks("<seed:think>", "</seed:think>"),
}
"""By the name that `--reasoning-parser` takes; gpt-oss has its own channels, which `calls.harmony` reads."""


def marks_of(template: str) -> Marks | None:
    """The family whose marks a chat template speaks of."""
    return next((marks for marks in REASONING.values() if marks.end in template), None)


def thoughts(s: Scanner, marks: Marks, opened: bool) -> Steps:
    """The thought at the beginning of an answer, if there is one; white space around it belongs to neither."""
    if not opened:
        s.checkpoint()
        yield from s.peek()
        if not (yield from s.starts_with(marks.begin)):
            s.restore()
            return
    s.forget()
    yield from s.peek()
    yield from s.until((marks.end,), s.thought)
    yield from s.peek()
