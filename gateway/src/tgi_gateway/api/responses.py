"""OpenAI's Responses API, without anything stored: every request brings its whole conversation.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from tgi_gateway.api import assembly, decoding
from tgi_gateway.api.answers import CallGrown, CallOpened, Part, Text, Thought
from tgi_gateway.api.assembly import Ending, Event
from tgi_gateway.api.bodies import (
    I32,
    U32,
    AllowedTools,
    CalledFunction,
    CalledTool,
    ChatBody,
    FunctionDefinition,
    GrammarBody,
    Message,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
)
from tgi_gateway.api.caller import new_id
from tgi_gateway.api.conversation import prompt_of
from tgi_gateway.api.errors import OPENAI, OpenAIDialect
from tgi_gateway.api.generation import Piece
from tgi_gateway.api.logprobs import TokenLogprob, chat_logprobs
from tgi_gateway.api.prepared import answered_model
from tgi_gateway.api.routes import Route
from tgi_gateway.api.serving import Services
from tgi_gateway.api.sse import unless_gone
from tgi_gateway.api.tool_choice import offer_of
from tgi_gateway.errors import GatewayError, Unsupported, ValidationError

_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (_LOGPROBS, "reasoning.encrypted_content")


class TextConfig(Struct, kw_only=True):
    """`format` is OpenAI's: text, json_object, or json_schema with `schema` beside it."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningConfig(Struct, kw_only=True):
    effort: Annotated[str | None, Meta(description="Told to the chat template, if it knows it.")] = None
    summary: Annotated[str | None, Meta(description="Accepted; thoughts are told as they are.")] = None
    generate_summary: Annotated[str | None, Meta(description="Accepted, as `summary`.")] = None


