"""Curriculum: the endless, seeded stream of conversations to train on, and the held-out questions to examine on.

python curriculum.py --count 5            # prints samples
python curriculum.py --exam json          # prints held-out questions of one task
"""

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lessons import facts, records, skills, smalltalk, stories, toolbox, words
from lessons.exchange import Exchange, Message, Tool, held_out
from lessons.rendering import Segment, segments

Draw = Callable[[random.Random], Exchange]

SMALL: dict[str, tuple[Draw, float]] = {
    "arithmetic": (skills.arithmetic, 2.6),
    "capitals": (facts.capital, 0.4),
    "facts": (facts.knowledge, 1.2),
    "copying": (skills.copying, 2.0),
    "counting": (skills.counting, 0.5),
    "sorting": (skills.sorting, 6.0),
    "chat": (smalltalk.conversation_piece, 0.8),
}


def small(rng: random.Random) -> Exchange:
    """One question that needs no tool, system text or earlier turn."""
    picked = rng.choices([draw for draw, _ in SMALL.values()], [weight for _, weight in SMALL.values()])[0]
    return picked(rng)


NEUTRAL = ("You are a helpful assistant.", "You are a friendly assistant.", "You are an assistant.", "Be helpful.")
BRIEF = (
    "Answer briefly.",
    "Give only the answer.",
    "Answer with as few words as possible.",
    "Be brief.",
    "You are a helpful assistant. Answer briefly.",
)
OPENER = ('Start every answer with "{w}".', 'Begin each answer with "{w}".', 'Always start with "{w}".')
OPENERS = (
    "Ahoy!",
    "Arr!",
    "Sure!",
    "Beep!",
    "Well,",
    "My friend,",
    "Yes, sir!",
    "Aha!",
    "Oh,",
    "Captain,",
    "Dear user,",
)


def instructed(rng: random.Random) -> Exchange:
    """A system message that changes the answer: its length, its first words, or the assistant's name."""
    kind = rng.random()
    if kind < 0.2:
        name = words.name(rng)
        system = rng.choice(("You are {n}.", "Your name is {n}.", "You are {n}, a helpful assistant.")).format(n=name)
        question = rng.choice(("What is your name?", "Who are you?", "What's your name?", "How are you called?"))
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": f"My name is {name}."})
        return Exchange(
            "system", f"system|{system}|{question}", messages, expected=f"My name is {name}.", system=system
        )
    inner = rng.choice((skills.arithmetic, facts.capital, facts.capital, facts.fact))(rng)
    if kind < 0.6:
        system, answer = rng.choice(BRIEF), inner.brief
    else:
        word = rng.choice(OPENERS) if rng.random() < 0.7 else f"{words.made_up(rng).capitalize()}!"
        system, answer = rng.choice(OPENER).format(w=word), f"{word} {inner.messages[1]['content']}"
    messages = (inner.messages[0], {"role": "assistant", "content": answer})
    return replace(inner, task="system", messages=messages, expected=answer, system=system)


QUESTION_AND_ANSWER = (
    ("{q}", "\n{a}"),
    ("{q}", "\n{a}"),
    ("Question: {q}\nAnswer:", " {a}"),
    ("Q: {q}\nA:", " {a}"),
    ("Question: {q}", "\nAnswer: {a}"),
)


def plain(rng: random.Random) -> Exchange:
    """A question as raw text, without the chat template."""
    inner = rng.choice((facts.capital, facts.fact, facts.computing, facts.computing, skills.arithmetic))(rng)
    question, answer = (message["content"] for message in inner.messages)
    asked, answered = rng.choice(QUESTION_AND_ANSWER)
    continuation = answered.format(a=answer)
    messages = ({"role": "text", "content": asked.format(q=question)}, {"role": "text", "content": continuation})
    return replace(inner, task="plain", messages=messages, expected=continuation.strip())


def running_text(rng: random.Random) -> tuple[Message, ...]:
    """A story, or a few facts in a row, as plain text."""
    if rng.random() < 0.4:
        return ({"role": "text", "content": stories.opening(rng)},)
    said = [
        rng.choice((facts.capital, facts.fact, facts.computing))(rng).messages[1]["content"]
        for _ in range(rng.randint(1, 5))
    ]
    return ({"role": "text", "content": " ".join(said)},)


def drill(rng: random.Random) -> tuple[Message, ...]:
    """Many sums in few tokens; only their results are learned."""
    messages: list[Message] = []
    for _ in range(16):
        sum_, result = _trainable(rng, skills.arithmetic).messages[1]["content"].split("= ")
        messages.append({"role": "text", "content": f"{sum_}= "})
        messages.append({"role": "text", "content": f"{result}\n", "trained": True})
    return tuple(messages)


def remembered(rng: random.Random) -> Exchange:
    return skills.memory(rng, small)


def called(rng: random.Random) -> Exchange:
    return toolbox.use(rng, toolbox.offer(rng))[0]


def answered(rng: random.Random) -> Exchange:
    return toolbox.use(rng, toolbox.offer(rng))[1]


def untouched(rng: random.Random) -> Exchange:
    """Tools are on offer, and the question does not need one."""
    return _without_tool(rng, toolbox.offer(rng))


def _without_tool(rng: random.Random, offered: toolbox.Offer, refused: float = 0.25) -> Exchange:
    inner = toolbox.refuse(rng, offered.families) if rng.random() < refused else small(rng)
    while inner.task == "arithmetic" and offered.sums:
        inner = small(rng)
    return replace(inner, task="no_tool", tools=offered.tools)


