"""Request bodies: what clients may send, as the documentation of a running server shows it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
I32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
U64 = Annotated[int, Meta(ge=0, extra_json_schema={"maximum": 2**64 - 1})]
"""Its upper bound lies beyond what msgspec checks; `_check_u64` does."""


def _check_u64(name: str, value: int | None) -> None:
    if value is not None and value >= 2**64:
        raise ValueError(f"Expected `{name}` < 2**64")


class GrammarBody(Struct, kw_only=True):
    """A constraint on the generated text. TGI's form keeps it in `value`, OpenAI's in `json_schema`."""

    type: Annotated[
        Literal["json", "json_object", "regex", "json_schema", "choice", "lark", "text"],
        Meta(description="Kind of constraint."),
    ]
    value: Annotated[
        Any, Meta(description="JSON schema (object or text), regular expression, list of texts, or Lark grammar.")
    ] = UNSET
    json_schema: Annotated[
        dict[str, Any] | None, Meta(description="OpenAI's form: an object with `schema`, optionally `name`.")
    ] = None
    schema: Annotated[Any, Meta(description="JSON schema beside `json_object`, as some servers take it.")] = UNSET


class StructuredOutputs(Struct, kw_only=True):
    """vLLM's form: exactly one constraint."""

    json: Annotated[Any, Meta(description="JSON schema, object or text.")] = None
    regex: Annotated[str | None, Meta(description="Regular expression.")] = None
    choice: Annotated[list[str] | None, Meta(description="The answer is one of these.")] = None
    grammar: Annotated[str | None, Meta(description="Lark or GBNF grammar.")] = None
    json_object: Annotated[bool | None, Meta(description="Any JSON object.")] = None
    structural_tag: Annotated[Any, Meta(description="Refused.")] = None
    whitespace_pattern: Annotated[Any, Meta(description="Refused: there is at most one space between parts.")] = None


class ParametersBody(Struct, kw_only=True):
    """How to generate. Everything may be left out."""

    best_of: Annotated[
        U32 | None, Meta(description="Generate so many answers and return the one with the best mean log-probability.")
    ] = None
    temperature: Annotated[
        float | None, Meta(description="Above 0. The logits are divided by it; a value other than 1 turns sampling on.")
    ] = None
    repetition_penalty: Annotated[
        float | None, Meta(description="Above 0; 1 is neutral. See https://arxiv.org/abs/1909.05858.")
    ] = None
    frequency_penalty: Annotated[
        float | None, Meta(description="-2 to 2. Subtracted from a token's logit for each time it was generated.")
    ] = None
    presence_penalty: Annotated[
        float | None, Meta(description="-2 to 2. Subtracted once from the logit of a token that was generated.")
    ] = None
    top_k: Annotated[I32 | None, Meta(description="Above 0. Draw from the so many most likely tokens.")] = None
    top_p: Annotated[
        float | None, Meta(description="Between 0 and 1. Draw from the fewest tokens whose share reaches it.")
    ] = None
    min_p: Annotated[
        float | None, Meta(description="0 to 1. Drop tokens less likely than this share of the most likely one.")
    ] = None
    typical_p: Annotated[
        float | None, Meta(description="Between 0 and 1. Typical decoding, https://arxiv.org/abs/2202.00666.")
    ] = None
    do_sample: Annotated[bool, Meta(description="Draw tokens, instead of taking the most likely one.")] = False
    max_new_tokens: Annotated[
        U32 | None, Meta(description="Generate at most so many tokens; null: as many as the server allows.")
    ] = None
    min_new_tokens: Annotated[U32 | None, Meta(description="Do not end before so many tokens.")] = None
    ignore_eos: Annotated[bool, Meta(description="Go on after an end-of-sequence token.")] = False
    return_full_text: Annotated[bool | None, Meta(description="Put the prompt before the generated text.")] = None
    stop: Annotated[
        list[str], Meta(description="Stop when one of these is generated; the match stays in the text.")
    ] = []
    truncate: Annotated[U32 | None, Meta(description="Keep only the last so many tokens of the prompt.")] = None
    watermark: Annotated[bool, Meta(description="Mark the text, https://arxiv.org/abs/2301.10226.")] = False
    details: Annotated[bool, Meta(description="Tell how the generation went, token by token.")] = False
    decoder_input_details: Annotated[
        bool, Meta(description="Also tell the prompt's tokens with log-probabilities; implies `details`.")
    ] = False
    seed: Annotated[U64 | None, Meta(description="Seed of the draws; null: a random one.")] = None
    top_n_tokens: Annotated[U32 | None, Meta(description="Tell the so many most likely tokens at each step.")] = None
    grammar: Annotated[GrammarBody | None, Meta(description="A constraint on the generated text.")] = None
    adapter_id: Annotated[str | None, Meta(description="LoRA adapter to use.")] = None

    def __post_init__(self) -> None:
        _check_u64("seed", self.seed)
        if self.grammar is not None and (self.grammar.value is UNSET or self.grammar.type == "text"):
            raise ValueError("`grammar` needs a `type` of json, regex, json_schema, choice or lark, and a `value`")


