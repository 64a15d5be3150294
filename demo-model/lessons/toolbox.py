"""Toolbox: families of tools under many names, questions that need them, and answers from their results."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lessons import words
from lessons.exchange import Exchange, Message, Tool, vary


@dataclass(frozen=True)
class Use:
    """One call: what the user asks, the argument values in the family's order, the result and the final answer."""

    question: str
    values: tuple[Any, ...]
    result: dict[str, Any] | str
    answer: str
    shown: tuple[str, ...]  # what a good final answer must contain


@dataclass(frozen=True)
class Family:
    names: tuple[str, ...]
    about: tuple[str, ...]
    parameters: tuple[tuple[tuple[str, ...], str], ...]  # possible names and the JSON type, one entry per argument
    draw: Callable[[random.Random], Use]
    sums: bool = False  # with one of these on offer, sums are the tool's work


def _weather(rng: random.Random) -> Use:
    city, degrees = words.city(rng), rng.randint(-9, 39)
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "stormy"))
    question = rng.choice(("What is the weather in {c}?", "How is the weather in {c}?", "Is it raining in {c}?",
                           "What's the weather like in {c}?", "Tell me the weather in {c}.", "How warm is it in {c}?",
                           "What is the weather like in {c} today?", "Weather in {c}?")).format(c=city)
    result: dict[str, Any] | str = {rng.choice(("temperature", "degrees", "temp")): degrees,
                                    rng.choice(("condition", "sky", "weather")): sky}
    if rng.random() < 0.25:
        result = f"{sky}, {degrees} degrees"
    return Use(question, (city,), result, f"It is {sky} in {city} with {degrees} degrees.", (city, sky, str(degrees)))


def _time(rng: random.Random) -> Use:
    city, clock = words.city(rng), f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    question = rng.choice(("What time is it in {c}?", "What is the time in {c}?", "How late is it in {c}?",
                           "Tell me the time in {c}.", "What's the current time in {c}?")).format(c=city)
    result: dict[str, Any] | str = {rng.choice(("time", "local_time",
                                                "clock")): clock} if rng.random() < 0.75 else clock
    return Use(question, (city,), result, f"It is {clock} in {city}.", (city, clock))


def _sum(rng: random.Random) -> Use:
    a, b = rng.randint(2, 9999), rng.randint(2, 9999)
    question = rng.choice(("What is {a} + {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?",
                           "How much is {a} plus {b}?", "Compute {a} + {b}.")).format(a=a, b=b)
    return Use(question, (a, b), _number(rng, a + b), f"The result is {a + b}.", (str(a + b),))


def _product(rng: random.Random) -> Use:
    a, b = rng.randint(2, 999), rng.randint(2, 999)
    question = rng.choice(("What is {a} * {b}?", "Multiply {a} by {b}.", "How much is {a} times {b}?",
                           "Compute {a} * {b}.",
                           "What is {a} times {b}?")).format(a=a, b=b)
    return Use(question, (a, b), _number(rng, a * b), f"The result is {a * b}.", (str(a * b),))


def _calculator(rng: random.Random) -> Use:
    a, b, sign = rng.randint(2, 999), rng.randint(2, 999), rng.choice("+-*")
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    expression = f"{a} {sign} {b}"
    question = rng.choice(("What is {e}?", "Calculate {e}.", "How much is {e}?", "Compute {e}.")).format(e=expression)
    return Use(question, (expression,), _number(rng, value), f"The result is {value}.", (str(value),))


def _number(rng: random.Random, value: int) -> dict[str, Any] | str:
    if rng.random() < 0.25:
        return str(value)
    return {rng.choice(("result", "value", "answer")): value}


MONEY = ("USD", "EUR", "GBP", "JPY", "CHF", "INR")


def _currency(rng: random.Random) -> Use:
    amount, (source, target), got = rng.randint(1, 999), rng.sample(MONEY, 2), rng.randint(1, 9999)
    question = rng.choice(("Convert {a} {s} to {t}.", "How much is {a} {s} in {t}?", "What are {a} {s} in {t}?",
                           "Change {a} {s} into {t}.")).format(a=amount, s=source, t=target)
    result = {rng.choice(("result", "amount", "converted")): got}
    return Use(question, (amount, source, target), result, f"{amount} {source} are {got} {target}.", (str(got), target))