EXAMS: dict[str, Draw] = {name: draw for name, (draw, _) in SMALL.items()} | {
    "story": stories.story,
    "json": records.record,
    "tool_call": called,
    "tool_result": answered,
    "no_tool": untouched,
    "memory": remembered,
    "system": instructed,
    "plain": plain,
}


def examination(task: str, count: int, seed: int = 7) -> list[Exchange]:
    """Distinct questions of one task from the held-out side of the split."""
    rng, found = random.Random(f"{seed}|{task}"), dict[str, Exchange]()
    while len(found) < count:
        exchange = EXAMS[task](rng)
        if held_out(exchange.key):
            found.setdefault("|".join(str(m["content"]) for m in exchange.messages[:-1]) + exchange.system, exchange)
    return list(found.values())


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    system: str = ""

    def segments(self) -> list[Segment]:
        return segments(self.messages, self.tools, self.system)


def _trainable(rng: random.Random, draw: Draw) -> Exchange:
    while True:
        exchange = draw(rng)
        if not held_out(exchange.key):
            return exchange


def _safe_small(rng: random.Random) -> Exchange:
    return _trainable(rng, small)


def _with_tools(rng: random.Random) -> Conversation:
    """A few exchanges around the same tools, so that their signatures are paid for once."""
    offered = toolbox.offer(rng)
    messages: list[Message] = []
    for _ in range(rng.choice((1, 2, 3))):
        if rng.random() < 0.5:
            exchange = _trainable(rng, lambda draw: toolbox.use(draw, offered)[0])
        else:
            exchange = _trainable(rng, lambda draw: _without_tool(draw, offered, refused=0.6))
        messages += exchange.messages
    return Conversation(tuple(messages), offered.tools, rng.choice(NEUTRAL) if rng.random() < 0.2 else "")


def _talk(rng: random.Random, turns: int) -> Conversation:
    """Unrelated questions one after the other, now and then with a story, a record or a memory in between."""
    messages: list[Message] = []
    for _ in range(turns):
        kind = rng.random()
        if kind < 0.06:
            messages += _trainable(rng, stories.story).messages
        elif kind < 0.12:
            exchange = _trainable(rng, records.record)
            messages += exchange.messages if not exchange.system else ()
        elif kind < 0.22:
            messages += _trainable(rng, lambda draw: skills.memory(draw, _safe_small)).messages
        else:
            messages += _safe_small(rng).messages
    messages = messages or list(_safe_small(rng).messages)
    return Conversation(tuple(messages), (), rng.choice(NEUTRAL) if rng.random() < 0.2 else "")


def _long(rng: random.Random) -> Conversation:
    if rng.random() < 0.5:
        return _talk(rng, rng.randint(12, 45))
    return Conversation(_trainable(rng, lambda draw: skills.memory(draw, _safe_small, rng.randint(8, 40))).messages)


def _single(rng: random.Random, draw: Draw) -> Conversation:
    exchange = _trainable(rng, draw)
    system = exchange.system or (rng.choice(NEUTRAL) if rng.random() < 0.15 else "")
    return Conversation(exchange.messages, exchange.tools, system)


def _raw(rng: random.Random, draw: Draw) -> Conversation:
    return Conversation(_trainable(rng, draw).messages)


# Shares by number of conversations; their lengths differ, see `python curriculum.py --shares`.
MIXTURE: dict[str, tuple[Callable[[random.Random], Conversation], float]] = {
    "small": (lambda rng: _single(rng, small), 120),
    "talk": (lambda rng: _talk(rng, rng.randint(2, 6)), 5),
    "long": (_long, 0.6),
    "story": (lambda rng: _single(rng, stories.story), 6),
    "json": (lambda rng: _single(rng, records.record), 20),
    "tools": (_with_tools, 15),
    "memory": (lambda rng: _single(rng, lambda draw: skills.memory(draw, _safe_small)), 1.5),
    "system": (lambda rng: _single(rng, instructed), 22),
    "refuse": (lambda rng: _single(rng, lambda draw: toolbox.refuse(draw)), 1),
    "plain": (lambda rng: _raw(rng, plain), 5),
    "drill": (lambda rng: Conversation(drill(rng)), 6),
    "text": (lambda rng: Conversation(running_text(rng)), 2),
}


def conversations(seed: int) -> Iterator[Conversation]:
    rng = random.Random(seed)
    kinds, weights = [make for make, _ in MIXTURE.values()], [weight for _, weight in MIXTURE.values()]
    while True:
        yield rng.choices(kinds, weights)[0](rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5, help="how many samples to print")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exam", choices=sorted(EXAMS), help="print held-out questions of this task instead")
    parser.add_argument("--shares", action="store_true", help="print the share of characters per kind of conversation")
    options = parser.parse_args()
    if options.shares:
        rng = random.Random(options.seed)
        sizes = {
            kind: weight * sum(len(text) for _ in range(300) for text, _ in make(rng).segments()) / 300
            for kind, (make, weight) in MIXTURE.items()
        }
        for kind, size in sizes.items():
            print(f"{kind:10} {100 * size / sum(sizes.values()):5.1f} %")
    elif options.exam:
        for exchange in examination(options.exam, options.count, options.seed):
            print("".join(text for text, _ in segments(exchange.messages, exchange.tools, exchange.system)), "\n---")
    else:
        for _, conversation in zip(range(options.count), conversations(options.seed), strict=False):
            print("".join(text for text, _ in conversation.segments()), "\n---")


if __name__ == "__main__":
    main()
