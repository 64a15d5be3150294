"""One ordered log: text for people, JSON lines for machines, children's lines through the launcher."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime

import pytest

from tgi_gateway.telemetry import logs


@pytest.fixture(autouse=True)
def root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def written(level: str = "info", *, json_output: bool = False) -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    logs.configure(level, json_output=json_output, stream=stream)
    return logging.getLogger("tgi_gateway.some.module"), stream


def test_a_text_line_has_time_level_target_message_and_fields() -> None:
    logger, stream = written()
    logger.warning("Queue is %d long", 7, extra=logs.fields(worker=1, model="a b"))
    time, rest = stream.getvalue().split(" ", 1)
    assert datetime.fromisoformat(time).tzinfo is not None
    assert rest == ' WARN tgi_gateway.some.module: Queue is 7 long worker=1 model="a b"\n'


def test_a_json_line_has_tgis_keys_and_fields_at_the_top() -> None:
    logger, stream = written(json_output=True)
    logger.info("Success", extra=logs.span("generate", total_time="1.2ms", seed=None) | logs.fields(worker=1))
    line = json.loads(stream.getvalue())
    assert line["level"] == "INFO"
    assert line["message"] == "Success"
    assert line["target"] == "tgi_gateway.some.module"
    assert line["span"] == {"name": "generate", "total_time": "1.2ms", "seed": None}
    assert line["spans"] == [line["span"]]
    assert line["worker"] == 1


def test_a_field_cannot_hide_a_fixed_key() -> None:
    logger, stream = written(json_output=True)
    logger.info("truth", extra={"tgi_fields": {"message": "lie", "level": "ERROR"}})
    line = json.loads(stream.getvalue())
    assert (line["message"], line["level"]) == ("truth", "INFO")


def test_a_value_that_json_does_not_know_is_written_as_text() -> None:
    logger, stream = written(json_output=True)
    logger.info("x", extra=logs.fields(value=complex(1, 2)))
    assert json.loads(stream.getvalue())["value"] == "(1+2j)"


def test_control_characters_cannot_forge_a_second_line() -> None:
    logger, stream = written()
    logger.info("stop\n2026 ERROR forged \x1b[31m", extra=logs.fields(stop="a\nb"))
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_an_exception_is_shown_with_its_traceback() -> None:
    logger, stream = written()
    try:
        raise KeyError("lost")
    except KeyError:
        logger.exception("failed")
    assert "KeyError: 'lost'" in stream.getvalue()
    assert "Traceback" in stream.getvalue()


@pytest.mark.parametrize(("level", "own", "others"), [("debug", 10, 30), ("info", 20, 30), ("error", 40, 40)])
def test_log_level_is_for_our_own_loggers_and_others_speak_from_warning_on(level: str, own: int, others: int) -> None:
    logger, stream = written(level)
    for number in (10, 20, 30, 40):
        logger.log(number, "own-%d", number)
        logging.getLogger("urllib3").log(number, "other-%d", number)
    lines = stream.getvalue()
    assert [n for n in (10, 20, 30, 40) if f"own-{n}" in lines] == [n for n in (10, 20, 30, 40) if n >= own]
    assert [n for n in (10, 20, 30, 40) if f"other-{n}" in lines] == [n for n in (10, 20, 30, 40) if n >= others]


CHILD = """
import logging
from tgi_gateway.telemetry import logs
logs.configure_child("info", "engine")
logger = logging.getLogger("tgi_gateway.child")
logger.info("hello %s", "you", extra=logs.fields(n=3) | logs.span("s", k="v"))
print("printed by a library", flush=True)
print('{"message": "json of a library"}', flush=True)
logs.progress(logger, "Loading weights", 0.25)
"""


def test_a_childs_lines_arrive_whole_through_the_launchers_log() -> None:
    out = subprocess.run([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, check=True).stdout
    stream = io.StringIO()
    log = logs.Log(json_output=True, stream=stream)
    lines = [log.relay(text, "engine") for text in out.splitlines()]
    assert lines[0].message == "hello you"
    assert lines[0].fields == {"n": 3}
    assert lines[0].span == {"name": "s", "k": "v"}
    assert lines[1].message == "printed by a library"
    assert lines[2].message == '{"message": "json of a library"}'
    assert lines[3].fields == {"phase": "Loading weights", "progress": 0.25}
    assert [json.loads(text)["process"] for text in stream.getvalue().splitlines()] == ["engine"] * 4


def test_a_torn_child_line_is_shown_as_it_came() -> None:
    assert logs.decode(b'\x1etgi {"timestamp": "x', "http-0").message.endswith('{"timestamp": "x')


class Gone(io.StringIO):
    def write(self, text: str) -> int:  # noqa: ARG002
        raise BrokenPipeError


def test_the_server_outlives_the_reader_of_its_log(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logs.Log(json_output=False, stream=Gone())
    log.write(logs.Line.raw("to standard error", "engine"))
    assert "to standard error" in capfd.readouterr().err
    monkeypatch.setattr("sys.__stderr__", Gone())
    log.write(logs.Line.raw("into the void", "engine"))
