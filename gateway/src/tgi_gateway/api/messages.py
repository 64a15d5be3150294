"""Anthropic's Messages API: https://docs.anthropic.com/en/api/messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway.api import assembly, caller, decoding
from tgi_gateway.api.answers import CallGrown, CallOpened, Part, Text, Thought
from tgi_gateway.api.assembly import Ending, Event
from tgi_gateway.api.bodies import (
    I32,
    U32,
    CalledFunction,
    ChatBody,
    FunctionDefinition,
    GrammarBody,
    Message,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
)
from tgi_gateway.api.conversation import prompt_of
from tgi_gateway.api.errors import Rejection
from tgi_gateway.api.generation import Piece
from tgi_gateway.api.prepared import answered_model, refuse_unknown_wishes
from tgi_gateway.api.routes import Route
from tgi_gateway.api.serving import Services
from tgi_gateway.api.sse import unless_gone
from tgi_gateway.api.tool_choice import offer_of
from tgi_gateway.errors import GatewayError, Unsupported, ValidationError

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicErrorDetail(Struct):
    type: str
    message: str


class AnthropicError(Struct, tag_field="type", tag="error"):
    """What is wrong, in Anthropic's form."""

    error: AnthropicErrorDetail
    request_id: str | None = None


class AnthropicDialect:
    """Anthropic's error object, in answers and streams. What the client has done wrong is a 400."""

    named_events = True
    document: type = AnthropicError

    def status(self, error: GatewayError) -> int:
        if error.status in (400, 422):
            return 400
        return 500 if error.status == 424 else error.status

    def body(self, error: GatewayError) -> dict[str, object]:
        return _error(self.status(error), str(error))

    def event(self, error: GatewayError) -> dict[str, object]:
        return self.body(error)

    def rejection(self, rejection: Rejection) -> Response:
        status = 400 if rejection.status == 422 else rejection.status
        return Response(msgspec.json.encode(_error(status, str(rejection))), status, None, "application/json")


def _error(status: int, message: str) -> dict[str, object]:
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    told = {"type": kind, "message": message}
    return {"type": "error", "error": told, "request_id": caller.current().request_id}


ANTHROPIC = AnthropicDialect()


class MessageTurn(Struct, kw_only=True):
    """One turn: a text, or blocks of type text, tool_use, tool_result, thinking."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class MessageTool(Struct, kw_only=True):
    """A tool that the client runs; the types that Anthropic runs are refused."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: Any = None
    input_examples: Any = None
    defer_loading: bool | None = None
    allowed_callers: Any = None


class MessageToolChoice(Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, kw_only=True):
    """`disabled` leaves thoughts out of the answer, as leaving all out does."""

    type: str
    budget_tokens: Annotated[int | None, Meta(description="Accepted; `max_tokens` is what bounds the answer.")] = None
    display: str | None = None


class OutputConfig(Struct, kw_only=True):
    effort: Annotated[str | None, Meta(description="Told to the chat template, if it knows it.")] = None
    format: Annotated[dict[str, Any] | None, Meta(description="`json_schema` with a `schema`.")] = None


class CountBody(Struct, kw_only=True):
    """Body of `/v1/messages/count_tokens`."""

    messages: list[MessageTurn]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Annotated[Any, Meta(description="Accepted; equal beginnings are found without it.")] = None
    user_profile_id: Annotated[str | None, Meta(description="Accepted; this server keeps no record of users.")] = None
    workspace_id: Annotated[str | None, Meta(description="Accepted; there is one workspace.")] = None
    speed: Annotated[Any, Meta(description="Accepted; there is one speed.")] = None
    container: Annotated[Any, Meta(description="Refused.")] = None
    mcp_servers: Annotated[Any, Meta(description="Refused.")] = None
    context_management: Annotated[Any, Meta(description="Refused.")] = None


class MessagesBody(CountBody, kw_only=True):
    """Body of `/v1/messages`."""

    max_tokens: U32
    temperature: float | None = None
    top_p: float | None = None
    top_k: I32 | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: Annotated[Any, Meta(description="Accepted; nothing is stored.")] = None
    service_tier: Annotated[str | None, Meta(description="Accepted; there is one tier.")] = None
    inference_geo: Annotated[str | None, Meta(description="Accepted; this server is where it is.")] = None
    diagnostics: Annotated[Any, Meta(description="Accepted; there are none.")] = None


