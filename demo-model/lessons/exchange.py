"""Exchange: one question with its right answer, how it is graded, and whether it may be trained on."""

import hashlib
import json
import random
import re
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, Any]
Tool = dict[str, Any]
Grading = Literal["exact", "json", "call", "contains", "story"]

ALWAYS_TRAINED = "always trained"  # the key of questions whose very words have to be learned
HELD_OUT_SHARE = 10  # one key in this many is never trained on


@dataclass(frozen=True)
class Exchange:
    task: str
    key: str  # what the held-out split hashes: the question, or the numbers in it
    messages: tuple[Message, ...]
    grading: Grading = "exact"
    expected: Any = ""
    brief: str = ""  # the same answer in as few words as possible, when there is one
    system: str = ""
    tools: tuple[Tool, ...] = ()
    graded: int = -1  # index of the assistant message that evaluation asks for


def ask(task: str, question: str, answer: str, *, key: str = "", brief: str = "") -> Exchange:
    """One question, one exactly graded answer."""
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Exchange(task, key or f"{task}|{question}", messages, expected=answer, brief=brief)


def held_out(key: str) -> bool:
    """Decides the split from the key alone, so that it is the same in every run and on every machine."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return key != ALWAYS_TRAINED and number % HELD_OUT_SHARE == 0


PREFIXES = (
    "Please tell me: ",
    "Quick question: ",
    "Hi! ",
    "Hello! ",
    "I have a question. ",
    "Hey, ",
    "Tell me: ",
    "Can you help me? ",
    "One more question: ",
    "OK. ",
    "Good morning! ",
    "Dear assistant, ",
)
SUFFIXES = (" Thanks!", " Please.", " Please answer.", " Thank you.", " I want to know.")


def vary(rng: random.Random, question: str) -> str:
    """The same question as different people would type it."""
    style = rng.random()
    if style < 0.5:
        return question
    if style < 0.66:
        return rng.choice(PREFIXES) + question
    if style < 0.76:
        return question + rng.choice(SUFFIXES)
    if style < 0.86:
        return question.rstrip("?.!")
    if style < 0.94:
        return question.lower()
    return question.lower().rstrip("?.!")


def parse_call(text: str) -> Any:
    """The {"name", "arguments"} object inside <tool_call> tags, or None."""
    found = re.search(r"<tool_call>\s*(\{.*\})\s*</tool_call>", text, re.S)
    try:
        return json.loads(found.group(1)) if found else None
    except json.JSONDecodeError:
        return None


def grade(exchange: Exchange, answer: str) -> bool:
    """Whether the answer is right; says nothing about style beyond what the task asks for."""
    from lessons.stories import coherent

    answer = answer.strip()
    if exchange.grading == "exact":
        return bool(answer == exchange.expected)
    if exchange.grading == "json":
        try:
            return bool(json.loads(answer) == exchange.expected)
        except json.JSONDecodeError:
            return False
    if exchange.grading == "call":
        return bool(parse_call(answer) == exchange.expected)
    if exchange.grading == "contains":
        return all(part.lower() in answer.lower() for part in exchange.expected)
    return coherent(answer, *exchange.expected)