class ResponseTool(Struct, kw_only=True):
    """A function that the model may call; other types are refused: this server runs no tools."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: Any = None
    strict: bool | None = None


class ConversationBody(Struct, kw_only=True):
    """What makes the prompt. Null always means: not given."""

    model: Annotated[str | None, Meta(description="Served model, one of its adapters, or `tgi`.")] = None
    instructions: Annotated[str | None, Meta(description="Told to the model before all else.")] = None
    tools: list[ResponseTool] | None = None
    tool_choice: Annotated[
        str | dict[str, Any] | None, Meta(description="`none`, `auto`, `required`, a function or allowed tools.")
    ] = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None, Meta(description="`auto`: leave out the oldest turns if all do not fit.")
    ] = None
    previous_response_id: Annotated[str | None, Meta(description="Refused: nothing is stored.")] = None
    conversation: Annotated[Any, Meta(description="Refused: nothing is stored.")] = None


class InputTokensBody(ConversationBody, kw_only=True):
    """Body of `/v1/responses/input_tokens`."""

    input: Annotated[str | list[dict[str, Any]] | None, Meta(description="As for `/v1/responses`.")] = None
    personality: Annotated[str | None, Meta(description="Refused: say it in `instructions`.")] = None


class ResponsesBody(ConversationBody, kw_only=True):
    """Body of `/v1/responses`."""

    input: Annotated[str | list[dict[str, Any]], Meta(description="A text, or the items of the conversation so far.")]
    max_output_tokens: U32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: I32 | None = None
    min_p: float | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    top_logprobs: U32 | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: Annotated[dict[str, Any] | None, Meta(description="Accepted; events are not padded.")] = None
    store: Annotated[bool | None, Meta(description="true is refused: nothing is stored.")] = None
    prompt: Annotated[Any, Meta(description="Refused: nothing is stored.")] = None
    background: Annotated[bool | None, Meta(description="true is refused: nothing is stored.")] = None
    max_tool_calls: Annotated[int | None, Meta(description="Accepted; there are no built-in tools to limit.")] = None
    metadata: Annotated[dict[str, Any] | None, Meta(description="Told back in the answer.")] = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Annotated[Any, Meta(description="Accepted; equal beginnings are found without it.")] = None
    service_tier: str | None = None
    background_options: Annotated[Any, Meta(description="Accepted; `background` itself is refused.")] = None
    image: Annotated[Any, Meta(description="Accepted; there are no images whose context could be compressed.")] = None
    access_programs: Annotated[Any, Meta(description="Refused: this server knows none.")] = None
    context_management: Annotated[Any, Meta(description="Refused: use `truncation`.")] = None
    moderation: Annotated[Any, Meta(description="Refused: this server moderates nothing.")] = None


class OutputText(Struct, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


Status = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status = "in_progress"
    content: list[OutputText]


class OutputReasoning(Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    status: Status = "in_progress"
    summary: list[Any] = []
    content: list[ReasoningText]


class OutputCall(Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "in_progress"


OutputItem = OutputMessage | OutputReasoning | OutputCall


class InputTokensDetails(Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Struct):
    reason: str


class ResponseObject(Struct, kw_only=True):
    """The answer, with what was asked."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status = "in_progress"
    model: str
    output: list[OutputItem] = []
    usage: ResponseUsage | None = None
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, Any] = {}
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    reasoning: ReasoningConfig
    background: bool = False
    store: bool = False
    temperature: float
    top_p: float
    top_logprobs: int = 0
    text: dict[str, Any]
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[ResponseTool] = []
    truncation: Literal["auto", "disabled"] = "disabled"
    service_tier: Literal["default"] = "default"
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ResponseEvent(Struct, kw_only=True):
    """One event of a streamed response; what else it has depends on its `type`."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET


class InputTokens(Struct, kw_only=True):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


def _refuse(body: ConversationBody) -> None:
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name, None) is not None:
            raise Unsupported(
                f"`{name}` is not supported: this server stores nothing. Send the whole conversation as `input`"
            )
    for name in ("store", "background"):
        if getattr(body, name, None):
            raise Unsupported(f"`{name}` is not supported: this server stores nothing. Leave it out or send false")
    for name, instead in _REFUSED.items():
        if getattr(body, name, None) is not None:
            raise Unsupported(f"`{name}` is not supported: {instead}")


_REFUSED = {
    "access_programs": "this server knows none",
    "context_management": "this server does not compact conversations; `truncation` leaves out their beginning",
    "moderation": "this server moderates nothing",
    "personality": "say it in `instructions`",
}


def chat_of(body: ConversationBody) -> ChatBody:
    """The same as a chat. Raises `ValidationError`, `Unsupported`."""
    _refuse(body)
    assert isinstance(body, ResponsesBody | InputTokensBody)
    chat = ChatBody(
        messages=_Messages(body.instructions, body.input or []).all(),
        model=body.model,
        tools=[_tool(tool, place) for place, tool in enumerate(body.tools or ())] or None,
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body.text),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )
    if isinstance(body, ResponsesBody):
        for name in body.include or ():
            if name not in _INCLUDABLE:
                raise Unsupported(f"`include` of `{name}` is not supported; allowed are {', '.join(_INCLUDABLE)}")
        if _LOGPROBS in (body.include or ()):
            chat.logprobs, chat.top_logprobs = True, body.top_logprobs
        chat.max_completion_tokens, chat.stream = body.max_output_tokens, body.stream
        chat.temperature, chat.top_p, chat.top_k, chat.min_p = body.temperature, body.top_p, body.top_k, body.min_p
        chat.seed, chat.stop, chat.cache_salt = body.seed, body.stop, body.prompt_cache_key
    return chat


def _tool(tool: ResponseTool, place: int) -> Tool:
    if tool.type != "function":
        raise Unsupported(f"`tools[{place}].type` {tool.type} is not supported: this server runs no tools itself")
    if not tool.name:
        raise ValidationError(f"`tools[{place}].name` is missing")
    return Tool(
        function=FunctionDefinition(
            name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
        )
    )


def _choice(choice: str | dict[str, Any] | None) -> str | NamedTool | None:
    if not isinstance(choice, dict):
        if choice not in (None, "none", "auto", "required"):
            raise ValidationError(f"`tool_choice` is {choice}; allowed are none, auto, required or an object")
        return choice
    match choice:
        case {"type": "function", "name": str(name)}:
            return NamedTool(function=NamedFunction(name))
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": list(tools)}:
            names = [tool.get("name") for tool in tools if isinstance(tool, dict)]
            called = [CalledTool(function=NamedFunction(name)) for name in names if isinstance(name, str)]
            return NamedTool(type="allowed_tools", allowed_tools=AllowedTools(mode=mode, tools=called))
    raise Unsupported(f"`tool_choice` of type {choice.get('type')} is not supported; name a function or allowed tools")


def _format(text: TextConfig | None) -> GrammarBody | None:
    wanted = text.format if text is not None else None
    match wanted:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return GrammarBody(type="json_object")
        case {"type": "json_schema", "schema": dict(schema)}:
            return GrammarBody(type="json_schema", json_schema={"schema": schema})
    raise ValidationError("`text.format` needs a `type` of text, json_object, or json_schema with a `schema`")


class _Messages:
    """Items of a conversation as messages: what the model said and called in one turn is one message."""

    def __init__(self, instructions: str | None, given: str | Sequence[dict[str, Any]]) -> None:
        self._instructions = instructions
        self._given = given
        self._messages: list[Message] = []
        self._turn: Message | None = None
        """The assistant's message to which further items of its turn belong."""
        self._thought: str | None = None

    def all(self) -> list[Message]:
        if self._instructions:
            self._say("system", self._instructions)
        if isinstance(self._given, str):
            self._say("user", self._given)
        else:
            for place, item in enumerate(self._given):
                self._add(item, f"`input[{place}]`")
        return self._messages

    def _add(self, item: dict[str, Any], where: str) -> None:
        match item:
            case {"type": "function_call", "name": str(name), "call_id": str(call_id), "arguments": str(arguments)}:
                turn = self._assistant()
                function = CalledFunction(name=name, arguments=arguments)
                turn.tool_calls = [*(turn.tool_calls or ()), ToolCall(id=call_id, function=function)]
            case {"type": "function_call_output", "call_id": str(call_id), "output": output}:
                self._say("tool", _texts(output, f"{where}.output"), call_id)
            case {"type": "reasoning"}:
                self._turn = None
                parts = item.get("content") or item.get("summary") or []
                self._thought = _texts(parts, where)
            case {"role": str(role), "content": content} if item.get("type", "message") == "message":
                text = _texts(content, f"{where}.content")
                if role != "assistant":
                    self._say("system" if role == "developer" else role, text)
                elif self._turn is not None and not self._turn.tool_calls:
                    self._turn.content = f"{self._turn.content or ''}{text}"
                else:
                    self._turn = None
                    self._assistant().content = text
            case {"type": str(kind)}:
                raise Unsupported(f"{where}: an item of type {kind} is not supported, or lacks its fields")
            case _:
                raise ValidationError(f"{where} needs a `type`, or a `role` and `content`")

    def _say(self, role: str, text: str, call_id: str | None = None) -> None:
        self._turn = None
        last = self._messages[-1] if self._messages else None
        if role == "system" and last is not None and last.role == "system":
            # Many templates know one system message only.
            last.content = f"{last.content}\n\n{text}"
            return
        self._messages.append(Message(role=role, content=text, tool_call_id=call_id))

    def _assistant(self) -> Message:
        if self._turn is None:
            self._turn = Message(role="assistant", content="", reasoning_content=self._thought)
            self._thought = None
            self._messages.append(self._turn)
        return self._turn