class GenerateBody(Struct, kw_only=True):
    """Body of the native routes."""

    inputs: Annotated[str, Meta(description="The prompt.", examples=["My name is Olivier and I"])]
    parameters: ParametersBody = msgspec.field(default_factory=ParametersBody)


class DetokenizeBody(Struct, kw_only=True):
    """Body of `/detokenize`."""

    tokens: Annotated[list[U32], Meta(description="Token ids.", examples=[[1, 2, 3]])]
    skip_special_tokens: Annotated[bool, Meta(description="Leave out special tokens, as answers do.")] = True


class CompatGenerateBody(GenerateBody, kw_only=True):
    """Body of `POST /`."""

    stream: Annotated[bool, Meta(description="Answer with a stream of events.")] = False


class SagemakerBody(Struct, kw_only=True):
    """Body of `/invocations`: that of `/`, of `/v1/chat/completions` or of `/v1/completions`."""

    inputs: Annotated[Any, Meta(description="As for `/`, with what belongs to it.")] = UNSET
    messages: Annotated[Any, Meta(description="As for `/v1/chat/completions`, with what belongs to it.")] = UNSET
    prompt: Annotated[Any, Meta(description="As for `/v1/completions`, with what belongs to it.")] = UNSET


class VertexParameters(ParametersBody, kw_only=True):
    """As on the native routes, but tokens are drawn unless `do_sample` says otherwise."""

    do_sample: Annotated[bool, Meta(description="Draw tokens, instead of taking the most likely one.")] = True


class VertexGenerate(GenerateBody, kw_only=True):
    """One instance of `/vertex`, if it is no chat."""

    parameters: VertexParameters = msgspec.field(default_factory=VertexParameters)


class VertexBody(Struct):
    """Body of `/vertex`."""

    instances: Annotated[
        list[msgspec.Raw],
        Meta(description="Each `{inputs, parameters}`, or a chat as `/v1/chat/completions` takes it."),
    ]


class InputTensor(Struct, kw_only=True):
    name: str
    shape: list[Annotated[int, Meta(ge=0)]]
    datatype: str
    data: Annotated[
        list[Annotated[int, Meta(ge=0, le=255)] | str],
        Meta(description="The bytes of one UTF-8 text as numbers, or a list of one text."),
    ]


class OutputName(Struct):
    name: str


class InferenceBody(Struct, kw_only=True):
    """Body of KServe's `infer`."""

    id: str
    inputs: list[InputTensor]
    outputs: list[OutputName]
    parameters: ParametersBody = msgspec.field(default_factory=ParametersBody)


class ImageUrl(Struct):
    url: str
    detail: str | None = None


class TextPart(Struct, tag_field="type", tag="text"):
    text: str
    prompt_cache_breakpoint: Annotated[Any, Meta(description="Accepted; equal beginnings are found without it.")] = None


class RefusalPart(Struct, tag_field="type", tag="refusal"):
    refusal: str


class ImagePart(Struct, tag_field="type", tag="image_url"):
    image_url: ImageUrl | str
    prompt_cache_breakpoint: Annotated[Any, Meta(description="Accepted, as in a text.")] = None


class AudioPart(Struct, tag_field="type", tag="input_audio"):
    input_audio: Any


class FilePart(Struct, tag_field="type", tag="file"):
    file: Any


class VideoPart(Struct, tag_field="type", tag="video_url"):
    video_url: Any


Part = TextPart | RefusalPart | ImagePart | AudioPart | FilePart | VideoPart


class CalledFunction(Struct, kw_only=True):
    name: str
    description: str | None = None
    arguments: Any = UNSET
    parameters: Any = UNSET

    def __post_init__(self) -> None:
        if self.arguments is UNSET and self.parameters is UNSET:
            raise ValueError("a called function needs `arguments`")


class ToolCall(Struct, kw_only=True):
    function: CalledFunction
    id: str = ""
    type: str = "function"