def _search(rng: random.Random) -> Use:
    query = f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS + words.ANIMALS)}"
    if rng.random() < 0.5:
        query = f"{rng.choice(words.TOPICS)} in {words.city(rng)}"
    question = rng.choice(("Search the web for {q}.", "Look up {q}.", "Find something about {q}.", "Search for {q}.",
                           "Can you search the internet for {q}?")).format(q=query)
    found = words.phrase(rng)
    result = {rng.choice(("result", "text", "snippet")): found}
    return Use(question, (query,), result, f"I found this: {found}", (found,))


def _message(rng: random.Random) -> Use:
    to, text = words.name(rng), rng.choice(("I am late", "see you soon", "happy birthday", "dinner is ready",
                                            "call me back",
                                            "the meeting is over", words.phrase(rng, 2, 4)))
    question = rng.choice(('Send "{x}" to {n}.', 'Send a message to {n}: {x}', 'Tell {n}: {x}', 'Text {n} that {x}.',
                           'Write to {n}: {x}')).format(n=to, x=text)
    result: dict[str, Any] | str = {"status": "sent"} if rng.random() < 0.75 else "sent"
    return Use(question, (to, text), result, f"I sent your message to {to}.", ("sent", to))


def _reminder(rng: random.Random) -> Use:
    task = f"{rng.choice(['buy', 'wash', 'clean', 'bring', 'call', 'find'])} the {rng.choice(words.NOUNS)}"
    clock = f"{rng.randint(1, 12)} {rng.choice(('am', 'pm'))}"
    question = rng.choice(("Remind me to {x} at {t}.", "Set a reminder at {t}: {x}", "Please remind me at {t} to {x}.",
                           "At {t} I must {x}. Remind me.")).format(x=task, t=clock)
    return Use(question, (task, clock), {"status": "ok"}, f"I will remind you to {task} at {clock}.", (task, clock))


def _timer(rng: random.Random) -> Use:
    minutes = rng.randint(1, 90)
    question = rng.choice(("Set a timer for {m} minutes.", "Start a timer of {m} minutes.", "Wake me in {m} minutes.",
                           "I need a timer for {m} minutes.")).format(m=minutes)
    return Use(question, (minutes,), {"status": "ok"}, f"The timer is set for {minutes} minutes.", (str(minutes),))


def _music(rng: random.Random) -> Use:
    who = words.name(rng) if rng.random() < 0.5 else f"the {rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}"
    question = rng.choice(("Play music by {n}.", "Play something by {n}.", "I want to hear songs by {n}.",
                           "Put on some music by {n}.")).format(n=who)
    song = rng.choice(words.NOUNS).title()
    return Use(question, (who,), {"playing": song}, f"Now playing {song} by {who}.", (song, who))


def _light(rng: random.Random) -> Use:
    room = rng.choice(["kitchen", "bedroom", "bathroom", "office", "garage", "garden", "hall", "cellar"])
    on = rng.random() < 0.5
    word = "on" if on else "off"
    question = rng.choice(("Turn {w} the light in the {r}.", "Switch {w} the {r} light.", "Turn the {r} light {w}.",
                           "Light {w} in the {r}, please.")).format(w=word, r=room)
    return Use(question, (room, on), {"status": "ok"}, f"The light in the {room} is {word}.", (room, word))


def _translate(rng: random.Random) -> Use:
    word, tongue, got = rng.choice(words.NOUNS + words.ANIMALS), rng.choice(words.LANGUAGES), words.made_up(rng)
    question = rng.choice(("Translate {w} into {l}.", "What is {w} in {l}?", "How do you say {w} in {l}?",
                           "Translate the word {w} to {l}.")).format(w=word, l=tongue)
    result = {rng.choice(("translation", "text", "result")): got}
    return Use(question, (word, tongue), result, f"{word.capitalize()} in {tongue} is {got}.", (got, tongue))


def _stock(rng: random.Random) -> Use:
    firm, price = words.made_up(rng).capitalize(), rng.randint(1, 900)
    question = rng.choice(("What is the stock price of {f}?", "How much is a share of {f}?", "Stock price of {f}?",
                           "What does one {f} share cost?")).format(f=firm)
    result = {rng.choice(("price", "value", "usd")): price}
    return Use(question, (firm,), result, f"The stock price of {firm} is {price} dollars.", (firm, str(price)))


