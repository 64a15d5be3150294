"""A conversation as the model reads it: messages through the chat template."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import UNSET

from tgi_gateway.api.bodies import ChatBody, Message, Part, RefusalPart, TextPart, ToolCall
from tgi_gateway.api.serving import Services
from tgi_gateway.api.tool_choice import Offer
from tgi_gateway.errors import TemplateError, Unsupported, ValidationError
from tgi_gateway.prompt import tool_prompt
from tgi_gateway.prompt.chat_template import ChatTemplate
from tgi_gateway.prompt.tools import Form

INLINE_MESSAGES = 16
INLINE_CHARACTERS = 4000
"""Shorter chats are rendered in the event loop: about 0.05 ms, less than a thread's round trip."""
SLOW_TEMPLATE_S = 0.05
"""A template that once took longer for a short chat never holds the event loop up again."""
HARMLESS_ARGUMENTS = frozenset({"enable_thinking", "thinking"})
"""Template arguments that a model without such a choice may be sent: clients send them to every model."""


def content_text(message: Message) -> str:
    """Parts are joined without separators."""
    for name in ("audio", "function_call"):
        if getattr(message, name) is not None:
            raise Unsupported(f"`{name}` of a message is not supported")
    if message.content is None:
        return message.refusal or ""
    if isinstance(message.content, str):
        return message.content
    return "".join(map(_part_text, message.content))


def _part_text(part: Part) -> str:
    match part:
        case TextPart():
            return part.text
        case RefusalPart():
            return part.refusal
    modality = str(part.__struct_config__.tag).removeprefix("input_").removesuffix("_url")
    raise Unsupported(f"{modality} modality is not supported")


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: text content, tool arguments as objects."""
    shown: dict[str, Any] = {"role": message.role, "content": content_text(message)}
    if message.name is not None:
        shown["name"] = message.name
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        shown["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        shown["tool_calls"] = [_template_call(call) for call in message.tool_calls]
        if message.reasoning_content and not shown["content"]:
            shown["thinking"] = message.reasoning_content  # gpt-oss's name for it, beside calls
    return shown


class _Arguments(dict[str, Any]):
    """A call's arguments: an object to most templates, a text to those that put texts together."""

    def __add__(self, other: str) -> str:
        return f"{self}{other}"

    def __radd__(self, other: str) -> str:
        return f"{other}{self}"

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)


def _template_call(call: ToolCall) -> dict[str, Any]:
    function = call.function
    arguments: object = function.parameters if function.arguments is UNSET else function.arguments
    if isinstance(arguments, str):
        # A model may once have written something that is no JSON: the template then shows it as it is.
        with suppress(msgspec.DecodeError, RecursionError):
            arguments = msgspec.json.decode(arguments)
    if isinstance(arguments, dict):
        arguments = _Arguments(arguments)
    return {"id": call.id, "type": call.type, "function": {"name": function.name, "arguments": arguments}}


def template_arguments(template: ChatTemplate, body: ChatBody) -> dict[str, Any]:
    """The client's variables for the template, of those that it reads. Raises `Unsupported` for others."""
    given = body.chat_template_kwargs or {}
    known = template.arguments(with_tools=bool(body.tools))
    for name in given:
        if name not in known and name not in HARMLESS_ARGUMENTS:
            allowed = ", ".join(f"`{each}`" for each in sorted(known)) or "none"
            raise Unsupported(
                f"`chat_template_kwargs.{name}` is not read by this model's template; it reads: {allowed}"
            )
    effort: dict[str, Any] = {}
    if body.reasoning_effort is not None:
        thinks = body.reasoning_effort != "none"
        effort = {"reasoning_effort": body.reasoning_effort, "enable_thinking": thinks, "thinking": thinks}
    return {name: value for name, value in (effort | given).items() if name in known}


@lru_cache(maxsize=8)
def _knows_null(source: str) -> bool:
    """Whether a template tells a turn that is nothing but calls by its null content; others would write "None"."""
    return re.search(r"content['\"]?\]?\s+is\s+(not\s+)?none", source) is not None


_TOOLS_OF_A_MESSAGE = re.compile(r"""[\w\]](\.tools\b|\[['"]tools['"]\])""")


def _told(
    template: ChatTemplate, messages: list[dict[str, Any]], offer: Offer, form: Form, instruction: str | None
) -> tuple[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None]:
    """The messages, and the tools as the template takes them. Where it takes none, they are told in words."""
    if not offer.tools:
        return messages, None
    told: Sequence[Mapping[str, Any]] = messages
    if "tools" in template.variables(with_tools=True):
        told = tool_prompt.appended(told, f"\n---\n{instruction}") if instruction else told
        return told, [tool.shown() for tool in offer.tools]
    source = template.source(with_tools=True)
    if "tool_calls" not in source:
        told = [tool_prompt.as_text(message) for message in told]
    if _TOOLS_OF_A_MESSAGE.search(source):
        told = tool_prompt.appended(told, f"\n---\n{instruction}") if instruction else told
        return tool_prompt.in_system(told, offer.tools), None
    return tool_prompt.in_words(told, offer.tools, instruction or tool_prompt.instruction(form)), None


async def prompt_of(services: Services, body: ChatBody, offer: Offer) -> str:
    """Render the messages, off the event loop. A last message of the assistant is continued. Raises `TemplateError`."""
    template = services.chat_template
    if template is None:
        raise TemplateError("this model has no chat template; use /generate or /v1/completions")
    if not body.messages:
        raise ValidationError("`messages` cannot be empty")
    messages = [template_message(message) for message in body.messages]
    if _knows_null(template.source(with_tools=bool(offer.tools))):
        for message in messages:
            if "tool_calls" in message:
                message["content"] = message["content"] or None
    told, shown = _told(template, messages, offer, services.family.form, body.tool_prompt)
    last, wanted = told[-1], body.continue_final_message
    if wanted and body.add_generation_prompt:
        raise ValidationError("`continue_final_message` and `add_generation_prompt` exclude each other")
    if wanted and not last["content"]:
        raise ValidationError("`continue_final_message` needs a last message with text")
    arguments = template_arguments(template, body)
    prompt = await _render(services, template, told, shown, body.add_generation_prompt is not False, arguments)
    if wanted or (
        wanted is None
        and body.add_generation_prompt is None
        and last["role"] == "assistant"
        and last["content"]
        and "tool_calls" not in last
    ):
        text = last["content"].strip() if wanted else last["content"]  # templates often strip
        found = prompt.rfind(text)
        if found >= 0:
            return prompt[: found + len(text)].rstrip()
        if wanted:
            raise TemplateError("the model's chat template changes the last message, so it cannot be continued")
    return prompt


async def _render(
    services: Services,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    arguments: Mapping[str, Any],
) -> str:
    short = (
        len(messages) <= INLINE_MESSAGES and sum(len(each["content"] or "") for each in messages) <= INLINE_CHARACTERS
    )
    if not short or services.slow_template:
        return await asyncio.to_thread(template.render, messages, tools, add_generation_prompt, arguments)
    began = time.perf_counter()
    try:
        return template.render(messages, tools, add_generation_prompt, arguments)
    finally:
        services.slow_template = time.perf_counter() - began > SLOW_TEMPLATE_S
