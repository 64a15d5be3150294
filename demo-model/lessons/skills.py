"""Skills: arithmetic, copying, counting, sorting, and remembering what the user said."""

import random
from collections.abc import Callable

from lessons import words
from lessons.exchange import PREFIXES, Exchange, ask, vary

ADD = ("What is {a} + {b}?", "{a} + {b} = ?", "Calculate {a} + {b}.", "How much is {a} plus {b}?", "Add {a} and {b}.",
       "What is the sum of {a} and {b}?", "Compute {a} + {b}.", "What is {a} plus {b}?", "{a}+{b}")
SUBTRACT = ("What is {a} - {b}?", "{a} - {b} = ?", "Calculate {a} - {b}.", "How much is {a} minus {b}?", "{a}-{b}",
            "Subtract {b} from {a}.", "Compute {a} - {b}.", "What is {a} minus {b}?")
MULTIPLY = ("What is {a} * {b}?", "{a} * {b} = ?", "Calculate {a} * {b}.", "How much is {a} times {b}?", "{a}*{b}",
            "Multiply {a} by {b}.", "Compute {a} * {b}.", "What is {a} times {b}?", "What is {a} x {b}?")


def arithmetic(rng: random.Random) -> Exchange:
    kind = rng.random()
    if kind < 0.42:
        a, b = _operand(rng), _operand(rng)
        question, sign, result = rng.choice(ADD), "+", a + b
    elif kind < 0.82:
        a, b = sorted((_operand(rng), _operand(rng)), reverse=True)
        question, sign, result = rng.choice(SUBTRACT), "-", a - b
    else:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        question, sign, result = rng.choice(MULTIPLY), "*", a * b
    text = vary(rng, question.format(a=a, b=b))
    # The times table has too few products to hold any out: there the wording is held out instead.
    key = text if sign == "*" else f"{a}{sign}{b}"
    equation = f"{a} {sign} {b} = {result}"
    return ask("arithmetic", text, equation, key=f"arithmetic|{key}", brief=equation)


def _operand(rng: random.Random) -> int:
    return rng.randint(0, 99) if rng.random() < 0.8 else rng.randint(0, 12)


COPY = ("Repeat: {t}", "Repeat after me: {t}", "Copy this text: {t}", "Say: {t}", 'Say "{t}".', "Repeat this: {t}",
        "Write exactly this: {t}", 'Repeat the words "{t}".', "Echo: {t}", "Copy: {t}")


def copying(rng: random.Random) -> Exchange:
    text = words.phrase(rng, 1, 9)
    if rng.random() < 0.3:
        text = text.capitalize()
    if rng.random() < 0.15:
        text += f" {rng.randint(0, 999)}"
    question = rng.choice(COPY).format(t=text)
    return ask("copying", question, text, key=f"copying|{text}")


COUNT = ("Count from {a} to {b}.", "Please count from {a} to {b}.", "Can you count from {a} to {b}?",
         "List the numbers from {a} to {b}.", "Write all numbers from {a} to {b}.", "Count {a} to {b}.")


def counting(rng: random.Random) -> Exchange:
    if rng.random() < 0.2:
        b = rng.randint(3, 12)
        question = vary(rng, rng.choice(("Count to {b}.", "Please count to {b}.", "Can you count to {b}?")).format(b=b))
        return ask("counting", question, ", ".join(map(str, range(1, b + 1))))
    a = rng.randint(0, 40) if rng.random() < 0.8 else rng.randint(0, 90)
    b = a + rng.randint(2, 10)
    down = rng.random() < 0.3
    numbers = [str(n) for n in range(a, b + 1)]
    if down:
        a, b, numbers = b, a, numbers[::-1]
    question = rng.choice(COUNT).format(a=a, b=b)
    if down and rng.random() < 0.5:
        question = f"Count down from {a} to {b}."
    return ask("counting", question, ", ".join(numbers), key=f"counting|{a}>{b}")


SORT = ("Sort these numbers: {n}", "Sort: {n}", "Put these numbers in order: {n}", "Sort the numbers {n}.",
        "Please sort {n}.", "Order these numbers from small to large: {n}", "Sort {n} in ascending order.")
SORT_DOWN = ("Sort these numbers from large to small: {n}", "Sort {n} in descending order.",
             "Order these numbers from large to small: {n}")


def sorting(rng: random.Random) -> Exchange:
    top = 9 if rng.random() < 0.3 else 99
    numbers = rng.sample(range(top + 1), rng.choice((3, 3, 4, 4, 5, 5, 6)))
    down = rng.random() < 0.3
    shown = ", ".join(map(str, numbers))
    question = rng.choice(SORT_DOWN if down else SORT).format(n=shown)
    answer = ", ".join(map(str, sorted(numbers, reverse=down)))
    return ask("sorting", question, answer, key=f"sorting|{sorted(numbers)}")


Statement = tuple[tuple[str, ...], str, tuple[str, ...], str, Callable[[random.Random], str]]
STATEMENTS: tuple[Statement, ...] = (
    (("My name is {v}.", "I am {v}.", "Hi, I am {v}.", "Hello, my name is {v}.", "Call me {v}."),
     "Nice to meet you, {v}!", ("What is my name?", "Do you remember my name?", "Who am I?", "Tell me my name.",
                                "What's my name?"), "Your name is {v}.", words.name),
    (("I live in {v}.", "My home is in {v}.", "I moved to {v}."), "I will remember that you live in {v}.",
     ("Where do I live?", "In which city do I live?", "Which city do I live in?"), "You live in {v}.", words.city),
    (("My favorite color is {v}.", "I like the color {v} best."), "I will remember that your favorite color is {v}.",
     ("What is my favorite color?", "Which color do I like best?"), "Your favorite color is {v}.",
     lambda rng: rng.choice(words.COLORS)),
    (("I have a {v}.", "My pet is a {v}."), "I will remember that you have a {v}.",
     ("What pet do I have?", "Which animal do I have?", "What is my pet?"), "You have a {v}.",
     lambda rng: rng.choice(words.PETS)),
    (("I work as {v}.", "I have a job as {v}."), "I will remember that you work as {v}.",
     ("What is my job?", "What do I work as?"), "You work as {v}.", lambda rng: words.a(rng.choice(words.JOBS))),
    (("The secret word is {v}.", "Remember the word {v}.", "The password is {v}."), "I will remember the word {v}.",
     ("What is the secret word?", "Which word did I tell you?", "What was the word?"), "The word is {v}.",
     lambda rng: rng.choice(words.NOUNS) if rng.random() < 0.5 else words.made_up(rng)),
)


def memory(rng: random.Random, between: Callable[[random.Random], Exchange], gap: int | None = None) -> Exchange:
    """The user says something, talks about other things, and asks for it later."""
    told = rng.sample(STATEMENTS, rng.choice((1, 1, 2)))
    messages: list[dict[str, str]] = []
    values = []
    for statements, answer, _, _, draw in told:
        value = draw(rng)
        values.append(value)
        said = rng.choice(statements).format(v=value)
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer.format(v=value)}]
    for _ in range(rng.choice((0, 0, 1, 2, 3)) if gap is None else gap):
        messages += between(rng).messages
    picked = rng.randrange(len(told))
    question, answer = rng.choice(told[picked][2]), told[picked][3].format(v=values[picked])
    if rng.random() < 0.2:
        question = rng.choice(PREFIXES) + question
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    key = f"memory|{values}|{question}"
    return Exchange("memory", key, tuple(messages), expected=answer)
