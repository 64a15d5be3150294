"""Tools in words, for models whose chat template knows nothing of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tgi_gateway.prompt.tools import Tool

INSTRUCTION = (
    'To call a function, answer with nothing but {"name": function name, "parameters": dictionary of argument name and '
    "its value}. Do not use variables. If no function helps, answer in words."
)


def in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], instruction: str | None
) -> list[Mapping[str, Any]]:
    """The same conversation with the tools told in its last message of the user, calls and results as texts."""
    described = json.dumps([tool.shown() for tool in tools], ensure_ascii=False)
    told = [_as_text(message) for message in messages]
    return appended(told, f"\n---\n{described}\n{instruction or INSTRUCTION}")


def appended(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    """`text` at the end of the last message of the user, or of all, where the user says nothing."""
    told = list(messages)
    places = [place for place, message in enumerate(told) if message["role"] == "user"] or [len(told) - 1]
    last = told[places[-1]]
    told[places[-1]] = {**last, "content": f"{last['content']}{text}"}
    return told


def _as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"Result of the call: {message['content']}"}
    if "tool_calls" not in message:
        return message
    calls = "; ".join(
        json.dumps({"name": call["function"]["name"], "parameters": call["function"]["arguments"]}, ensure_ascii=False)
        for call in message["tool_calls"]
    )
    return {"role": message["role"], "content": f"{message['content']}\n{calls}".strip()}
