"""The curriculum: its answers are right, and what is held out is never trained on."""

import itertools
import json
import random
import re

import pytest

import curriculum
from lessons import facts, records, skills, stories, toolbox
from lessons.exchange import Exchange, Message, grade, held_out


def _gold(exchange: Exchange) -> str:
    message = exchange.messages[exchange.graded]
    calls = message.get("tool_calls")
    return f"<tool_call>\n{json.dumps(calls[0]['function'])}\n</tool_call>" if calls else str(message["content"])


@pytest.mark.parametrize("task", sorted(curriculum.EXAMS))
def test_the_curriculums_own_answer_gets_full_marks(task: str) -> None:
    rng = random.Random(3)
    for _ in range(100):
        exchange = curriculum.EXAMS[task](rng)
        assert exchange.task == task
        assert grade(exchange, _gold(exchange)), exchange


@pytest.mark.parametrize("task", sorted(curriculum.EXAMS))
def test_a_wrong_answer_gets_no_marks(task: str) -> None:
    assert not any(grade(exchange, "something else") for exchange in curriculum.examination(task, 20))


def test_sums_really_add_up() -> None:
    rng = random.Random(1)
    for _ in range(500):
        a, sign, b, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", _gold(skills.arithmetic(rng))).groups()  # type: ignore[union-attr]
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result)


def test_sorted_numbers_are_the_numbers_asked_for() -> None:
    rng = random.Random(1)
    for _ in range(200):
        exchange = skills.sorting(rng)
        asked = [int(n) for n in re.findall(r"\d+", exchange.messages[0]["content"])]
        answer = [int(n) for n in exchange.expected.split(", ")]
        assert answer in (sorted(asked), sorted(asked, reverse=True))


def test_counting_goes_in_steps_of_one() -> None:
    rng = random.Random(1)
    for _ in range(200):
        numbers = [int(n) for n in skills.counting(rng).expected.split(", ")]
        assert len({b - a for a, b in itertools.pairwise(numbers)}) == 1
        assert abs(numbers[1] - numbers[0]) == 1


def test_a_record_has_the_types_of_its_schema() -> None:
    rng = random.Random(2)
    kinds = {"string": str, "integer": int, "boolean": bool, "array": list}
    for _ in range(200):
        exchange = records.record(rng)
        shown = exchange.system or exchange.messages[0]["content"]
        schema, _ = json.JSONDecoder().raw_decode(shown[shown.index("{") :])
        assert list(schema["properties"]) == list(exchange.expected)
        for key, value in exchange.expected.items():
            assert type(value) is kinds[schema["properties"][key]["type"]]


def test_a_call_names_an_offered_tool_and_all_of_its_parameters() -> None:
    rng = random.Random(2)
    for _ in range(200):
        exchange = curriculum.called(rng)
        tools = {tool["function"]["name"]: tool["function"]["parameters"]["required"] for tool in exchange.tools}
        assert tools[exchange.expected["name"]] == list(exchange.expected["arguments"])


def test_a_story_with_two_friends_or_without_an_end_is_not_coherent() -> None:
    story = stories.tell(random.Random(4), "Mia", "in the forest")
    assert stories.coherent(story, "Mia", "in the forest")
    assert not stories.coherent(story.replace("The end.", ""), "Mia", "in the forest")
    assert not stories.coherent("The owl and the fox met. " + story, "Mia", "in the forest")
    assert not stories.coherent(story, "Tom", "in the forest")


def test_the_stream_is_the_same_for_the_same_seed() -> None:
    first, second = (list(itertools.islice(curriculum.conversations(5), 50)) for _ in range(2))
    assert first == second


def test_no_examined_question_is_in_the_training_stream() -> None:
    examined: set[Pair] = set()
    for task in curriculum.EXAMS:
        for exchange in curriculum.examination(task, 100):
            assert held_out(exchange.key)
            if task not in ("memory", "system"):  # whose questions are short, and only new together with what was said
                examined.add(_pairs(exchange.messages)[0])
    talks = itertools.islice(curriculum.conversations(1_000_003), 3000)
    trained = {pair for talk in talks for pair in _pairs(talk.messages)}
    assert not examined & trained


Pair = tuple[str, str]


def _pairs(messages: tuple[Message, ...]) -> list[Pair]:
    """Questions with the first words of their answers: what is a tool's in one talk may be refused in another."""
    return [(asked["content"], str(follows["content"])[:20]) for asked, follows in itertools.pairwise(messages)]


def test_every_capital_has_one_country() -> None:
    assert len(set(facts.CAPITALS.values())) == len(facts.CAPITALS) >= 60


def test_a_refused_question_is_for_a_tool_that_is_not_offered() -> None:
    rng = random.Random(6)
    for _ in range(100):
        offered = toolbox.offer(rng)
        assert toolbox.refuse(rng, offered.families).expected == toolbox.NO_TOOL
