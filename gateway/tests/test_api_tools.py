"""Tools and thoughts through the chat route, with answers written down beforehand, one token per byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tgi_gateway.testing.recorded import HERMES, PLAIN, Recorded
from tgi_gateway.testing.worker import Worker
from tgi_gateway.types import Grammar, Request

CHAT = "/v1/chat/completions"
THINKING = "{{ reasoning_effort }}{% if enable_thinking is false %}!{% endif %}{{ '</think>' }}" + PLAIN
CALL = 'One é moment.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🙂"}}\n</tool_call>'
TWO = f'{CALL}\n<tool_call>\n{{"name": "add", "arguments": {{}}}}\n</tool_call>'
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "add", "description": "Adds"}},
]


def body(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, "temperature": 0} | more


def put_together(events: list[Any]) -> tuple[dict[str, Any], str | None]:
    """The message that the deltas make, as clients do it; and the finish reason."""
    message: dict[str, Any] = {}
    reason = None
    for event in events[:-1]:
        (choice,) = event["choices"]
        assert reason is None
        reason = choice["finish_reason"]
        delta = choice["delta"]
        for name in ("role", "content", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                assert call["function"]["arguments"] == ""
                calls.append({key: call[key] for key in ("id", "type", "function")})
            else:
                assert call.keys() == {"index", "function"}
                assert call["function"].keys() == {"arguments"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message, reason


def asked_of(worker: Worker) -> list[Request]:
    assert isinstance(worker.services.backend, Recorded)
    return worker.services.backend.asked


async def test_calls_are_answered_in_openais_form(says: Callable[..., Any]) -> None:
    worker: Worker = await says(TWO)
    answer = await worker.answer(CHAT, body())
    (choice,) = answer["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "One é moment."
    first, second = message["tool_calls"]
    assert first.keys() == {"id", "type", "function"}
    assert (first["type"], first["function"]["name"]) == ("function", "weather")
    assert json.loads(first["function"]["arguments"]) == {"city": "Zürich 🙂"}
    assert second["function"] == {"name": "add", "arguments": "{}"}
    assert first["id"] != second["id"]


async def test_a_stream_tells_the_same_as_the_whole_answer(says: Callable[..., Any]) -> None:
    worker: Worker = await says(TWO)
    whole = (await worker.answer(CHAT, body()))["choices"][0]
    events = await worker.events(CHAT, body(stream=True))
    message, reason = put_together(events)
    for call in (*message["tool_calls"], *whole["message"]["tool_calls"]):
        assert call.pop("id").startswith("call_")
    assert message == whole["message"]
    assert reason == whole["finish_reason"]
    assert [name for event in events[:-1] for name in event["choices"][0]["delta"] if name == "role"] == ["role"]
    grown = [call for event in events[:-1] for call in event["choices"][0]["delta"].get("tool_calls", ())]
    assert len(grown) > 10


async def test_without_a_call_the_answer_is_words(says: Callable[..., Any]) -> None:
    worker: Worker = await says("Hello <tool_c")
    (choice,) = (await worker.answer(CHAT, body()))["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello <tool_c"}
    assert choice["finish_reason"] == "stop"
    message, reason = put_together(await worker.events(CHAT, body(stream=True)))
    assert (message, reason) == ({"role": "assistant", "content": "Hello <tool_c"}, "stop")


async def test_a_call_without_words_has_no_content(says: Callable[..., Any]) -> None:
    worker: Worker = await says(CALL.partition("\n")[2])
    message = (await worker.answer(CHAT, body()))["choices"][0]["message"]
    assert message["content"] is None
    streamed, _ = put_together(await worker.events(CHAT, body(stream=True)))
    assert "content" not in streamed


async def test_a_call_that_is_cut_short_says_so(says: Callable[..., Any]) -> None:
    worker: Worker = await says(CALL)
    (choice,) = (await worker.answer(CHAT, body(max_tokens=len(CALL.encode()) - 20)))["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"city"')


async def test_only_one_call_where_several_are_not_wanted(says: Callable[..., Any]) -> None:
    worker: Worker = await says(TWO)
    answer = await worker.answer(CHAT, body(parallel_tool_calls=False))
    (choice,) = answer["choices"]
    assert (len(choice["message"]["tool_calls"]), choice["finish_reason"]) == (1, "tool_calls")
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Zürich 🙂"}
    events = await worker.events(
        CHAT, body(parallel_tool_calls=False, stream=True, stream_options={"include_usage": True})
    )
    usage = events.pop(-2)["usage"]
    message, reason = put_together(events)
    for call in (*message["tool_calls"], *choice["message"]["tool_calls"]):
        del call["id"]
    assert (message, reason) == (choice["message"], "tool_calls")
    # Nobody waits for what the model would go on to say.
    for told in (usage, answer["usage"]):
        assert told["completion_tokens"] < len(TWO[: TWO.index("add")].encode())
    assert worker.services.backend.capacity().free_sequences == worker.services.info.max_sequences


async def test_an_answer_in_words_goes_on_where_several_calls_are_not_wanted(says: Callable[..., Any]) -> None:
    worker: Worker = await says("Nothing {to} call.")
    (choice,) = (await worker.answer(CHAT, body(parallel_tool_calls=False)))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Nothing {to} call.", "stop")


async def test_none_leaves_the_tools_out(says: Callable[..., Any]) -> None:
    worker: Worker = await says(CALL)
    (choice,) = (await worker.answer(CHAT, body(tool_choice="none")))["choices"]
    assert choice["message"]["content"] == CALL
    prompt = (await worker.answer("/chat_tokenize", body(tool_choice="none")))["templated_text"]
    assert prompt == "<user>Hi"


async def test_tools_calls_and_results_reach_the_template(says: Callable[..., Any]) -> None:
    worker: Worker = await says("Warm.")
    messages = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_7", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_7", "content": "30"},
    ]
    prompt = (await worker.answer("/chat_tokenize", body(messages=messages)))["templated_text"]
    assert prompt == (
        '<tools>{"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}'
        '{"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}}</tools><tool_call>'
        '<user>Hi<assistant><call call_7>weather{"city": "Rome"}<toolcall_7>30'
    )
    assert (await worker.answer(CHAT, body(messages=messages)))["choices"][0]["message"]["content"] == "Warm."


async def test_null_content_is_for_templates_that_ask_for_it(says: Callable[..., Any]) -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]
    for template, told in (("{{ messages[0].content }}", ""), ("{{ messages[0]['content'] is none }}", "True")):
        worker: Worker = await says("", template)
        assert (await worker.answer("/chat_tokenize", {"messages": messages}))["templated_text"] == told


async def test_a_template_that_joins_texts_takes_arguments_too(says: Callable[..., Any]) -> None:
    joins = "{% set f = messages[0].tool_calls[0].function %}{{ 'x' + f.arguments + 'y' }}"
    worker: Worker = await says("", joins)
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "é"}}}]}]
    assert (await worker.answer("/chat_tokenize", {"messages": messages}))["templated_text"] == 'x{"a": "é"}y'


async def test_a_template_without_tools_that_knows_calls_is_told_how_its_family_calls(says: Callable[..., Any]) -> None:
    special = tuple(f"<｜tool▁{word}｜>" for word in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"))
    begin, call, sep, end, finish = special
    template = PLAIN + "{# " + begin + " tool_calls #}"
    worker: Worker = await says(f'{begin}{call}add{sep}{{"a": 1}}{end}{finish}', template, special)
    message = (await worker.answer(CHAT, body()))["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    told = (await worker.answer("/chat_tokenize", body()))["templated_text"]
    assert f"{begin}{call}the function's name{sep}{{argument name: value}}{end}{finish}" in told


PHI = (
    "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and m['tools'] is not none %}"
    "{{ '<|system|>' + m['content'] + '<|tool|>' + m['tools'] + '<|/tool|><|end|>' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)


async def test_a_template_may_take_the_tools_with_the_system_message(says: Callable[..., Any]) -> None:
    """Phi-4-mini."""
    call = '<|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|>'
    worker: Worker = await says(call, PHI, ("<|tool_call|>", "<|/tool_call|>"))
    message = (await worker.answer(CHAT, body()))["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    told = (await worker.answer("/chat_tokenize", body()))["templated_text"]
    tools, _, rest = told.removeprefix("<|system|><|tool|>").partition("<|/tool|>")
    assert [tool["name"] for tool in json.loads(tools)] == ["weather", "add"]
    assert rest == "<|end|><|user|>Hi<|end|>"
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]
    told = (await worker.answer("/chat_tokenize", body(messages=messages)))["templated_text"]
    assert told.startswith("<|system|>Short.<|tool|>[{")
    assert "<|tool|>" not in (await worker.answer("/chat_tokenize", body(tools=None)))["templated_text"]


async def test_a_template_without_tools_is_told_of_them_in_words(says: Callable[..., Any]) -> None:
    worker: Worker = await says('{"name": "add", "parameters": {"a": 1}}', PLAIN)
    message = (await worker.answer(CHAT, body()))["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    told = (await worker.answer("/chat_tokenize", body(tool_prompt="Call like so.")))["templated_text"]
    assert told.startswith("<user>Hi\n---\n[{")
    assert told.endswith("]\nCall like so.")
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "30"},
    ]
    told = (await worker.answer("/chat_tokenize", body(messages=messages)))["templated_text"]
    assert '<assistant>{"name": "add", "parameters": {}}<user>Result of the call: 30\n---\n' in told


@pytest.mark.parametrize(
    ("choice", "names", "several"),
    [
        ("required", ("weather", "add"), True),
        ("any", ("weather", "add"), True),
        ("add", ("add",), False),
        ({"type": "function", "function": {"name": "weather"}}, ("weather",), False),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]},
            },
            ("add",),
            False,
        ),
    ],
)
async def test_calls_that_must_be_made_are_held_by_a_grammar(
    says: Callable[..., Any], choice: object, names: tuple[str, ...], several: bool
) -> None:
    worker: Worker = await says(CALL.partition("\n")[2], grammar=True)
    await worker.answer(CHAT, body(tool_choice=choice))
    grammar = asked_of(worker)[-1].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "lark"
    for name in ("weather", "add"):
        assert (f'"{name}\\"' in grammar.source) is (name in names)
    assert ("call:" in grammar.source) is several
    assert "WORDS" not in grammar.source


async def test_an_engine_without_grammars_refuses_what_must_be_called(says: Callable[..., Any]) -> None:
    worker: Worker = await says(CALL)
    assert "does not support `grammar`" in await worker.error(CHAT, body(tool_choice="required"))
    await worker.answer(CHAT, body(tool_choice="auto"))


async def test_calls_that_may_be_made_are_held_where_a_mark_tells_them(says: Callable[..., Any]) -> None:
    worker: Worker = await says("Hello", grammar=True)
    await worker.answer(CHAT, body())
    grammar = asked_of(worker)[-1].sampling.grammar
    assert grammar is not None
    assert "words" in grammar.source
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    await worker.answer(CHAT, body(response_format=wanted))
    either = asked_of(worker)[-1].sampling.grammar
    assert either is not None
    assert "| %json" in either.source.splitlines()[0]
    assert "exclude each other" in await worker.error(CHAT, body(guided_regex="a*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "other"}, "Tool error: Tool with name other not found"),
        ({"tools": [], "tool_choice": "required"}, "there are no `tools`"),
        ({"tools": [{"type": "web", "function": {"name": "f"}}]}, "`tools[0].type` is web; only functions"),
        ({"tools": [{"function": {"name": 'a"b'}}]}, "it may have up to 128 letters"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "two functions of the name weather"),
        ({"tools": [{"function": {"name": "f", "parameters": [1]}}]}, "must be a JSON schema, which is an object"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_tools_that_cannot_be_offered_are_refused(
    says: Callable[..., Any], fields: dict[str, Any], message: str, stream: bool
) -> None:
    worker: Worker = await says("Hello")
    assert message in await worker.error(CHAT, body(stream=stream, **fields))


async def test_marks_that_are_special_tokens_are_seen(says: Callable[..., Any]) -> None:
    special = ("[TOOL_CALLS]", "[OTHER]")
    text = '[OTHER]Well é[TOOL_CALLS] [{"name": "add", "arguments": {}}]'
    worker: Worker = await says(text, "{% if tools %}[TOOL_CALLS]{% endif %}" + PLAIN, special)
    message = (await worker.answer(CHAT, body()))["choices"][0]["message"]
    assert message["content"] == "Well é"
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": "{}"}
    assert len(message["tool_calls"][0]["id"]) == 9
    without = (await worker.answer(CHAT, body(tools=None)))["choices"][0]["message"]["content"]
    assert without == 'Well é [{"name": "add", "arguments": {}}]'


async def test_a_parser_can_be_named(says: Callable[..., Any]) -> None:
    worker: Worker = await says("[add(a=1)]", HERMES, tool_call_parser="pythonic")
    message = (await worker.answer(CHAT, body()))["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}


async def test_thoughts_are_told_apart_and_counted(says: Callable[..., Any]) -> None:
    worker: Worker = await says("<think>\nHm é\n</think>\n\nYes.", THINKING)
    answer = await worker.answer(CHAT, body(tools=None))
    expected = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm é"}
    assert answer["choices"][0]["message"] == expected
    thinking = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 4 <= thinking < answer["usage"]["completion_tokens"]
    message, _ = put_together(await worker.events(CHAT, body(tools=None, stream=True)))
    assert message == expected


async def test_thoughts_stay_where_they_are_if_asked_or_left_out(says: Callable[..., Any]) -> None:
    text = "<think>\nHm\n</think>\n\nYes."
    worker: Worker = await says(text, THINKING)
    kept = await worker.answer(CHAT, body(tools=None, separate_reasoning=False))
    assert kept["choices"][0]["message"] == {"role": "assistant", "content": text}
    left = await worker.answer(CHAT, body(tools=None, include_reasoning=False))
    assert left["choices"][0]["message"] == {"role": "assistant", "content": "Yes."}
    message, _ = put_together(await worker.events(CHAT, body(tools=None, include_reasoning=False, stream=True)))
    assert message == {"role": "assistant", "content": "Yes."}
    plain: Worker = await says(text, THINKING, reasoning_parser="none")
    assert (await plain.answer(CHAT, body(tools=None)))["choices"][0]["message"]["content"] == text


async def test_a_thought_may_come_before_what_a_grammar_holds(says: Callable[..., Any]) -> None:
    worker: Worker = await says('Hm</think>{"a":1}', PLAIN + "<think>\n{# </think> #}", grammar=True)
    wanted = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    for separate in (True, False):
        await worker.answer(CHAT, body(tools=None, response_format=wanted, separate_reasoning=separate))
        grammar = asked_of(worker)[-1].sampling.grammar
        assert grammar is not None
        assert grammar.source.startswith("start: before SPACE (%json ")
        assert '"</think>"' in grammar.source
    await worker.answer(CHAT, body(tools=None, guided_regex="a"))
    assert asked_of(worker)[-1].sampling.grammar == Grammar("regex", "a")


async def test_a_thought_that_the_template_opened_is_one(says: Callable[..., Any]) -> None:
    worker: Worker = await says("Hm</think>Yes.", PLAIN + "<think>\n{# </think> #}")
    message = (await worker.answer(CHAT, body(tools=None)))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm"}


async def test_effort_reaches_the_template(says: Callable[..., Any]) -> None:
    worker: Worker = await says("", THINKING)
    for effort, begin in (("high", "high</think>"), ("none", "none!</think>")):
        told = await worker.answer("/chat_tokenize", body(tools=None, reasoning_effort=effort))
        assert told["templated_text"].startswith(begin)


async def test_channels_of_gpt_oss_are_read(says: Callable[..., Any]) -> None:
    special = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
    template = PLAIN + "<|start|>assistant{# <|channel|> <|message|> #}"
    text = (
        "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city":"Rome"}<|call|>'
    )
    worker: Worker = await says(text, template, special)
    (choice,) = (await worker.answer(CHAT, body()))["choices"]
    assert choice["message"]["reasoning_content"] == "Need it."
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Rome"}'}
    message, reason = put_together(await worker.events(CHAT, body(stream=True)))
    assert message["tool_calls"][0]["function"] == choice["message"]["tool_calls"][0]["function"]
    assert reason == "tool_calls"
    final: Worker = await says("<|channel|>final<|message|>Hello<|return|>", template, special)
    assert (await final.answer(CHAT, body(tools=None)))["choices"][0]["message"]["content"] == "Hello"


async def test_logprobs_of_calls_come_with_them(says: Callable[..., Any]) -> None:
    worker: Worker = await says(CALL)
    whole = (await worker.answer(CHAT, body(logprobs=True)))["choices"][0]["logprobs"]["content"]
    events = await worker.events(CHAT, body(logprobs=True, stream=True))
    told = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert [each for one in told if one is not None for each in one["content"]] == whole
    message, _ = put_together(events)
    assert len(message["tool_calls"]) == 1


async def test_choices_are_read_each_for_itself(says: Callable[..., Any]) -> None:
    worker: Worker = await says(CALL)
    answer = await worker.answer(CHAT, body(n=2))
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]]
    assert len(set(ids)) == 2