def _news(rng: random.Random) -> Use:
    topic, headline = rng.choice(words.TOPICS), words.phrase(rng).capitalize()
    question = rng.choice(("What is the news about {t}?", "Give me the latest news on {t}.", "Any news about {t}?",
                           "Show me news about {t}.")).format(t=topic)
    result = {rng.choice(("headline", "title", "news")): headline}
    return Use(question, (topic,), result, f"The news about {topic}: {headline}", (headline,))


def _distance(rng: random.Random) -> Use:
    (a, b), far = rng.sample(words.CITIES, 2), rng.randint(20, 9999)
    question = rng.choice(("How far is it from {a} to {b}?", "What is the distance from {a} to {b}?",
                           "How many kilometers is it from {a} to {b}?")).format(a=a, b=b)
    result = {rng.choice(("distance", "km", "kilometers")): far}
    return Use(question, (a, b), result, f"It is {far} kilometers from {a} to {b}.", (str(far), a, b))


_CITY = ("city", "location", "place", "town")
FAMILIES: tuple[Family, ...] = (
    Family(("get_weather", "weather", "current_weather", "get_current_weather", "weather_in"),
           ("Get the weather in a city", "Current weather of a place"), ((_CITY, "string"),), _weather),
    Family(("get_time", "current_time", "time_in", "get_local_time", "clock"),
           ("Get the time in a city", "Local time of a place"), ((_CITY, "string"),), _time),
    Family(("add", "add_numbers", "sum", "plus"), ("Add two numbers", "Sum of two integers"),
           ((("a", "x", "first"), "integer"), (("b", "y", "second"), "integer")), _sum, sums=True),
    Family(("multiply", "times", "product", "multiply_numbers"), ("Multiply two numbers", "Product of two integers"),
           ((("a", "x", "first"), "integer"), (("b", "y", "second"), "integer")), _product, sums=True),
    Family(("calculator", "calculate", "evaluate", "math"), ("Evaluate an expression", "Compute a result"),
           ((("expression", "formula", "input"), "string"),), _calculator, sums=True),
    Family(("convert_currency", "exchange", "convert_money"), ("Convert money",
                                                               "Convert an amount to another currency"),
           ((("amount", "value"), "integer"), (("from", "source", "from_currency"), "string"),
            (("to", "target", "to_currency"), "string")), _currency),
    Family(("search", "web_search", "search_web", "find"), ("Search the web", "Find pages on the internet"),
           ((("query", "q", "text"), "string"),), _search),
    Family(("send_message", "send_sms", "message", "send_text"), ("Send a message", "Send a text to a person"),
           ((("to", "recipient", "name"), "string"), (("text", "message", "body"), "string")), _message),
    Family(("set_reminder", "create_reminder", "remind", "add_reminder"), ("Set a reminder", "Remind the user"),
           ((("text", "task", "title"), "string"), (("time", "at"), "string")), _reminder),
    Family(("set_timer", "start_timer", "timer"), ("Set a timer", "Start a timer"),
           ((("minutes", "duration", "min"), "integer"),), _timer),
    Family(("play_music", "play", "play_artist"), ("Play music", "Play songs of an artist"),
           ((("artist", "band", "by"), "string"),), _music),
    Family(("set_light", "switch_light", "light"), ("Switch a light", "Turn a light on or off"),
           ((("room", "where"), "string"), (("on", "state", "turn_on"), "boolean")), _light),
    Family(("translate", "translate_word", "translator"), ("Translate a word", "Translate a text"),
           ((("text", "word"), "string"), (("language", "to", "target"), "string")), _translate),
    Family(("get_stock_price", "stock_price", "share_price"), ("Get a stock price", "Price of a share"),
           ((("company", "name", "stock"), "string"),), _stock),
    Family(("get_news", "news", "latest_news"), ("Get the news", "Latest news about a topic"),
           ((("topic", "subject"), "string"),), _news),
    Family(("get_distance", "distance", "how_far"), ("Distance of two cities", "Get the distance"),
           ((("from", "start", "origin"), "string"), (("to", "end", "destination"), "string")), _distance),
)
NO_TOOL = "Sorry, I have no tool for that."
ACTIONS = ["open", "close", "start", "stop", "check", "order", "book", "delete", "show", "count", "lock", "find",
           "move", "update", "cancel", "paint"]


