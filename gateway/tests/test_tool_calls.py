"""Answers in the form of every family, whole and cut at every place, and what only looks like a call."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from tgi_gateway.prompt.answer import CallArguments, CallBegin, Delta, Text, Thought, joined
from tgi_gateway.prompt.reasoning import REASONING, Marks, marks_of
from tgi_gateway.prompt.tools import FAMILIES, Tool, family_of, parser
from tgi_gateway.testing.worker import Worker

WEATHER = Tool(
    "get_weather",
    "Weather of a city",
    {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
)
ADD = Tool("add", None, {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}})
TOOLS = (WEATHER, ADD)
THINK = REASONING["think"]
PARIS, BOTH = [("get_weather", {"city": "Paris"})], [("get_weather", {"city": "Paris"}), ("add", {"a": 1, "b": -2.5})]
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris"}\n```<｜tool▁call▁end｜>'
)

# family, what the model wrote, the words in it, the calls in it
RECORDED = [
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", PARIS),
    (
        "hermes",
        'Let me see.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": -2.5}}\n</tool_call>',
        "Let me see.",
        BOTH,
    ),
    (
        "hermes",
        '<tool_call>{"arguments":{"city":"Paris"},"name":"get_weather"}</tool_call> That is all.',
        " That is all.",
        PARIS,
    ),
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "</tool_call> \\"}{][ é🙂\\\\"}}\n</tool_call>',
        "",
        [("get_weather", {"city": '</tool_call> "}{][ é🙂\\'})],
    ),
    ("hermes", '<tool_call>\n{"name": "add", "arguments": "{\\"a\\": 1}"}\n</tool_call>', "", [("add", {"a": 1})]),
    ("hermes", '<tool_call>\n{"name": "add"}\n</tool_call>', "", [("add", {})]),
    ("hermes", '<tool_call>\n{"name": "add", "arguments": null}\n</tool_call>', "", [("add", {})]),
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": -2.5}}\n',
        "",
        BOTH,
    ),
    (
        "hermes",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n-2.5\n</parameter>\n</function>\n"
        "</tool_call>",
        "",
        BOTH,
    ),
    ("hermes", "<tool_call>\n<function=add>\n</function>\n</tool_call>", "", [("add", {})]),
    (
        "hermes",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n12\n</parameter>\n"
        "</function>\n</tool_call>",
        "",
        [("get_weather", {"city": "12", "days": 12})],
    ),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", PARIS),
    (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "add", "parameters": {"a": 1, "b": -2.5}}',
        "",
        BOTH,
    ),
    (
        "llama3_json",
        'I look.\n<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}',
        "I look.",
        PARIS,
    ),
    ("pythonic", "[get_weather(city='Paris'), add(a=1, b=-2.5)]", "", BOTH),
    ("pythonic", '<|python_start|>[get_weather(city="Paris")]<|python_end|>', "", PARIS),
    (
        "pythonic",
        "[get_weather(city='a, (b) ]\\'', days=None), add(a=[1, {'x': True}], b=())]",
        "",
        [("get_weather", {"city": "a, (b) ]'", "days": None}), ("add", {"a": [1, {"x": True}], "b": []})],
    ),
    ("pythonic", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", PARIS),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "VvvODy9mT"}, '
        '{"name": "add", "arguments": {"a": 1, "b": -2.5}}]',
        "",
        BOTH,
    ),
    ("mistral", 'Sure.[TOOL_CALLS]{"name": "get_weather", "arguments": {"city": "Paris"}}', "Sure.", PARIS),
    (
        "mistral_args",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 1, "b": -2.5}',
        "",
        BOTH,
    ),
    ("mistral_args", '[TOOL_CALLS]get_weather{"city": "Paris"}', "", PARIS),
    ("deepseek_v3", f"Wait.{DEEPSEEK}<｜tool▁calls▁end｜>", "Wait.", PARIS),
    (
        "deepseek_v3",
        f"{DEEPSEEK}\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 1, "b": -2.5}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "",
        BOTH,
    ),
    (
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": -2.5}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "",
        BOTH,
    ),
    (
        "command_r",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}},\n'
        '    {"tool_call_id": "1", "tool_name": "add", "parameters": {"a": 1, "b": -2.5}}\n]<|END_ACTION|>',
        "",
        BOTH,
    ),
    ("command_r", "<|START_RESPONSE|>It is warm.<|END_RESPONSE|>", "It is warm.", []),
    (
        "command_r_plus",
        'Action: ```json\n[\n    {\n        "tool_name": "get_weather",\n        "parameters": {\n'
        '            "city": "Paris"\n        }\n    }\n]\n```',
        "",
        PARIS,
    ),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>'
        '{"a": 1, "b": -2.5}<|tool_call_end|><|tool_calls_section_end|>',
        "",
        BOTH,
    ),
    (
        "hermes",
        "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>\n"
        "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n"
        "<arg_value>-2.5</arg_value>\n</tool_call>",
        "",
        BOTH,
    ),
    ("granite", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", PARIS),
    ("phi4", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|/tool_call|>', "", PARIS),
    (
        "harmony",
        "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        "I will look.",
        PARIS,
    ),
    (
        "harmony",
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
        "",
        PARIS,
    ),
    ("harmony", "<|channel|>final<|message|>It is <b>warm</b>.<|return|>", "It is <b>warm</b>.", []),
    ("json", '{"name": "get_weather", "arguments": {"city": "Paris"}}', "", PARIS),
    (
        "json",
        '```json\n[{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}},\n'
        '{"name": "add", "parameters": {"a": 1, "b": -2.5}}]\n```',
        "",
        BOTH,
    ),
    # What only looks like a call.
    ("hermes", "<tool_call>\nhello\n</tool_call>", "<tool_call>\nhello\n</tool_call>", []),
    ("hermes", '<tool_call>\n{"arguments": {}}\n</tool_call> x', '<tool_call>\n{"arguments": {}}\n</tool_call> x', []),
    ("hermes", '<tool_call>\n{"name": 3', '<tool_call>\n{"name": 3', []),
    ("hermes", "a <tool_call", "a <tool_call", []),
    (
        "hermes",
        '<tool_call>{}</tool_call><tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>',
        "<tool_call>{}</tool_call>",
        PARIS,
    ),
    ("json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("json", '{"city": "Paris"} is my answer', '{"city": "Paris"} is my answer', []),
    ("json", "  plain words\n", "  plain words\n", []),
    ("json", "```json\n[1, 2]\n```", "```json\n[1, 2]\n```", []),
    ("pythonic", "[1, 2, 3]", "[1, 2, 3]", []),
    ("pythonic", "[print(x=1)]", "[print(x=1)]", []),
    ("mistral", "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>none", "<｜tool▁calls▁begin｜>none", []),
    ("command_r", "<|START_ACTION|>[]<|END_ACTION|>", "<|START_ACTION|>[]<|END_ACTION|>", []),
]


def read(family: str, pieces: list[str], marks: Marks | None = None, *, opened: bool = False) -> list[Delta]:
    reader = parser(FAMILIES[family], TOOLS, marks, opened)
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += reader.push(piece)
    return joined(deltas + reader.flush())


def words(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, Text))


def calls(deltas: list[Delta]) -> list[tuple[str, object]]:
    found: list[tuple[str, str]] = []
    for delta in deltas:
        if isinstance(delta, CallBegin):
            found.append((delta.name, ""))
        elif isinstance(delta, CallArguments):
            found[-1] = (found[-1][0], found[-1][1] + delta.text)
    return [(name, json.loads(arguments)) for name, arguments in found]


@pytest.mark.parametrize(("family", "answer", "text", "called"), RECORDED)
def test_recorded_answers_are_taken_apart(family: str, answer: str, text: str, called: object) -> None:
    deltas = read(family, [answer])
    assert words(deltas) == text
    assert calls(deltas) == called


@pytest.mark.parametrize(("family", "answer"), [(family, answer) for family, answer, _, _ in RECORDED])
def test_how_an_answer_is_cut_changes_nothing(family: str, answer: str) -> None:
    whole = read(family, [answer])
    assert read(family, list(answer)) == whole
    for at in range(1, len(answer)):
        assert read(family, [answer[:at], answer[at:]]) == whole
    rng = random.Random(1)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(answer) + 1), min(4, len(answer))))
        assert read(family, [answer[a:b] for a, b in itertools.pairwise([0, *cuts, len(answer)])]) == whole


@pytest.mark.parametrize(("family", "answer"), [(family, answer) for family, answer, _, _ in RECORDED])
def test_an_answer_may_end_anywhere(family: str, answer: str) -> None:
    for end in range(len(answer)):
        assert read(family, list(answer[:end])) == read(family, [answer[:end]])


FRAGMENTS = (
    *sorted({mark for family in FAMILIES.values() for mark in family.marks}),
    *("<think>", "</think>", "Action:", "```json", "```", "[TOOL", "<tool", "<function=get_weather>", "</function>"),
    *("<parameter=city>", "</parameter>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *('{"name": ', '"get_weather"', '"arguments": ', '"tool_name": ', '"function": ', "get_weather", "add", "null"),
    *("to=functions.add ", "analysis", "final", "1", "e", "é🙂", *"{}[]():,;= \n\"'\\"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_written_is_read_and_the_same_however_it_is_cut(family: str) -> None:
    rng = random.Random(family)
    for _ in range(150):
        answer = "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 14)))
        marks = rng.choice((None, THINK))
        whole = read(family, [answer], marks)
        assert read(family, list(answer), marks) == whole, answer
        for at in rng.sample(range(len(answer) + 1), 2):
            assert read(family, [answer[:at], answer[at:]], marks) == whole, answer


@pytest.mark.parametrize(
    ("family", "answer", "text"),
    [(family, answer, text) for family, answer, text, called in RECORDED if called is BOTH],
)
async def test_a_stream_of_single_bytes_tells_the_calls(
    says: Callable[..., Any], family: str, answer: str, text: str
) -> None:
    marks = tuple(mark for mark in FAMILIES[family].marks if mark in answer)
    worker: Worker = await says(answer, special=marks, tool_call_parser=family)
    tools = [tool.shown() for tool in TOOLS]
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools, "temperature": 0, "stream": True}
    events = await worker.events("/v1/chat/completions", body)
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == text
    grown: list[list[str]] = []
    for call in [call for delta in deltas for call in delta.get("tool_calls", ())]:
        if "id" in call:
            grown.append([call["function"]["name"], ""])
        grown[call["index"]][1] += call["function"]["arguments"]
    assert [(name, json.loads(arguments)) for name, arguments in grown] == BOTH
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_arguments_come_as_they_grow() -> None:
    reader = parser(FAMILIES["hermes"], TOOLS, None, False)
    assert reader.push('Hm <tool_call>\n{"name": "get_weather"') == [Text("Hm"), CallBegin("get_weather")]
    assert reader.push(', "arguments": {"ci') == [CallArguments('{"ci')]
    assert reader.push('ty": "Pa') == [CallArguments('ty": "Pa')]
    assert reader.push('ris"}') == [CallArguments('ris"}')]
    assert reader.push("}\n</tool_call>") == reader.flush() == []


def test_words_are_held_back_only_while_a_mark_may_begin() -> None:
    reader = parser(FAMILIES["hermes"], TOOLS, None, False)
    assert reader.push("Is 3 <t") == [Text("Is 3")]
    assert reader.push("wo?") == [Text(" <two?")]
    plain = parser(FAMILIES["json"], TOOLS, None, False)
    assert plain.push("He") == [Text("He")]


@pytest.mark.parametrize(
    ("answer", "opened", "thought", "text"),
    [
        ("<think>\nLet me see.\n</think>\n\nParis.", False, "Let me see.", "Paris."),
        ("\nLet me see.\n</think>\n\nParis.", True, "Let me see.", "Paris."),
        ("<think>\n\n</think>\n\nParis.", False, "", "Paris."),
        ("  Paris <think> is </think> fine.", False, "", "  Paris <think> is </think> fine."),
        ("<think>cut sho", False, "cut sho", ""),
        ("a < b </thin </think>c", True, "a < b </thin", "c"),
    ],
)
def test_thoughts_are_told_apart(answer: str, opened: bool, thought: str, text: str) -> None:
    whole = read("hermes", [answer], THINK, opened=opened)
    assert "".join(delta.text for delta in whole if isinstance(delta, Thought)) == thought
    assert words(whole) == text
    assert read("hermes", list(answer), THINK, opened=opened) == whole


def test_thoughts_come_before_calls() -> None:
    answer = '<think>hm</think>\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    deltas = read("hermes", [answer], THINK)
    assert deltas[0] == Thought("hm")
    assert calls(deltas) == PARIS
    channels = (
        "<|channel|>analysis<|message|>Need <it>.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
    )
    assert read("harmony", list(channels)) == [Thought("Need <it>."), Text("Yes.")]


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{% if tools %}<tool_call>", "hermes"),
        ("<tool_call>\n<function={{ name }}>", "qwen3_coder"),
        ("<tool_call>{{ name }}<arg_key>", "glm"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral_args"),
        ("<｜tool▁calls▁begin｜>function<｜tool▁sep｜>\n```json", "deepseek_v3"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("<|tool_call_begin|>{{ id }}<|tool_call_argument_begin|>", "kimi_k2"),
        ("<|START_ACTION|>", "command_r"),
        ("<|start|>assistant<|channel|>final<|message|>", "harmony"),
        ("<|python_tag|> Environment: ipython", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ messages }}", "json"),
    ],
)
def test_the_family_is_told_by_the_template(template: str, family: str) -> None:
    assert family_of(template) == family


def test_reasoning_is_told_by_the_template_and_the_prompt() -> None:
    assert marks_of("content.split('</think>')[-1]") == THINK
    assert marks_of("{{ messages }}") is None
    assert THINK.opened_by("<|im_start|>assistant\n<think>\n")
    assert not THINK.opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_ids_are_what_the_families_templates_take() -> None:
    assert len({FAMILIES["hermes"].new_id("add", 0) for _ in range(100)}) == 100
    assert FAMILIES["hermes"].new_id("add", 0).startswith("call_")
    assert FAMILIES["kimi_k2"].new_id("add", 3) == "functions.add:3"
    for _ in range(100):
        made = FAMILIES["mistral"].new_id("add", 0)
        assert len(made) == 9
        assert made.isalnum()