class Message(Struct, kw_only=True):
    """One turn of a chat."""

    role: Annotated[str, Meta(description="system, user, assistant or tool.", examples=["user"])]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: Annotated[str | None, Meta(description="Of an earlier answer; stands for its missing `content`.")] = None
    reasoning_content: Annotated[str | None, Meta(description="Of an earlier answer; templates may show it.")] = None
    annotations: Annotated[Any, Meta(description="Of an earlier answer; accepted, the model is not told.")] = None
    audio: Annotated[Any, Meta(description="Refused, unless null.")] = None
    function_call: Annotated[Any, Meta(description="Refused, unless null: use `tool_calls`.")] = None

    def __post_init__(self) -> None:
        if self.content is None and not self.tool_calls and self.refusal is None:
            raise ValueError("a message needs `content` or `tool_calls`")


class FunctionDefinition(Struct, kw_only=True):
    name: str
    description: str | None = None
    parameters: Any = UNSET
    arguments: Any = UNSET
    strict: Annotated[bool | None, Meta(description="Hold the call's arguments to the schema.")] = None


class Tool(Struct, kw_only=True):
    function: FunctionDefinition
    type: str = "function"


class NamedFunction(Struct):
    name: str


class CalledTool(Struct, kw_only=True):
    function: NamedFunction
    type: str = "function"


class AllowedTools(Struct, kw_only=True):
    """The functions that may be called, of those that the model is told of."""

    mode: Literal["auto", "required"]
    tools: list[CalledTool]


class NamedTool(Struct, kw_only=True):
    """The function to call, or those of which the model may choose."""

    type: str = "function"
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None

    def __post_init__(self) -> None:
        if (self.function is None) == (self.allowed_tools is None):
            raise ValueError("a tool choice needs `function` or `allowed_tools`")


class StreamOptions(Struct, kw_only=True):
    include_usage: Annotated[bool | None, Meta(description="Send one more event with the token counts.")] = False
    include_obfuscation: Annotated[bool | None, Meta(description="Accepted; events are not padded.")] = None


class SamplingBody(Struct, kw_only=True):
    """What the two OpenAI routes share. Null always means: not given."""

    model: Annotated[str | None, Meta(description="Served model, one of its adapters, or `tgi`.")] = None
    max_tokens: Annotated[
        U32 | None, Meta(description="Generate at most so many tokens; null: as many as the server allows.")
    ] = None
    temperature: Annotated[float | None, Meta(description="0: take the most likely token. Default 1.")] = None
    top_p: Annotated[float | None, Meta(description="Draw from the fewest tokens whose share reaches it; 1: off.")] = (
        None
    )
    top_k: Annotated[I32 | None, Meta(description="Draw from the so many most likely tokens; 0 or -1: off.")] = None
    min_p: Annotated[
        float | None, Meta(description="0 to 1. Drop tokens less likely than this share of the most likely one.")
    ] = None
    frequency_penalty: Annotated[float | None, Meta(description="-2 to 2.")] = None
    presence_penalty: Annotated[float | None, Meta(description="-2 to 2.")] = None
    repetition_penalty: Annotated[float | None, Meta(description="Above 0; 1 is neutral.")] = None
    logit_bias: Annotated[
        dict[int, float] | None, Meta(description="Added to the logits of these token ids; -100 to 100.")
    ] = None
    stop: Annotated[str | list[str] | None, Meta(description="Stop before one of these would be generated.")] = None
    stop_token_ids: Annotated[list[U32] | None, Meta(description="Stop at one of these tokens.")] = None
    min_tokens: Annotated[U32 | None, Meta(description="Do not end before so many tokens.")] = None
    ignore_eos: Annotated[bool | None, Meta(description="Go on after an end-of-sequence token.")] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-(2**63), extra_json_schema={"maximum": 2**64 - 1})] | None,
        Meta(description="Seed of the draws; null: a random one."),
    ] = None
    n: Annotated[Annotated[int, Meta(ge=1, le=2**32 - 1)] | None, Meta(description="Independent answers.")] = None
    stream: Annotated[bool | None, Meta(description="Answer with a stream of events.")] = False
    stream_options: StreamOptions | None = None
    response_format: Annotated[GrammarBody | None, Meta(description="A constraint on the answer.")] = None
    structured_outputs: Annotated[StructuredOutputs | None, Meta(description="The same in vLLM's form.")] = None
    guided_json: Annotated[Any, Meta(description="JSON schema of the answer, object or text.")] = None
    guided_regex: Annotated[str | None, Meta(description="Regular expression of the answer.")] = None
    guided_choice: Annotated[list[str] | None, Meta(description="The answer is one of these.")] = None
    guided_grammar: Annotated[str | None, Meta(description="Lark or GBNF grammar of the answer.")] = None
    guided_decoding_backend: Annotated[str | None, Meta(description="Accepted; this server has one.")] = None
    guided_whitespace_pattern: Annotated[
        Any, Meta(description="Refused: there is at most one space between parts.")
    ] = None
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=2**32 - 1)] | None,
        Meta(description="Keep only the last so many tokens of the prompt."),
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="Begin the prompt as the tokenizer does; default: no for a chat, yes for a completion."),
    ] = None
    cache_salt: Annotated[
        str | None, Meta(description="Share cached prefixes only with requests of the same salt.")
    ] = None
    user: Annotated[str | None, Meta(description="Accepted; this server keeps no record of users.")] = None
    safety_identifier: Annotated[str | None, Meta(description="Accepted, as `user`.")] = None
    metadata: Annotated[dict[str, Any] | None, Meta(description="Accepted; nothing is stored.")] = None
    store: Annotated[bool | None, Meta(description="Accepted; nothing is stored.")] = None
    service_tier: Annotated[str | None, Meta(description="Accepted; there is one tier.")] = None
    prompt_cache_key: Annotated[str | None, Meta(description="Accepted; equal beginnings are found without it.")] = None
    prompt_cache_retention: Annotated[str | None, Meta(description="Accepted; prefixes stay while there is room.")] = (
        None
    )
    prompt_cache_options: Annotated[Any, Meta(description="Accepted; equal beginnings are found without it.")] = None
    moderation: Annotated[Any, Meta(description="Refused: this server moderates nothing.")] = None
    prediction: Annotated[Any, Meta(description="Accepted; it could only make the same answer faster.")] = None

    def __post_init__(self) -> None:
        _check_u64("seed", self.seed)