def invented(rng: random.Random) -> Family:
    """A tool that exists nowhere else, so that signatures are read and not remembered."""
    action, noun = rng.choice(ACTIONS), rng.choice(words.NOUNS + words.THINGS)
    number = rng.random() < 0.4

    def draw(rng: random.Random) -> Use:
        value: int | str = rng.randint(1, 999) if number else words.name(rng)
        question = rng.choice(("{a} the {n} {v}.", "Please {a} the {n} {v}.", "Can you {a} the {n} {v}?",
                               "I want you to {a} the {n} {v}.", "{a} {n} {v}")).format(a=action, n=noun, v=value)
        if rng.random() < 0.5:
            return Use(question[0].upper() + question[1:], (value,), {"status": rng.choice(("ok", "done"))},
                       "It is done.",
                       ("done",))
        got = rng.randint(0, 999) if rng.random() < 0.5 else words.made_up(rng)
        return Use(question[0].upper() + question[1:], (value,), {rng.choice(("result", "value", noun)): got},
                   f"The result is {got}.", (str(got),))

    keys = ("number", f"{noun}_id", "id") if number else ("name", f"{noun}_name", noun)
    return Family((f"{action}_{noun}",), (f"{action.capitalize()} the {noun}",
                                          f"{action.capitalize()} {words.a(noun)}"),
                  ((keys, "integer" if number else "string"),), draw)



def signature(rng: random.Random, family: Family) -> tuple[Tool, list[str]]:
    """A tool as the API takes it, and the names of its parameters in the family's order."""
    keys = [rng.choice(names) if rng.random() < 0.7 else names[0] for names, _ in family.parameters]
    keys = [key if key not in keys[:at] else f"{key}_{at}" for at, key in enumerate(keys)]
    properties: dict[str, Any] = {}
    for key, (_, kind) in zip(keys, family.parameters, strict=True):
        properties[key] = {"type": kind}
        if rng.random() < 0.15:
            properties[key]["description"] = f"The {key.replace('_', ' ')}"
    function: dict[str, Any] = {"name": rng.choice(family.names)}
    if rng.random() < 0.85:
        function["description"] = rng.choice(family.about) + rng.choice(("", "", "."))
    function["parameters"] = {"type": "object", "properties": properties, "required": keys}
    return {"type": "function", "function": function}, keys


@dataclass(frozen=True)
class Offer:
    """One to three tools with the names their parameters have this time."""

    families: tuple[Family, ...]
    tools: tuple[Tool, ...]
    keys: tuple[list[str], ...]

    @property
    def sums(self) -> bool:
        return any(family.sums for family in self.families)


def offer(rng: random.Random) -> Offer:
    families = rng.sample(FAMILIES, rng.choice((1, 1, 2, 2, 3)))
    if sum(family.sums for family in families) > 1:
        families = families[:1]
    families = [invented(rng) if rng.random() < 0.2 else family for family in families]
    signed = [signature(rng, family) for family in families]
    return Offer(tuple(families), tuple(tool for tool, _ in signed), tuple(keys for _, keys in signed))


def use(rng: random.Random, offered: Offer) -> tuple[Exchange, Exchange]:
    """The same four messages graded at the call, and at the answer after the result."""
    picked = rng.randrange(len(offered.tools))
    drawn = offered.families[picked].draw(rng)
    name = offered.tools[picked]["function"]["name"]
    call = {"name": name, "arguments": dict(zip(offered.keys[picked], drawn.values, strict=True))}
    question = vary(rng, drawn.question) if rng.random() < 0.3 else drawn.question
    if question.islower():
        question = drawn.question  # a lower-cased city could not be told from the right one
    content = drawn.result if isinstance(drawn.result, str) else json.dumps(drawn.result)
    messages: tuple[Message, ...] = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "name": name, "content": content},
        {"role": "assistant", "content": drawn.answer},
    )
    key = f"tool|{drawn.question}"
    return (Exchange("tool_call", key, messages, "call", call, tools=offered.tools, graded=1),
            Exchange("tool_result", key, messages, "contains", drawn.shown, tools=offered.tools, graded=3))


def refuse(rng: random.Random, offered: tuple[Family, ...] = ()) -> Exchange:
    """A question for a tool that is not on offer."""
    others = [family for family in FAMILIES if family not in offered and not family.sums and family.draw is not _search]
    question = rng.choice(others).draw(rng).question
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": NO_TOOL})
    return Exchange("no_tool", f"refuse|{question}", messages, expected=NO_TOOL)
