"""Stories: short tales composed from slots, so that hero, place, friend and thing stay the same to the end."""

import random
import re

from lessons import words
from lessons.exchange import PREFIXES, Exchange

PLACES = ("in the forest", "by the sea", "on the moon", "in a castle", "in a small village", "on an island",
          "in the mountains",
          "on a farm", "in a big city", "in the desert", "in a garden", "under the sea", "in an old house", "on a ship",
          "in the jungle", "near the river", "in a library", "at a school", "in a cave", "in the snow", "on a hill",
          "in a train", "in the zoo", "by the lake", "in a toy shop", "in a tower")
FOLK = ("robot", "dragon", "knight", "princess", "wizard", "pirate", "giant", "witch", "king", "queen", "ghost",
        "fairy")
ITEMS = ("red kite", "golden key", "old map", "silver bell", "magic lamp", "blue ball", "little drum", "wooden flute",
         "shiny stone", "warm scarf", "big book", "green hat")
FOODS = ("bread", "apple pie", "honey cake", "berries", "soup", "cheese")
DREAMS = ("fly", "sing", "swim", "dance", "paint", "read")

# {H} is the hero as first named, {h} later on, {p} the place, {f} the friend, {i} a thing, {e} some food, {d} a dream.
OPENINGS = ("Once upon a time, {H} lived {p}.", "Once upon a time, there was {H} who lived {p}.",
            "Long ago, {H} lived {p}.")
PLOTS = (
    "One morning, {h} could not find the {i}. {C} looked under every stone, but it was not there. Then {f} came by. "
    '"I saw your {i} behind the old tree," said {f}. They ran there together and found it.',
    "One day, {h} heard a small voice. It was {f}, stuck in a deep hole. {C} took a long rope and pulled hard. "
    "Soon {f} was free and gave {h} the {i} to say thank you.",
    "One evening, a big storm came. {C} was cold and afraid. Then {f} opened a door and called, "
    '"Come in!" They ate {e} together and waited until the sun came out again.',
    "One day, {h} was very hungry and had no food. Then {f} came along with some {e}. "
    '"Let us share it," said {f}. They sat in the sun and ate until nothing was left.',
    "{C} had one big dream: to learn to {d}. Every day {h} tried, and every day it went wrong. Then {f} said, "
    '"Do not give up. I will help you." After many days, {h} could {d} at last.',
    "One day, {h} found the {i} on the ground. {C} asked everyone who had lost it. At last {f} shouted, "
    '"That is mine!" {C} gave it back, and {f} danced with joy.',
    "{C} had no friends and felt lonely. One day, {f} knocked at the door with some {e}. "
    '"Do you want to play with me?" asked {f}. They played until the stars came out.',
    "It was the birthday of {f}, and {h} wanted to bring a gift. {C} looked everywhere and found the {i}. "
    '"This is the best gift of all!" said {f}. Then they all ate {e} and sang.',
)
ENDINGS = ("From that day on, {h} and {f} were best friends. The end.",
           "{C} was happy and slept well that night. The end.",
           "And {h} never felt alone again. The end.")


def tell(rng: random.Random, hero: str, place: str) -> str:
    """A story about a hero such as 'fox' or 'Mia' at a place such as 'in the forest'."""
    named = hero[0].isupper()
    later = hero if named else f"the {hero}"
    friend = "the " + rng.choice([animal for animal in words.ANIMALS if animal != hero])
    item = rng.choice(ITEMS)
    slots = {"H": hero if named else words.a(hero), "h": later, "C": later[0].upper() + later[1:], "p": place,
             "f": friend,
             "i": item, "e": rng.choice(FOODS), "d": rng.choice(DREAMS)}
    parts = (rng.choice(OPENINGS), rng.choice(PLOTS), rng.choice(ENDINGS))
    text = " ".join(part.format(**slots) for part in parts)
    return text.replace(f"there was {hero} who", f"there was a child called {hero} who") if named else text


REQUESTS = ("Tell me a story about {H} {p}.", "Write a short story about {H} {p}.",
            "Please tell me a story about {H} {p}.",
            "Tell a story about {H} {p}.", "I want a story about {H} who lives {p}.",
            "Can you tell me a story about {H} {p}?",
            "Tell me a short story. The hero is {H} and it happens {p}.", "Make up a story about {H} {p}.",
            "Write a story. Hero: {b}. Place: {p}.", "A story about {H} {p}, please.", "Write a tale about {H} {p}.")
OPEN_REQUESTS = ("Tell me a story.", "Can you tell me a story?", "Please write a short story.",
                 "I want to hear a story.",
                 "Write a story.", "Tell me a short story, please.")


def hero(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(words.ANIMALS)
    return rng.choice(FOLK) if kind < 0.6 else words.name(rng)


def place(rng: random.Random) -> str:
    return rng.choice(PLACES) if rng.random() < 0.85 else f"in {words.city(rng)}"


def story(rng: random.Random) -> Exchange:
    who, where = hero(rng), place(rng)
    if rng.random() < 0.08:
        question, key = rng.choice(OPEN_REQUESTS), "open"
    else:
        shown = who if who[0].isupper() else words.a(who)
        question = rng.choice(REQUESTS).format(H=shown, b=who, p=where)
        key = f"story|{who}|{where}"
    if rng.random() < 0.2:
        question = rng.choice(PREFIXES) + question
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": tell(rng, who, where)})
    return Exchange("story", key, messages, "story", (who, where) if key != "open" else ("", ""))


def coherent(text: str, who: str, where: str) -> bool:
    """Hero and place (where asked for) appear, friend and thing stay the same, and the story comes to its end."""
    if not text.endswith("The end.") or len(text.split()) < 30 or where not in text or text.count(who) < 2:
        return False
    friends = {animal for animal in words.ANIMALS if re.search(rf"\bthe {animal}\b", text, re.I)} - {who}
    items = {item for item in ITEMS if item in text}
    foods = {food for food in FOODS if food in text}
    dreams = {dream for dream in DREAMS if f"learn to {dream}" in text or f"could {dream}" in text}
    cast = 1 if who else 2  # an unnamed hero may be an animal too
    return 1 <= len(friends) <= cast and len(items) <= 1 and len(foods) <= 1 and len(dreams) <= 1


def opening(rng: random.Random) -> str:
    """A story as plain text, without any chat around it."""
    return tell(rng, hero(rng), place(rng))
