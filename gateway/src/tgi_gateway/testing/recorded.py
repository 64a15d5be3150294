"""Recorded: a model that says one text, byte by byte, behind the real application. Needs httpx."""

from __future__ import annotations

from dataclasses import replace

from tgi_gateway.backend import Feature
from tgi_gateway.testing.scripted import SCRIPTED_CAPABILITIES, Script, ScriptedBackend
from tgi_gateway.testing.worker import VOCAB_SIZE, byte_toy
from tgi_gateway.types import Request

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
HERMES = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function | tojson }}{% endfor %}</tools><tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role }}{{ m.tool_call_id or '' }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call {{ c.id }}>{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}"
)
"""Chat templates: one that knows no tools, one of a model that calls tools as Hermes."""


class Recorded(ScriptedBackend):
    """Says one text, and keeps what it was asked."""

    def __init__(self, ids: list[int], *, grammar: bool = False) -> None:
        more: frozenset[Feature] = frozenset({"grammar"} if grammar else ())
        super().__init__(
            [Script.of(*ids)],
            byte_toy(vocab_size=VOCAB_SIZE + 8, max_total_tokens=4096),
            capabilities=replace(SCRIPTED_CAPABILITIES, features=SCRIPTED_CAPABILITIES.features | more),
        )
        self.asked: list[Request] = []

    def submit(self, request: Request) -> None:
        self.asked.append(request)
        super().submit(request)
