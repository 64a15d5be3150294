"""Records: a sentence full of facts, and the same facts as JSON of a given schema."""

import json
import random
from dataclasses import dataclass
from typing import Any

from lessons import words
from lessons.exchange import Exchange, Message


@dataclass(frozen=True)
class Field:
    keys: tuple[str, ...]
    type: str  # a JSON schema type; arrays are of strings
    value: Any
    clause: str  # what the sentence says


def _boolean(rng: random.Random, keys: tuple[str, ...], yes: str, no: str) -> Field:
    value = rng.random() < 0.5
    return Field(keys, "boolean", value, yes if value else no)


def _some(rng: random.Random, pool: list[str]) -> list[str]:
    return rng.sample(pool, rng.randint(1, 3))


def person(rng: random.Random) -> tuple[Field, list[Field]]:
    age, town, job, color = rng.randint(5, 99), words.city(rng), rng.choice(words.JOBS), rng.choice(words.COLORS)
    pet, likes, speaks = rng.choice(words.PETS), _some(rng, words.HOBBIES), _some(rng, words.LANGUAGES)
    who = words.name(rng)
    return Field(("name", "first_name", "person", "who"), "string", who, who), [
        Field(("age", "years"), "integer", age, f"is {age} years old"),
        Field(("city", "town", "home"), "string", town, f"lives in {town}"),
        Field(("job", "profession", "work"), "string", job, f"works as {words.a(job)}"),
        Field(("hobbies", "likes", "interests"), "array", likes, f"likes {words.listing(likes)}"),
        Field(("languages", "speaks"), "array", speaks, f"speaks {words.listing(speaks)}"),
        Field(("pet", "animal"), "string", pet, f"has {words.a(pet)}"),
        Field(("favorite_color", "color"), "string", color, f"loves the color {color}"),
        _boolean(rng, ("student", "is_student"), "is a student", "is not a student"),
        _boolean(rng, ("married", "is_married"), "is married", "is not married"),
    ]


def product(rng: random.Random) -> tuple[Field, list[Field]]:
    thing, price, color, weight = (
        rng.choice(words.THINGS),
        rng.randint(1, 999),
        rng.choice(words.COLORS),
        rng.randint(1, 900),
    )
    maker, parts, rating = words.made_up(rng).capitalize(), _some(rng, words.THINGS), rng.randint(1, 5)
    return Field(("name", "product", "item"), "string", thing, f"The {thing}"), [
        Field(("price", "cost"), "integer", price, f"costs {price} dollars"),
        Field(("color",), "string", color, f"is {color}"),
        Field(("weight", "grams"), "integer", weight, f"weighs {weight} grams"),
        Field(("maker", "brand", "company"), "string", maker, f"is made by {maker}"),
        Field(("parts", "extras"), "array", parts, f"comes with {words.listing(parts)}"),
        Field(("rating", "stars"), "integer", rating, f"has {rating} stars"),
        _boolean(rng, ("in_stock", "available"), "is in stock", "is not in stock"),
        _boolean(rng, ("new", "is_new"), "is new", "is not new"),
    ]


def book(rng: random.Random) -> tuple[Field, list[Field]]:
    title = f"The {rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}".title()
    author, year, pages = words.name(rng), rng.randint(1900, 2025), rng.randint(40, 900)
    about, tongue = _some(rng, words.TOPICS), rng.choice(words.LANGUAGES)
    return Field(("title", "book", "name"), "string", title, f'"{title}"'), [
        Field(("author", "writer"), "string", author, f"was written by {author}"),
        Field(("year", "published"), "integer", year, f"came out in {year}"),
        Field(("pages", "length"), "integer", pages, f"has {pages} pages"),
        Field(("topics", "genres", "tags"), "array", about, f"is about {words.listing(about)}"),
        Field(("language",), "string", tongue, f"is in {tongue}"),
        _boolean(rng, ("sold_out", "is_sold_out"), "is sold out", "is not sold out"),
    ]


