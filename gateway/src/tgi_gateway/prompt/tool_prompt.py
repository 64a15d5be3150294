"""Tools in words, for models whose chat template knows nothing of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tgi_gateway.prompt.tools import Form, Tool


def instruction(form: Form) -> str:
    """How to call, in a family's own form."""
    call = form.call.replace("NAME", "the function's name").replace("ARGUMENTS", "{argument name: value}")
    return (
        f"To call a function, answer with nothing but\n{form.before}{call}{form.after}\n"
        "Do not use variables. If no function helps, answer in words."
    )


def in_system(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    """The same with the functions as JSON in `tools` of the first message, which is the system's: Phi-4-mini."""
    described = json.dumps([tool.shown()["function"] for tool in tools], ensure_ascii=False)
    told = list(messages)
    if told[0]["role"] != "system":
        told.insert(0, {"role": "system", "content": ""})
    told[0] = {**told[0], "tools": described}
    return told


def in_words(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], how: str) -> list[Mapping[str, Any]]:
    """The same conversation with the tools told in its last message of the user."""
    described = json.dumps([tool.shown() for tool in tools], ensure_ascii=False)
    return appended(messages, f"\n---\n{described}\n{how}")


def appended(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    """`text` at the end of the last message of the user, or of all, where the user says nothing."""
    told = list(messages)
    places = [place for place, message in enumerate(told) if message["role"] == "user"] or [len(told) - 1]
    last = told[places[-1]]
    told[places[-1]] = {**last, "content": f"{last['content']}{text}"}
    return told


def as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message without calls and results, for templates that know neither."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"Result of the call: {message['content']}"}
    if "tool_calls" not in message:
        return message
    calls = "; ".join(
        json.dumps({"name": call["function"]["name"], "parameters": call["function"]["arguments"]}, ensure_ascii=False)
        for call in message["tool_calls"]
    )
    return {"role": message["role"], "content": f"{message['content'] or ''}\n{calls}".strip()}