def _texts(content: object, where: str) -> str:
    """The text of a content, whose parts may be input and output texts. Raises `Unsupported`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValidationError(f"{where} must be a text or a list of parts")
    texts: list[str] = []
    for part in content:
        match part:
            case {"type": "input_text" | "output_text" | "reasoning_text" | "summary_text" | "text", "text": str(text)}:
                texts.append(text)
            case {"type": "refusal", "refusal": str(text)}:
                texts.append(text)
            case _:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise Unsupported(f"{where}: a part of type {kind} is not supported: this model reads text only")
    return "".join(texts)


class _Dialect(OpenAIDialect):
    """Ends a stream as this API does, with the number that is next."""

    named_events = True

    def __init__(self, assembler: ResponseAssembler) -> None:
        self._assembler = assembler

    def event(self, error: GatewayError) -> dict[str, object]:
        told = self.body(error)["error"]
        assert isinstance(told, dict)
        number = self._assembler.next_number()
        return {"type": "error", "code": told["code"], "message": told["message"], "param": told["param"],
                "sequence_number": number}  # fmt: skip


class ResponseAssembler:
    """Makes a Response, item by item."""

    def __init__(self, services: Services, body: ResponsesBody, chat: ChatBody) -> None:
        self._services = services
        self._with_logprobs = bool(chat.logprobs)
        self._number = 0
        text: dict[str, Any] = {"format": (body.text and body.text.format) or {"type": "text"}}
        if body.text is not None and body.text.verbosity is not None:
            text["verbosity"] = body.text.verbosity
        self._response = ResponseObject(
            id=new_id("resp_"),
            created_at=int(time.time()),
            model=answered_model(services, chat),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning=body.reasoning or ReasoningConfig(),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_logprobs=body.top_logprobs or 0,
            text=text,
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            truncation=body.truncation or "disabled",
            user=body.user,
            safety_identifier=body.safety_identifier,
            prompt_cache_key=body.prompt_cache_key,
        )

    def next_number(self) -> int:
        number, self._number = self._number, self._number + 1
        return number

    def document(self) -> object:
        return self._response

    def begin(self, _: int) -> list[Event]:
        return [
            self._event("response.created", response=_copy(self._response)),
            self._event("response.in_progress", response=_copy(self._response)),
        ]

    def add(self, part: Part, pieces: Sequence[Piece]) -> list[Event]:
        match part:
            case CallOpened(_, call_id, name):
                item = OutputCall(id=self._item_id("fc_"), call_id=call_id, name=name)
                return [*self._close("completed"), *self._open(item)]
            case CallGrown(_, text):
                call = self._response.output[-1]
                assert isinstance(call, OutputCall)
                call.arguments += text
                return [self._about("response.function_call_arguments.delta", delta=text)]
            case Thought(text):
                events = self._opened(OutputReasoning)
                self._content.text += text
                return [*events, self._about("response.reasoning_text.delta", content_index=0, delta=text)]
            case Text(text):
                events = self._opened(OutputMessage)
                content = self._content
                assert isinstance(content, OutputText)
                content.text += text
                told = chat_logprobs(self._services.tokenizer, pieces).content if self._with_logprobs else []
                content.logprobs = [*content.logprobs, *told]
                delta = self._about("response.output_text.delta", content_index=0, delta=text, logprobs=told)
                return [*events, delta]

    def end(self, ending: Ending) -> list[Event]:
        response = self._response
        events = [] if response.output else self._opened(OutputMessage)
        cut = ending.generation.reason == "length"
        events += self._close("incomplete" if cut else "completed")
        response.status = "incomplete" if cut else "completed"
        if cut:
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        usage = ending.usage
        cached = usage.prompt_tokens_details
        response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(0 if cached is UNSET else cached.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(ending.reader.thinking_tokens),
            total_tokens=usage.total_tokens,
        )
        return [*events, self._event(f"response.{response.status}", response=response)]

    @property
    def _content(self) -> OutputText | ReasoningText:
        item = self._response.output[-1]
        assert not isinstance(item, OutputCall)
        return item.content[0]

    def _item_id(self, prefix: str) -> str:
        return f"{new_id(prefix)}_{len(self._response.output)}"

    def _opened(self, kind: type[OutputMessage | OutputReasoning]) -> list[Event]:
        """Make an item of `kind` the newest one, unless it is."""
        if self._response.output and isinstance(self._response.output[-1], kind):
            return []
        events = self._close("completed")
        if kind is OutputReasoning:
            thought = OutputReasoning(id=self._item_id("rs_"), content=[])
            events += self._open(thought)
            thought.content = [ReasoningText(text="")]
        else:
            message = OutputMessage(id=self._item_id("msg_"), content=[])
            events += self._open(message)
            message.content = [OutputText(text="")]
        return [*events, self._about("response.content_part.added", content_index=0, part=_copy(self._content))]

    def _open(self, item: OutputItem) -> list[Event]:
        self._response.output = [*self._response.output, item]
        return [
            self._event("response.output_item.added", output_index=len(self._response.output) - 1, item=_copy(item))
        ]

    def _close(self, status: Status) -> list[Event]:
        """End the newest item."""
        if not self._response.output:
            return []
        item = self._response.output[-1]
        item.status = status
        events: list[Event] = []
        if isinstance(item, OutputCall):
            done = "response.function_call_arguments.done"
            events.append(self._about(done, arguments=item.arguments, name=item.name))
        else:
            content = item.content[0]
            more: Event = {"logprobs": content.logprobs} if isinstance(content, OutputText) else {}
            name = "output_text" if isinstance(content, OutputText) else "reasoning_text"
            events.append(self._about(f"response.{name}.done", content_index=0, text=content.text, **more))
            events.append(self._about("response.content_part.done", content_index=0, part=content))
        place = len(self._response.output) - 1
        return [*events, self._event("response.output_item.done", output_index=place, item=item)]

    def _about(self, kind: str, **more: Any) -> Event:
        """An event about the newest item."""
        place = len(self._response.output) - 1
        return self._event(kind, item_id=self._response.output[-1].id, output_index=place, **more)

    def _event(self, kind: str, **more: Any) -> Event:
        return {"type": kind, "sequence_number": self.next_number(), **more}


def _copy(value: Any) -> Any:
    """As it is now: events are written later than made."""
    return msgspec.Raw(msgspec.json.encode(value))


async def responses(services: Services, request: Request, raw: bytes) -> Response:
    body = decoding.decode_known(raw, ResponsesBody)
    chat = chat_of(body)
    if body.truncation == "auto":
        await unless_gone(request.receive, _truncate(services, chat))
    assembler = ResponseAssembler(services, body, chat)
    return await assembly.respond(services, request, "responses", chat, assembler, _Dialect(assembler))


async def _truncate(services: Services, chat: ChatBody) -> None:
    """Leave out the oldest turns, as few as may be, if the conversation does not fit. The newest one stays.

    A turn begins with what the user says: no result is left without its call.
    """
    limits = services.openai_limits
    room = min(limits.max_input_tokens, limits.max_total_tokens - (chat.max_completion_tokens or 1))
    everything = chat.messages
    head = everything[:1] if everything and everything[0].role == "system" else []
    starts = [place for place, message in enumerate(everything) if place and message.role == "user"]

    async def fits(start: int) -> bool:
        chat.messages = [*head, *everything[start:]]
        return await _prompt_tokens(services, chat) <= room

    if not starts or await fits(len(head)):
        return
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        if await fits(starts[middle]):
            high = middle
        else:
            low = middle + 1
    chat.messages = [*head, *everything[starts[low] :]]


async def _prompt_tokens(services: Services, chat: ChatBody) -> int:
    prompt = await prompt_of(services, chat, offer_of(chat))
    return len((await services.tokenizer.encode_async(prompt, False)).ids)


async def input_tokens(services: Services, request: Request, raw: bytes) -> Response:
    body = decoding.decode_known(raw, InputTokensBody)
    chat = chat_of(body)

    async def work() -> InputTokens:
        if body.truncation == "auto":
            await _truncate(services, chat)
        return InputTokens(input_tokens=await _prompt_tokens(services, chat))

    services.metrics.count()
    count = await unless_gone(request.receive, work())
    return Response(msgspec.json.encode(count), media_type="application/json")


ROUTES = [
    Route(
        path="/v1/responses",
        handler=responses,
        dialect=OPENAI,
        name="create_response",
        summary="Answer a conversation",
        tag="OpenAI",
        body=ResponsesBody,
        answer=ResponseObject,
        event=ResponseEvent,
        generates=True,
    ),
    Route(
        path="/v1/responses/input_tokens",
        handler=input_tokens,
        dialect=OPENAI,
        name="count_response_input_tokens",
        summary="Count the tokens of a conversation",
        tag="OpenAI",
        body=InputTokensBody,
        answer=InputTokens,
    ),
]