def event(rng: random.Random) -> tuple[Field, list[Field]]:
    what = rng.choice(["concert", "meeting", "party", "workshop", "race", "dinner", "lesson", "exhibition"])
    town, day, guests, hour = words.city(rng), rng.choice(words.DAYS), rng.randint(2, 500), rng.randint(1, 12)
    speakers = [words.name(rng) for _ in range(rng.randint(1, 3))]
    return Field(("event", "name", "what"), "string", what, f"The {what}"), [
        Field(("city", "place", "location", "where"), "string", town, f"takes place in {town}"),
        Field(("day", "weekday", "when"), "string", day, f"is on {day}"),
        Field(("guests", "people", "visitors"), "integer", guests, f"has {guests} guests"),
        Field(("hour", "start"), "integer", hour, f"starts at {hour} o'clock"),
        Field(("speakers", "hosts"), "array", speakers, f"is led by {words.listing(speakers)}"),
        _boolean(rng, ("free", "is_free"), "is free", "is not free"),
    ]


def sighting(rng: random.Random) -> tuple[str, list[Field]]:
    animals = rng.sample([*words.ANIMALS, "puppy", "raccoon"], rng.randint(1, 4))
    activity = rng.choice(["bike ride", "walk", "run", "picnic", "boat trip", "hike"])
    where = rng.choice(["park", "forest", "garden", "city", "zoo", "village", "mountains"])
    seen = words.listing([words.a(animal) for animal in animals])
    if rng.random() < 0.2:
        seen = seen.replace(",", "")
    return f"I saw {seen} during my {activity} in the {where}", [
        Field(("location", "place"), "string", where, ""),
        Field(("activity",), "string", activity, ""),
        Field(("animals_seen", "count"), "integer", len(animals), ""),
        Field(("animals",), "array", animals, ""),
    ]


def _sentence(rng: random.Random, subject: Field, fields: list[Field]) -> str:
    if rng.random() < 0.75:
        return f"{subject.clause} {words.listing([field.clause for field in fields])}."
    return " ".join(f"{subject.clause} {field.clause}." for field in fields)


def schema_of(fields: dict[str, Field], *, required: bool, titles: bool) -> dict[str, Any]:
    """A JSON schema as people write it, or as pydantic does when it has titles."""
    properties: dict[str, Any] = {}
    for key, field in fields.items():
        properties[key] = (
            {"type": field.type} if not titles else {"title": key.replace("_", " ").title(), "type": field.type}
        )
        if field.type == "array":
            properties[key]["items"] = {"type": "string"}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | {"required": list(fields)} if required else schema


INTROS = (
    "Answer as JSON of this schema: {s}",
    "Answer as JSON of this schema: {s}",
    "Write JSON of this schema: {s}",
    "Extract the data as JSON of this schema: {s}",
    "Use this JSON schema: {s}",
)


def record(rng: random.Random) -> Exchange:
    if rng.random() < 0.12:
        sentence, fields = sighting(rng)
        sentence += rng.choice((".", ""))
    else:
        subject, others = rng.choice((person, person, product, product, book, event))(rng)
        told = rng.sample(others, rng.randint(1, min(5, len(others))))
        sentence = _sentence(rng, subject, told)
        fields = [subject, *told]
    picked = rng.sample(fields, rng.randint(1, len(fields)))
    if rng.random() < 0.6:
        picked = fields if rng.random() < 0.7 else rng.sample(fields, len(fields))
    keyed: dict[str, Field] = {}
    for field in picked:
        key = rng.choice(field.keys) if rng.random() < 0.6 else field.keys[0]
        keyed.setdefault(key, field)
    schema = json.dumps(schema_of(keyed, required=rng.random() < 0.5, titles=rng.random() < 0.1))
    intro = rng.choice(INTROS).format(s=schema)
    values = {key: field.value for key, field in keyed.items()}
    layout, system = rng.randrange(4), ""
    if layout == 0:
        system, content = intro, sentence
    elif layout == 1:
        content = f"{intro}\n{sentence}"
    else:
        content = f"{sentence}\n{intro}"
    messages: tuple[Message, ...] = (
        {"role": "user", "content": content},
        {"role": "assistant", "content": json.dumps(values)},
    )
    return Exchange("json", f"json|{sentence}", messages, "json", values, system=system)
