"""What the model may or must call: tools and choice of a body, as an offer, a way to read the answer, and a grammar."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from msgspec import UNSET

from tgi_gateway.api.answers import Reading
from tgi_gateway.api.bodies import ChatBody, FunctionDefinition
from tgi_gateway.api.grammars import MAX_SCHEMA_DEPTH, depth
from tgi_gateway.api.serving import Services
from tgi_gateway.errors import ToolError, Unsupported
from tgi_gateway.prompt import call_grammar
from tgi_gateway.prompt.reasoning import Marks
from tgi_gateway.prompt.tools import Tool
from tgi_gateway.types import Grammar

MAX_TOOLS = 512
_NAME = re.compile(r"[\w.:/\-]{1,128}")


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools that the model is told of, and those that it may call."""

    tools: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    must: bool = False
    parallel: bool = True


def offer_of(body: ChatBody) -> Offer:
    """Raises `ToolError`."""
    tools = tuple(_tool(tool.function, tool.type, place) for place, tool in enumerate(body.tools or ()))
    if len(tools) > MAX_TOOLS:
        raise ToolError(f"`tools` holds {len(tools)} tools; allowed are {MAX_TOOLS}")
    by_name = {tool.name: tool for tool in tools}
    if len(by_name) < len(tools):
        twice = next(tool.name for tool in tools if sum(other.name == tool.name for other in tools) > 1)
        raise ToolError(f"`tools` holds two functions of the name {twice}")
    mode, names = _choice(body)
    unknown = next((name for name in names if name not in by_name), None)
    if unknown is not None:
        raise ToolError(f"Tool with name {unknown} not found")
    if mode == "none":
        return Offer()
    if mode == "required" and not tools:
        raise ToolError("`tool_choice` asks for a call, but there are no `tools`")
    callable_ = tuple(by_name[name] for name in names) if names else tools
    # To name a function is to ask for one call of it.
    parallel = body.parallel_tool_calls is not False and not (mode == "required" and len(names) == 1)
    return Offer(tools, callable_, mode == "required", parallel)


def _choice(body: ChatBody) -> tuple[Literal["none", "auto", "required"], list[str]]:
    """The mode, and the functions to which it is limited."""
    choice = body.tool_choice
    match choice:
        case None | "" | "auto":
            return "auto", []
        case "none":
            return "none", []
        case "required" | "any":  # Mistral's clients say any
            return "required", []
        case str():
            return "required", [choice]
    if choice.function is not None:
        return "required", [choice.function.name]
    assert choice.allowed_tools is not None
    names = [tool.function.name for tool in choice.allowed_tools.tools]
    if not names:
        raise ToolError("`tool_choice.allowed_tools` names no tools")
    return choice.allowed_tools.mode, names


def _tool(function: FunctionDefinition, kind: str, place: int) -> Tool:
    if kind != "function":
        raise ToolError(f"`tools[{place}].type` is {kind}; only functions can be called")
    if not _NAME.fullmatch(function.name):
        raise ToolError(
            f"`tools[{place}].function.name` is {function.name!r}; it may have up to 128 letters, digits and _-.:/"
        )
    parameters = function.arguments if function.parameters in (UNSET, None) else function.parameters
    if parameters in (UNSET, None):
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise ToolError(f"`tools[{place}].function.parameters` must be a JSON schema, which is an object")
    if depth(parameters) > MAX_SCHEMA_DEPTH:
        raise ToolError(f"`tools[{place}].function.parameters` are nested more than {MAX_SCHEMA_DEPTH} deep")
    return Tool(function.name, function.description, parameters, bool(function.strict))


def reading_of(services: Services, body: ChatBody, offer: Offer, prompt: str) -> Reading:
    """How the answers to `prompt` are taken apart."""
    family, marks = services.family, services.reasoning
    separate = body.separate_reasoning is not False
    asked = family if offer.tools or (separate and family.thinks is not None) else None
    shown = set(family.marks) if asked is not None or family.thinks is not None else set()
    if marks is not None:
        shown |= {marks.begin, marks.end}
    return Reading(
        family=asked,
        tools=offer.tools,
        marks=marks,
        opened=marks is not None and marks.opened_by(prompt),
        thoughts=separate,
        parallel=offer.parallel,
        earlier_calls=sum(len(message.tool_calls or ()) for message in body.messages),
        visible=frozenset(token for token, text in services.tokenizer.special_texts.items() if text in shown),
    )


def grammar_of(services: Services, offer: Offer, reading: Reading, asked: Grammar | None) -> Grammar | None:
    """What holds the answer to the tools, to the client's own constraint, or to either. Raises `Unsupported`."""
    added = services.tokenizer.added_tokens
    marks = reading.marks or services.family.thinks
    if asked is not None:
        return _with_calls(services, offer, reading, asked, marks)
    if offer.must:
        return call_grammar.required(
            services.family.form,
            offer.callable,
            added,
            parallel=offer.parallel,
            thinks=marks,
            opened=reading.opened,
        )
    able = "grammar" in services.backend.capabilities.features and services.limits.grammar
    if not offer.tools or not able or not services.family.form.trigger:
        return None
    held = call_grammar.allowed(
        services.family.form, offer.callable, added, services.eos_token_ids, parallel=offer.parallel
    )
    # The model is free to answer in words, so tools that are too many to be held are no reason to refuse.
    return held if held.excess() is None else None


def _with_calls(services: Services, offer: Offer, reading: Reading, asked: Grammar, marks: Marks | None) -> Grammar:
    if not offer.tools and marks is None:
        return asked
    if asked.kind not in ("json", "json_schema"):
        if offer.tools:
            raise Unsupported(f"a constraint of kind {asked.kind} and `tools` exclude each other; give one of them")
        return asked
    return call_grammar.required(
        services.family.form,
        offer.callable,
        services.tokenizer.added_tokens,
        parallel=offer.parallel,
        thinks=marks,
        opened=reading.opened,
        otherwise=None if offer.must else asked.source,
    )
