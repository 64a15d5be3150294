"""A model's chat template: messages to prompt text, in a sandbox with limits.

The template comes from a model folder, the messages from a client; neither may run code, hold a worker up or fill its
memory. The environment equals that of `transformers`, for which templates are written.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.filters import do_format
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tgi_gateway.errors import ModelError, TemplateError
from tgi_gateway.prompt.tokenizer import named_special_tokens, read_json

log = logging.getLogger(__name__)

DEFAULT = "default"
TOOL_USE = "tool_use"
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Names that a client's template arguments may not set; special tokens are reserved as well."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one rendering. Ordinary templates need a thousandth of each."""

    seconds: float = 5.0
    output_characters: int = 16_000_000
    repetition: int = 1_000_000
    """Longest text or list that a multiplication may make."""


class ChatTemplate:
    """The templates of one model, compiled once; `render` may be called from any thread."""

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str | list[str]], limits: Limits | None = None
    ) -> None:
        self._environment = _Environment(limits or Limits())
        self._special_tokens = dict(special_tokens)
        self._reserved = RESERVED | self._special_tokens.keys()
        self._compiled: dict[str, jinja2.Template | TemplateError] = {}
        self._variables: dict[str, frozenset[str]] = {}
        self._sources = dict(sources)
        for name, source in sources.items():
            self._compile(name, source)

    @classmethod
    def from_folder(
        cls, folder: Path | str, tokenizer_config_path: Path | str | None = None, limits: Limits | None = None
    ) -> Self | None:
        """The folder's templates, or None if it has none. Raises `ModelError` for unreadable files.

        In order: the file named by the user, chat_template.jinja with additional_chat_templates/, chat_template.json,
        tokenizer_config.json, processor_config.json.
        """
        folder = Path(folder)
        config = dict(read_json(folder / "special_tokens_map.json"))
        config.update(read_json(folder / "tokenizer_config.json"))
        named: Mapping[str, Any] = {}
        if tokenizer_config_path is not None:
            named = read_json(Path(tokenizer_config_path))
            config.update(named)
        sources = (
            _sources(named)
            or _jinja_files(folder)
            or _sources(read_json(folder / "chat_template.json"))
            or _sources(config)
            or _sources(read_json(folder / "processor_config.json"))
        )
        return cls(sources, named_special_tokens(config), limits) if sources else None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._compiled)

    def variables(self, *, with_tools: bool = False) -> frozenset[str]:
        """Names that the template reads, e.g. whether it knows `tools` at all."""
        return self._variables[self._choose(with_tools)]

    def arguments(self, *, with_tools: bool = False) -> frozenset[str]:
        """Names that the template reads and a client may set."""
        return self.variables(with_tools=with_tools) - self._reserved - self._environment.globals.keys()

    def source(self, *, with_tools: bool = False) -> str:
        """The template's own text; empty where the model's templates leave none to choose."""
        try:
            return self._sources[self._choose(with_tools)]
        except TemplateError:
            return ""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `template_kwargs` are the client's template arguments, ``enable_thinking`` and the like.

        Raises `TemplateError` with the template's own message, jinja's, or the line at which it failed.
        """
        kwargs = template_kwargs or {}
        taken = sorted(self._reserved & kwargs.keys())
        if taken:
            raise TemplateError(f"template arguments may not set {', '.join(f'`{name}`' for name in taken)}")
        template = self._compiled[self._choose(with_tools=tools is not None)]
        if isinstance(template, TemplateError):
            raise TemplateError(template.detail)
        context = {"documents": None, **kwargs, **self._special_tokens}
        context.update(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
        return self._environment.bounded(template, context)

    def _choose(self, with_tools: bool) -> str:
        if with_tools and TOOL_USE in self._compiled:
            return TOOL_USE
        if DEFAULT in self._compiled:
            return DEFAULT
        if len(self._compiled) == 1:
            return next(iter(self._compiled))
        raise TemplateError(f"the model has templates {', '.join(sorted(self._compiled))}, but none named `{DEFAULT}`")

    def _compile(self, name: str, source: str) -> None:
        try:
            self._variables[name] = frozenset(meta.find_undeclared_variables(self._environment.parse(source)))
            self._compiled[name] = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            # The model's other uses are not affected, so the server starts and says it again to whoever chats.
            broken = TemplateError(f"the model's chat template is invalid: {error.message} (line {error.lineno})")
            log.warning("%s", broken)
            self._variables[name] = frozenset()
            self._compiled[name] = broken


def _jinja_files(folder: Path) -> dict[str, str]:
    files = {DEFAULT: folder / "chat_template.jinja"}
    files.update({path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))})
    return {name: _read(path) for name, path in files.items() if path.is_file()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not readable text ({error}). Download the model again.") from error


def _sources(config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name from a `chat_template` entry: a text, a list of {name, template}, or an object."""
    entry = config.get("chat_template")
    if isinstance(entry, str):
        return {DEFAULT: entry}
    if isinstance(entry, dict):
        entry = [{"name": name, "template": template} for name, template in entry.items()]
    if not isinstance(entry, list):
        return {}
    found = {}
    for item in entry:
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("name"), str)
            or not isinstance(item.get("template"), str)
        ):
            raise ModelError("`chat_template` must be a text or a list of {name, template}. Download the model again.")
        found[item["name"]] = item["template"]
    return found


