"""Rendering: messages to text, once as the Jinja template that ships and once as segments that say what is trained."""

import json
from collections.abc import Sequence

from lessons.exchange import Message, Tool

END_OF_TURN, END_OF_TEXT, START_OF_TURN = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
PLAIN_ADDED_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")

TOOLS_INTRO = (
    '# Tools\nTo use a tool, answer with\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>\n<tools>\n'
)

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content -%}{%- for part in content -%}{{ part.text if part.type == 'text' else '' }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set first = messages[0] if messages and messages[0].role == 'system' else none -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if first -%}{{ text(first.content) + '\\n\\n' }}{%- endif -%}
  {{- 'INTRO' -}}
  {%- for tool in tools -%}
    {%- set f = tool.function if tool.function is defined else tool -%}
    {{- '{"name": ' + f.name | tojson -}}
    {%- if f.description -%}{{ ', "description": ' + f.description | tojson }}{%- endif -%}
    {%- set parameters = f.parameters or f.arguments or {} -%}
    {{- ', "parameters": ' + (parameters.properties or {}) | tojson + '}\\n' -}}
  {%- endfor -%}
  {{- '</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'system' and tools and loop.first -%}
  {%- elif message.role == 'tool' -%}
    {{- '<|im_start|>user\\n<tool_response>\\n' + text(message.content) + '\\n</tool_response><|im_end|>\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + message.role + '\\n' + text(message.content) -}}
    {%- for call in message.tool_calls or [] -%}
      {%- set f = call.function if call.function is defined else call -%}
      {{- '\\n' if text(message.content) or not loop.first else '' -}}
      {{- '<tool_call>\\n{"name": ' + f.name | tojson + ', "arguments": ' -}}
      {{- (f.arguments if f.arguments is string else f.arguments | tojson) + '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
""".replace("INTRO", TOOLS_INTRO.replace("\n", "\\n"))

Segment = tuple[str, bool]  # text, and whether the model learns to write it


def signature(tool: Tool) -> str:
    function = tool["function"]
    shown = {key: function[key] for key in ("name", "description") if key in function}
    return json.dumps(shown | {"parameters": function["parameters"]["properties"]}, ensure_ascii=False)


def assistant_text(message: Message) -> str:
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls") or []
    ]
    return "\n".join([part for part in [message["content"], *calls] if part])


def segments(messages: Sequence[Message], tools: Sequence[Tool] = (), system: str = "") -> list[Segment]:
    """What the template makes of a conversation; the assistant's words and their end are the trained part."""
    if messages[0]["role"] == "text":
        last = messages[-1]
        parts = [(message["content"], message is last or bool(message.get("trained"))) for message in messages]
        return [*parts, (END_OF_TEXT, True)]
    shown: list[Segment] = []
    head = system
    if tools:
        listed = "\n".join(signature(tool) for tool in tools)
        head = (f"{system}\n\n" if system else "") + f"{TOOLS_INTRO}{listed}\n</tools>"
    prefix = f"{START_OF_TURN}system\n{head}{END_OF_TURN}\n" if head else ""
    for message in messages:
        if message["role"] == "assistant":
            shown.append((f"{prefix}{START_OF_TURN}assistant\n", False))
            shown.append((assistant_text(message) + END_OF_TURN, True))
            prefix = "\n"
        elif message["role"] == "tool":
            prefix += f"{START_OF_TURN}user\n<tool_response>\n{message['content']}\n</tool_response>{END_OF_TURN}\n"
        else:
            prefix += f"{START_OF_TURN}{message['role']}\n{message['content']}{END_OF_TURN}\n"
    return shown