class TextBlock(Struct, kw_only=True, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(Struct, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


class ToolUseBlock(Struct, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(Struct, kw_only=True):
    """`input_tokens` are those that had to be computed."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int


class MessageAnswer(Struct, kw_only=True, tag_field="type", tag="message"):
    """The answer."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class MessageEvent(Struct, kw_only=True):
    """One event of a streamed answer; what else it has depends on its `type`."""

    type: str
    message: MessageAnswer | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: Block | UnsetType = UNSET
    delta: dict[str, Any] | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET


class TokenCount(Struct):
    input_tokens: int


def chat_of(body: CountBody) -> ChatBody:
    """The same as a chat. Raises `ValidationError`, `Unsupported`."""
    for name in ("container", "mcp_servers", "context_management"):
        if getattr(body, name):
            raise Unsupported(f"`{name}` is not supported")
    choice, effort = body.tool_choice, body.output_config
    thinking = body.thinking
    shown = thinking is not None and thinking.type != "disabled" and thinking.display != "omitted"
    chat = ChatBody(
        messages=_messages(body),
        model=body.model,
        tools=[_tool(tool, place) for place, tool in enumerate(body.tools or ())] or None,
        tool_choice=_choice(choice),
        parallel_tool_calls=not choice.disable_parallel_tool_use if choice is not None else None,
        response_format=_format(effort),
        reasoning_effort=effort.effort if effort is not None else None,
        include_reasoning=shown,
        chat_template_kwargs={} if thinking is None else {"enable_thinking": thinking.type != "disabled"},
    )
    if isinstance(body, MessagesBody):
        chat.max_tokens = body.max_tokens
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
        chat.stop, chat.stream = body.stop_sequences, body.stream
    return chat


def _tool(tool: MessageTool, place: int) -> Tool:
    if tool.type not in (None, "custom"):
        raise Unsupported(f"`tools[{place}].type` {tool.type} is not supported: this server runs no tools itself")
    if tool.input_schema is None:
        raise ValidationError(f"`tools[{place}].input_schema` is missing")
    return Tool(
        function=FunctionDefinition(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
    )


def _choice(choice: MessageToolChoice | None) -> str | NamedTool | None:
    if choice is None:
        return None
    if choice.type != "tool":
        return "required" if choice.type == "any" else choice.type
    if choice.name is None:
        raise ValidationError("`tool_choice.name` is missing")
    return NamedTool(function=NamedFunction(choice.name))


def _format(config: OutputConfig | None) -> GrammarBody | None:
    match config.format if config is not None else None:
        case None:
            return None
        case {"type": "json_schema", "schema": dict(schema)}:
            return GrammarBody(type="json_schema", json_schema={"schema": schema})
    raise ValidationError("`output_config.format` needs a `type` of json_schema and a `schema`")


def _messages(body: CountBody) -> list[Message]:
    messages: list[Message] = []
    if body.system:
        messages.append(Message(role="system", content=_text(body.system, "`system`", between="\n\n")))
    for place, turn in enumerate(body.messages):
        where = f"`messages[{place}].content`"
        if isinstance(turn.content, str):
            messages.append(Message(role=turn.role, content=turn.content))
        elif turn.role == "assistant":
            messages.append(_assistant(turn.content, where))
        else:
            messages += _user(turn.role, turn.content, where)
    return messages


def _assistant(blocks: Iterable[dict[str, Any]], where: str) -> Message:
    message = Message(role="assistant", content="")
    texts: list[str] = []
    for block in blocks:
        match block:
            case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": dict(given)}:
                function = CalledFunction(name=name, arguments=given)
                message.tool_calls = [*(message.tool_calls or ()), ToolCall(id=call_id, function=function)]
            case {"type": "thinking", "thinking": str(thought)}:
                message.reasoning_content = f"{message.reasoning_content or ''}{thought}"
            case {"type": "redacted_thinking"}:
                pass
            case _:
                texts.append(_text([block], where))
    message.content = "".join(texts)
    return message


def _user(role: str, blocks: Iterable[dict[str, Any]], where: str) -> list[Message]:
    """Results of tools are messages of their own, before what the user says."""
    results: list[Message] = []
    texts: list[str] = []
    for block in blocks:
        match block:
            case {"type": "tool_result", "tool_use_id": str(call_id)}:
                text = _text(block.get("content") or "", where)
                failed = f"Error: {text}" if block.get("is_error") else text
                results.append(Message(role="tool", content=failed, tool_call_id=call_id))
            case _:
                texts.append(_text([block], where))
    if texts or not results:
        results.append(Message(role=role, content="\n".join(texts)))
    return results


def _text(content: object, where: str, between: str = "") -> str:
    """The text of a content, whose blocks may be texts only. Raises `ValidationError`, `Unsupported`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValidationError(f"{where} must be a text or a list of blocks")
    texts: list[str] = []
    for block in content:
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                kind = block.get("type") if isinstance(block, dict) else type(block).__name__
                raise Unsupported(f"{where}: a block of type {kind} is not supported here: this model reads text only")
    return between.join(texts)


class MessageAssembler:
    """Makes an answer, block by block."""

    def __init__(self, services: Services, chat: ChatBody) -> None:
        self._shows_thoughts = chat.include_reasoning is not False
        self._answer = MessageAnswer(
            id=caller.new_id("msg_"),
            model=answered_model(services, chat),
            usage=MessageUsage(input_tokens=0, output_tokens=0),
        )
        self._arguments: list[str] = []
        """Of the newest block, if it is a call."""

    def document(self) -> object:
        return self._answer

    def begin(self, prompt_tokens: int) -> list[Event]:
        self._answer.usage.input_tokens = prompt_tokens
        return [{"type": "message_start", "message": msgspec.Raw(msgspec.json.encode(self._answer))}]

    def add(self, part: Part, _: Sequence[Piece]) -> list[Event]:
        match part:
            case CallOpened(_, call_id, name):
                return self._open(ToolUseBlock(id=call_id, name=name, input={}))
            case CallGrown(_, text):
                self._arguments.append(text)
                return [self._delta("input_json_delta", partial_json=text)]
            case Thought(text):
                if not self._shows_thoughts:
                    return []
                events = self._opened(ThinkingBlock(thinking=""))
                thinking = self._answer.content[-1]
                assert isinstance(thinking, ThinkingBlock)
                thinking.thinking += text
                return [*events, self._delta("thinking_delta", thinking=text)]
            case Text(text):
                events = self._opened(TextBlock(text=""))
                words = self._answer.content[-1]
                assert isinstance(words, TextBlock)
                words.text += text
                return [*events, self._delta("text_delta", text=text)]

    def end(self, ending: Ending) -> list[Event]:
        events = self._close()
        answer, generation = self._answer, ending.generation
        cached = ending.usage.prompt_tokens_details
        read = 0 if cached is UNSET else cached.cached_tokens
        answer.usage = MessageUsage(
            input_tokens=ending.usage.prompt_tokens - read,
            cache_read_input_tokens=read,
            output_tokens=ending.usage.completion_tokens,
        )
        if generation.reason == "length":
            answer.stop_reason = "max_tokens"
        elif ending.reader.calls:
            answer.stop_reason = "tool_use"
        elif generation.reason == "stop_sequence":
            answer.stop_reason, answer.stop_sequence = "stop_sequence", generation.stop_string
        else:
            answer.stop_reason = "end_turn"
        told = {"stop_reason": answer.stop_reason, "stop_sequence": answer.stop_sequence}
        return [
            *events,
            {"type": "message_delta", "delta": told, "usage": answer.usage},
            {"type": "message_stop"},
        ]

    def _opened(self, block: TextBlock | ThinkingBlock) -> list[Event]:
        """Make a block of this kind the newest one, unless it is."""
        if self._answer.content and type(self._answer.content[-1]) is type(block):
            return []
        return self._open(block)

    def _open(self, block: Block) -> list[Event]:
        closed = self._close()
        self._answer.content = [*self._answer.content, block]
        told = msgspec.Raw(msgspec.json.encode(block))
        return [*closed, {"type": "content_block_start", "index": len(self._answer.content) - 1, "content_block": told}]

    def _close(self) -> list[Event]:
        if not self._answer.content:
            return []
        block = self._answer.content[-1]
        if isinstance(block, ToolUseBlock):
            block.input = _object("".join(self._arguments))
            self._arguments = []
        return [{"type": "content_block_stop", "index": len(self._answer.content) - 1}]

    def _delta(self, kind: str, **more: str) -> Event:
        index = len(self._answer.content) - 1
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **more}}


def _object(arguments: str) -> dict[str, Any]:
    """A call's arguments; what is no object, as this API has nothing else, is kept as a text in one."""
    try:
        given = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        given = None
    return given if isinstance(given, dict) else {"_arguments": arguments}


async def messages(services: Services, request: Request, raw: bytes) -> Response:
    chat = chat_of(decoding.decode_known(raw, MessagesBody))
    return await assembly.respond(services, request, "messages", chat, MessageAssembler(services, chat), ANTHROPIC)


async def count_tokens(services: Services, request: Request, raw: bytes) -> Response:
    chat = chat_of(decoding.decode_known(raw, CountBody))
    refuse_unknown_wishes(chat)

    async def work() -> TokenCount:
        prompt = await prompt_of(services, chat, offer_of(chat))
        return TokenCount(len((await services.tokenizer.encode_async(prompt, False)).ids))

    services.metrics.count()
    count = await unless_gone(request.receive, work())
    return Response(msgspec.json.encode(count), media_type="application/json")


ROUTES = [
    Route(
        path="/v1/messages",
        handler=messages,
        dialect=ANTHROPIC,
        name="create_message",
        summary="Answer a conversation",
        tag="Anthropic",
        body=MessagesBody,
        answer=MessageAnswer,
        event=MessageEvent,
        generates=True,
    ),
    Route(
        path="/v1/messages/count_tokens",
        handler=count_tokens,
        dialect=ANTHROPIC,
        name="count_message_tokens",
        summary="Count the tokens of a conversation",
        tag="Anthropic",
        body=CountBody,
        answer=TokenCount,
    ),
]
