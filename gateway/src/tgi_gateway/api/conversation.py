"""A conversation as the model reads it: messages through the chat template."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import UNSET

from tgi_gateway.api.bodies import ChatBody, ImagePart, Message, ToolCall
from tgi_gateway.api.serving import Services
from tgi_gateway.errors import TemplateError, Unsupported, ValidationError
from tgi_gateway.prompt.chat_template import ChatTemplate

INLINE_MESSAGES = 16
INLINE_CHARACTERS = 4000
"""Shorter chats are rendered in the event loop: about 0.05 ms, less than a thread's round trip."""
SLOW_TEMPLATE_S = 0.05
"""A template that once took longer for a short chat never holds the event loop up again."""


def content_text(message: Message) -> str:
    """Parts are joined without separators."""
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    if any(isinstance(part, ImagePart) for part in message.content):
        raise Unsupported("image modality is not supported")
    return "".join(part.text for part in message.content if not isinstance(part, ImagePart))


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: text content, tool arguments as objects."""
    shown: dict[str, Any] = {"role": message.role, "content": content_text(message)}
    if message.name is not None:
        shown["name"] = message.name
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        shown["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return shown


def _template_call(call: ToolCall) -> dict[str, Any]:
    function = call.function
    arguments: object = function.parameters if function.arguments is UNSET else function.arguments
    if isinstance(arguments, str):
        # A model may once have written something that is no JSON: the template then shows it as it is.
        with suppress(msgspec.DecodeError, RecursionError):
            arguments = msgspec.json.decode(arguments)
    return {"id": call.id, "type": call.type, "function": {"name": function.name, "arguments": arguments}}


async def prompt_of(services: Services, body: ChatBody) -> str:
    """Render the messages, off the event loop. A last message of the assistant is continued. Raises `TemplateError`."""
    template = services.chat_template
    if template is None:
        raise TemplateError("this model has no chat template; use /generate or /v1/completions")
    if not body.messages:
        raise ValidationError("`messages` cannot be empty")
    messages = [template_message(message) for message in body.messages]
    prompt = await _render(services, template, messages)
    last = messages[-1]
    if last["role"] == "assistant" and last["content"] and "tool_calls" not in last:
        found = prompt.rfind(last["content"])
        if found >= 0:
            return prompt[: found + len(last["content"])].rstrip()
    return prompt


async def _render(services: Services, template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    short = len(messages) <= INLINE_MESSAGES and sum(len(each["content"]) for each in messages) <= INLINE_CHARACTERS
    if not short or services.slow_template:
        return await asyncio.to_thread(template.render, messages)
    began = time.perf_counter()
    try:
        return template.render(messages)
    finally:
        services.slow_template = time.perf_counter() - began > SLOW_TEMPLATE_S