class ChatBody(SamplingBody, kw_only=True):
    """Body of `/v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: Annotated[U32 | None, Meta(description="Same as `max_tokens`.")] = None
    logprobs: Annotated[bool | None, Meta(description="Tell each token's log-probability.")] = None
    top_logprobs: Annotated[
        U32 | None, Meta(description="Tell the so many most likely tokens at each step; implies `logprobs`.")
    ] = None
    tools: Annotated[list[Tool] | None, Meta(description="Functions that the model may call.")] = None
    tool_choice: Annotated[
        str | NamedTool | None, Meta(description="`none`, `auto`, `required` or the function to call.")
    ] = None
    tool_prompt: Annotated[str | None, Meta(description="How to call tools, in words.")] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="Whether one answer may hold several calls.")] = None
    separate_reasoning: Annotated[
        bool | None, Meta(description="false: thoughts stay in `content`, as the model wrote them.")
    ] = None
    include_reasoning: Annotated[bool | None, Meta(description="false: thoughts are left out of the answer.")] = None
    modalities: Annotated[list[str] | None, Meta(description='Only `["text"]`.')] = None
    audio: Annotated[Any, Meta(description="Refused: this server answers with text.")] = None
    functions: Annotated[Any, Meta(description="Refused: use `tools`.")] = None
    function_call: Annotated[Any, Meta(description="Refused: use `tool_choice`.")] = None
    web_search_options: Annotated[Any, Meta(description="Refused: this server does not search.")] = None
    reasoning_effort: Annotated[str | None, Meta(description="Told to the chat template, if it knows it.")] = None
    verbosity: Annotated[str | None, Meta(description="Accepted; ask for it in words.")] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="End the prompt where the assistant's turn begins; default: unless one goes on.")
    ] = None
    continue_final_message: Annotated[
        bool | None,
        Meta(description="Go on with the last message instead of answering it; default: if it is the assistant's."),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="Further variables, of those that the model's chat template reads.")
    ] = None
    chat_template: Annotated[Any, Meta(description="Refused: the model's own template is used.")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("duplicate field `max_tokens`: it contradicts `max_completion_tokens`")


class CompletionBody(SamplingBody, kw_only=True):
    """Body of `/v1/completions`."""

    prompt: Annotated[
        str | list[str | U32 | list[U32]],
        Meta(description="A text, token ids, or a list of either.", examples=["What is Deep Learning?"]),
    ]
    suffix: Annotated[str | None, Meta(description="Refused.")] = None
    echo: Annotated[bool | None, Meta(description="Put the prompt before the generated text.")] = None
    logprobs: Annotated[
        U32 | None, Meta(description="Tell each token's log-probability and the so many most likely ones.")
    ] = None
    best_of: Annotated[
        U32 | None, Meta(description="Generate so many answers and return the `n` with the best mean log-probability.")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.prompt, list):
            if not self.prompt:
                raise ValueError("Empty array detected. Do not use an empty array for the prompt.")
            if len({type(item) for item in self.prompt}) > 1:
                raise ValueError("`prompt` mixes texts and token ids")