_SIZED_FILTERS = ("batch", "center", "indent", "slice")
_LONG_WIDTH = re.compile(r"[%:.][^a-zA-Z%{}]{0,8}?(\d{6,})")
_GIVEN_WIDTH = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class _OverLimit(jinja2.TemplateError):
    """The rendering took too long or grew too large."""


class _Generation(Extension):
    """Tolerates ``{% generation %}``, by which training code finds the assistant's tokens."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, limits: Limits) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.limits = limits
        self.deadline = threading.local()
        self.filters["tojson"] = _to_json
        for name in _SIZED_FILTERS:
            self.filters[name] = self._sized(self.filters[name])
        self.filters["format"] = self._format
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def bounded(self, template: jinja2.Template, context: Mapping[str, Any]) -> str:
        """Render within the limits. Raises only `TemplateError`."""
        self.deadline.at = time.monotonic() + self.limits.seconds
        try:
            return self._collect(template.generate(context))
        except (_Refusal, _OverLimit, jinja2.UndefinedError) as error:
            raise TemplateError(error.message or "the template refused the messages") from error
        except jinja2.TemplateError as error:
            raise TemplateError(f"{error.message}{_line(error, template)}") from error
        except Exception as error:
            # Python's message would speak of our objects, not of the client's messages.
            raise TemplateError(
                f"the model's chat template cannot be applied to these messages{_line(error, template)}; "
                "check that every message has the fields and types it needs"
            ) from error

    def tick(self) -> None:
        """Called at every turn of a loop and every call of a macro."""
        if time.monotonic() > self.deadline.at:
            raise _OverLimit(f"the chat template took longer than {self.limits.seconds:g} seconds")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise _OverLimit("the chat template may not raise to a power")
        if operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else [right])
        for sized, count in ((left, right), (right, left)) if operator == "*" else ():
            if (
                isinstance(sized, str | list | tuple)
                and isinstance(count, int)
                and len(sized) * count > self.limits.repetition
            ):
                raise _OverLimit(f"the chat template repeats a text to more than {self.limits.repetition} characters")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        # jinja hands out str.format wrapped in its own sandboxed version.
        text = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(text, str):  # center() and the like make as much text as they are told
            if function.__name__ == "format":
                self._check_format(text, [*args, *kwargs.values()])
            else:
                self._check_counts([*args, *kwargs.values()])
        return super().call(context, function, *args, **kwargs)

    def _sized(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check_counts([*args, *kwargs.values()])
            return function(*args, **kwargs)

        return checked

    def _format(self, text: object, /, *args: Any, **kwargs: Any) -> str:
        self._check_format(str(text), [*args, *kwargs.values()])
        return do_format(str(text), *args, **kwargs)

    def _check_counts(self, values: Iterable[object]) -> None:
        limit = self.limits.repetition
        if any(isinstance(value, int) and value > limit for value in values):
            raise _OverLimit(f"the chat template asks for more than {limit} characters at once")

    def _check_format(self, text: str, values: Iterable[object]) -> None:
        """Refuse field widths beyond what a multiplication may make, written out or given as a value."""
        self._check_counts(int(width[:18]) for width in _LONG_WIDTH.findall(text))
        if _GIVEN_WIDTH.search(text):
            self._check_counts(values)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
            # An attribute of the environment, which no variable of the template can replace.
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno).set_environment(self))
        return tree

    def _collect(self, pieces: Iterable[str]) -> str:
        parts: list[str] = []
        left = self.limits.output_characters
        for piece in pieces:
            left -= len(piece)
            if left < 0:
                raise _OverLimit(f"the chat template wrote more than {self.limits.output_characters} characters")
            parts.append(piece)
        return "".join(parts)


def _line(error: Exception, template: jinja2.Template) -> str:
    """`` (line N)`` of the template, from the traceback that jinja rewrote."""
    line = 0
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == (template.filename or "<template>"):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (template line {line})" if line else ""


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in `transformers`: unlike jinja's own filter it escapes no HTML and keeps characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
