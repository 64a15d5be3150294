"""One ordered log for all processes: text for people or JSON lines, with TGI's keys.

Child processes write JSON lines to their standard output; the launcher reads those and is the only one that writes to
the terminal. Code logs through the standard library and adds what machines read by `fields` or `span`:

    logger.info("Success", extra=span("generate", total_time="1.2ms", seed=7))
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as field_of
from typing import Any, TextIO

import msgspec

TRACE = 5
_LEVELS = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
_OWN = "tgi_"
"""Loggers of this project; others are heard from WARNING on, whatever LOG_LEVEL says, as in TGI."""


def fields(**values: object) -> dict[str, Any]:
    """For ``extra=``: values beside the message."""
    return {"tgi_fields": values}


def span(name: str, /, **values: object) -> dict[str, Any]:
    """For ``extra=``: the request that a line is about; TGI's ``span`` key."""
    return {"tgi_span": {"name": name, **values}}


def progress(logger: logging.Logger, phase: str, fraction: float | None) -> None:
    """Tell how far start-up has come, 0 to 1, or None if unknown; the launcher turns these lines into a display."""
    share = {} if fraction is None else {"progress": round(min(max(fraction, 0.0), 1.0), 3)}
    logger.info(phase, extra=fields(phase=phase, **share))


@dataclass(slots=True)
class Line:
    """One line of the log, on its way between processes."""

    timestamp: str
    """RFC 3339, UTC."""
    level: str
    message: str
    target: str
    process: str = ""
    span: dict[str, Any] = field_of(default_factory=dict)
    fields: dict[str, Any] = field_of(default_factory=dict)
    exception: str = ""

    @staticmethod
    def of(record: logging.LogRecord, process: str = "") -> Line:
        exception = ""
        if record.exc_info:
            exception = logging.Formatter().formatException(record.exc_info)
        return Line(
            timestamp=_timestamp(record.created),
            level=_level_name(record.levelno),
            message=record.getMessage(),
            target=record.name,
            process=process,
            span=getattr(record, "tgi_span", {}),
            fields=getattr(record, "tgi_fields", {}),
            exception=exception,
        )

    @staticmethod
    def now(message: str, target: str, *, process: str = "", fields: dict[str, Any] | None = None) -> Line:
        """A line of level INFO that no logger made."""
        return Line(_timestamp(time.time()), "INFO", message, target, process, fields=fields or {})

    @staticmethod
    def raw(text: str, process: str) -> Line:
        """Something that a child printed without logging it."""
        return Line.now(text, "stdout", process=process)

    def json(self) -> str:
        """One JSON object. Fields lie at the top level, where they may not hide the fixed keys."""
        fixed: dict[str, Any] = {
            "timestamp": self.timestamp,
            "level": self.level,
            "message": self.message,
            "target": self.target,
        }
        if self.process:
            fixed["process"] = self.process
        if self.exception:
            fixed["exception"] = self.exception
        if self.span:
            fixed["span"] = self.span
            fixed["spans"] = [self.span]
        return msgspec.json.encode(
            fixed | {k: v for k, v in self.fields.items() if k not in fixed}, enc_hook=str
        ).decode()

    def text(self, colour: bool = False) -> str:
        """``time LEVEL process span{key=value}: target: message key=value``."""
        paint, plain = (_COLOURS.get(self.level, ""), "\033[0m") if colour else ("", "")
        parts = [f"{self.timestamp} {paint}{self.level:>5}{plain}"]
        if self.process:
            parts.append(self.process)
        if self.span:
            inner = _pairs({key: value for key, value in self.span.items() if key != "name"})
            parts.append(f"{self.span.get('name', '')}{{{inner}}}:")
        parts.append(f"{self.target}: {_one_line(self.message)}")
        if self.fields:
            parts.append(_pairs(self.fields))
        return " ".join(parts) + (f"\n{self.exception}" if self.exception else "")


_COLOURS = {"ERROR": "\033[31m", "WARN": "\033[33m", "INFO": "\033[32m", "DEBUG": "\033[34m", "TRACE": "\033[35m"}


class Log:
    """The launcher's writer of lines: its own and those of its children."""

    def __init__(self, *, json_output: bool, stream: TextIO | None = None) -> None:
        self._json_output = json_output
        self._stream = stream

    def write(self, line: Line) -> None:
        # Looked up at each line: a progress display may have put itself in front of the terminal.
        for stream in (self._stream or sys.stdout, sys.__stderr__):
            if stream is None:
                continue
            try:
                text = line.json() if self._json_output else line.text(stream.isatty())
                stream.write(text + "\n")
                stream.flush()
            except (OSError, ValueError):
                continue  # whoever read it is gone, or its disk is full; the server is not
            return

    def relay(self, text: bytes, process: str) -> Line:
        """Write one line that a child printed; returns it."""
        line = decode(text, process)
        self.write(line)
        return line


class _Handler(logging.Handler):
    def __init__(self, log: Log, process: str) -> None:
        super().__init__()
        self._log = log
        self._process = process

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log.write(Line.of(record, self._process))
        except Exception:  # e.g. arguments that do not fit the message: logging's own way to tell
            self.handleError(record)


def configure(level: str, *, json_output: bool, stream: TextIO | None = None) -> Log:
    """Send this process's log records to `stream` (None: standard output). Call once, early."""
    log = Log(json_output=json_output, stream=stream)
    _install(_Handler(log, ""), level)
    return log


def configure_child(level: str, process: str) -> None:
    """The same for a child process, whose standard output the launcher reads."""
    _install(_ChildHandler(process), level)


class _ChildHandler(logging.Handler):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def emit(self, record: logging.LogRecord) -> None:
        try:
            document = msgspec.json.encode(Line.of(record, self._process), enc_hook=str)
            sys.stdout.write(_MARK + document.decode() + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            pass  # the launcher is gone, and this process is about to notice
        except Exception:
            self.handleError(record)


_MARK = "\x1etgi "
"""Starts a child's log line, so that a library's own JSON output is not taken for one."""


def decode(text: bytes, process: str) -> Line:
    """A line that a child wrote, its own log or anything printed."""
    mark = _MARK.encode()
    if text.startswith(mark):
        try:
            return msgspec.json.decode(text[len(mark) :], type=Line)
        except msgspec.MsgspecError:
            pass  # two writers' lines ran into each other: show it as it came
    return Line.raw(text.decode(errors="replace"), process)


def _install(handler: logging.Handler, level: str) -> None:
    threshold = _LEVELS[level.lower()]
    others = max(threshold, logging.WARNING)
    logging.addLevelName(TRACE, "TRACE")
    handler.addFilter(lambda record: record.levelno >= (threshold if record.name.startswith(_OWN) else others))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(threshold)
    logging.captureWarnings(True)


def _level_name(number: int) -> str:
    for name, value in reversed(_LEVELS.items()):
        if number >= value:
            return name.upper()
    return "TRACE"


def _timestamp(seconds: float) -> str:
    micros = int(seconds % 1 * 1e6)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{micros:06d}Z"


def _pairs(values: Mapping[str, object]) -> str:
    return " ".join(f"{key}={_one_line(_shown(value))}" for key, value in values.items())


def _shown(value: object) -> str:
    return (
        msgspec.json.encode(value, enc_hook=str).decode() if isinstance(value, (str, dict, list, tuple)) else str(value)
    )


def _one_line(text: str) -> str:
    """Without control characters: nobody writes a second line, or to the terminal, through a log field."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
