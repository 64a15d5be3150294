"""The launcher's parts: child processes, the port, the private folder, the progress display."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import stat
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tgi_gateway.errors import StartError
from tgi_gateway.launcher import processes, runtime
from tgi_gateway.launcher.child import Assignment
from tgi_gateway.launcher.display import Display
from tgi_gateway.launcher.processes import Child
from tgi_gateway.settings import Settings
from tgi_gateway.telemetry import logs
from tgi_gateway.telemetry.logs import Line, Log

WAIT_S = 60.0
BEGIN = "import asyncio, os, sys, time\nfrom tgi_gateway.launcher import child\n"
END = "\nsys.exit(child.run(main))\n"


class Family:
    """Starts children that run a few lines, and keeps what they print."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[Line] = []
        self.children: list[Child] = []

    async def start(self, body: str, *, proper: bool = True) -> Child:
        """`body` is that of ``async def main(assignment, reporter)``; or, not `proper`, of the whole module."""
        module = f"toy_child_{len(self.children)}"
        if proper:
            body = BEGIN + "async def main(assignment, reporter):\n" + textwrap.indent(body, "    ") + END
        (self.folder / f"{module}.py").write_text(body)
        environ = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONUNBUFFERED": "1"}
        runtime_folder = str(self.folder / "runtime")
        assignment = Assignment("toy", Settings(), -1, runtime_folder, "", worker=7)
        child = await processes.start(
            module, assignment, environ=environ, on_line=lambda text, name: self.lines.append(logs.decode(text, name))
        )
        self.children.append(child)
        return child

    @property
    def messages(self) -> list[str]:
        return [line.message for line in self.lines]

    async def end(self) -> None:
        for child in self.children:
            child.kill()
            await child.exit


@pytest.fixture
async def family(tmp_path: Path) -> AsyncIterator[Family]:
    family = Family(tmp_path)
    yield family
    await family.end()


async def test_a_child_gets_its_assignment_and_tells_that_it_is_ready(family: Family) -> None:
    child = await family.start("reporter.ready(f'{assignment.process} {assignment.worker} {assignment.settings.port}')")
    assert await child.ready() == "toy 7 3000"
    assert await child.exit == 0


async def test_a_childs_lines_come_in_order_whatever_they_are(family: Family) -> None:
    child = await family.start(
        "import logging\n"
        "print('printed'); print('to stderr', file=sys.stderr)\n"
        "logging.getLogger('tgi_gateway.toy').info('logged')\n"
        "os.write(1, b'x' * 3_000_000 + b'\\n'); os.write(2, b'no newline at the end')"
    )
    assert await child.exit == 0
    assert family.messages[:3] == ["printed", "to stderr", "logged"]
    assert family.lines[2].target == "tgi_gateway.toy"
    assert family.messages[-1] == "no newline at the end"
    assert sum(map(len, family.messages[3:-1])) == 3_000_000


async def test_an_error_that_a_user_can_mend_keeps_its_message_and_exit_code(family: Family) -> None:
    child = await family.start("from tgi_gateway.errors import SettingsError\nraise SettingsError('mend me')")
    with pytest.raises(StartError, match=r"^mend me$") as error:
        await child.ready()
    assert error.value.exit_code == 2
    assert family.messages == []


async def test_an_error_of_ours_is_logged_with_its_traceback(family: Family) -> None:
    child = await family.start("raise KeyError('lost')")
    with pytest.raises(StartError, match="KeyError: 'lost'"):
        await child.ready()
    (line,) = family.lines
    assert line.level == "ERROR"
    assert "Traceback" in line.exception


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("os._exit(3)", "toy ended with code 3 before it was ready"),
        ("os.kill(os.getpid(), 9)", r"toy was ended by SIGKILL \(the system may have run out of memory"),
        ("os.kill(os.getpid(), 11)", "toy was ended by SIGSEGV before it was ready"),
    ],
)
async def test_a_death_without_a_word_is_told(family: Family, body: str, text: str) -> None:
    child = await family.start(body)
    with pytest.raises(StartError, match=text):
        await child.ready()


async def test_a_module_that_cannot_be_imported_shows_why(family: Family) -> None:
    child = await family.start("import no_such_module", proper=False)
    with pytest.raises(StartError, match="toy ended with code 1 before it was ready"):
        await child.ready()
    assert "No module named 'no_such_module'" in family.messages[-1]


async def test_a_child_that_never_reads_its_assignment_is_an_early_end(family: Family) -> None:
    child = await family.start("import sys; sys.exit(0)", proper=False)
    with pytest.raises(StartError, match="before it was ready"):
        await child.ready()


async def test_stop_waits_for_an_orderly_end(family: Family) -> None:
    child = await family.start("told = child.stop_signal()\nreporter.ready()\nawait told.wait()\nprint('orderly')")
    await child.ready()
    assert await child.stop(WAIT_S) is True
    assert child.exit.result() == 0
    assert family.messages == ["orderly"]


async def test_stop_kills_what_does_not_end(family: Family) -> None:
    child = await family.start(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nreporter.ready()\ntime.sleep(1000)"
    )
    await child.ready()
    assert await child.stop(0.1) is False
    assert child.exit.result() == -signal.SIGKILL


async def test_kill_reaches_what_the_child_has_started(family: Family) -> None:
    child = await family.start(
        "import subprocess\nreporter.ready(str(subprocess.Popen(['sleep', '1000']).pid))\nawait asyncio.sleep(1000)"
    )
    grandchild = int(await child.ready())
    child.kill()
    await child.exit
    await gone(grandchild)


async def test_a_child_ends_itself_and_its_own_when_the_launcher_is_gone(family: Family) -> None:
    runtime_folder = family.folder / "runtime"
    runtime_folder.mkdir()
    child = await family.start(
        "import subprocess\nreporter.ready(str(subprocess.Popen(['sleep', '1000']).pid))\ntime.sleep(1000)"
    )
    grandchild = int(await child.ready())
    assert child.process.stdin is not None
    child.process.stdin.close()  # what the kernel does when the launcher dies
    assert await child.exit == -signal.SIGKILL
    await gone(grandchild)
    assert not runtime_folder.exists()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def gone(pid: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while alive(pid):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


# The port and the folder.


def test_a_port_is_taken_at_once_and_answers_only_when_told() -> None:
    with runtime.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"port {port} of 127.0.0.1 is in use"):
            runtime.bind("127.0.0.1", port)
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", port))
        runtime.listen(taken, dead_after_s=60.0)
        with socket.create_connection(("127.0.0.1", port), WAIT_S):
            pass


@pytest.mark.parametrize(
    ("hostname", "text"),
    [("203.0.113.7", "203.0.113.7 is no address of this machine"), ("no.such.name.invalid", "is no address")],
)
def test_an_address_of_another_machine_is_an_error(hostname: str, text: str) -> None:
    with pytest.raises(StartError, match=text):
        runtime.bind(hostname, 0)


def test_the_runtime_folder_is_private_and_removed(tmp_path: Path) -> None:
    parent = Path("/tmp") / f"tgi-test-{os.getpid()}"
    try:
        with runtime.runtime_folder(str(parent)) as folder, runtime.runtime_folder(str(parent)) as other:
            assert folder.path != other.path
            assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
            folder.socket.write_text("")
        assert list(parent.iterdir()) == []
    finally:
        parent.rmdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="Choose a writable one"), runtime.runtime_folder(str(tmp_path / "file")):
        pass


# The display.


def test_without_a_terminal_progress_is_a_line_now_and_then() -> None:
    stream = io.StringIO()
    display = Display(Log(json_output=False, stream=stream), stream=stream)
    with display:
        report = display.bytes("Downloading m")
        for here in (0, 1, 2, 3, 100, 100):
            report(here, 100)
        display.update(Line.now("Warming up", "tgi_model_server", fields={"phase": "Warming up"}))
    told = [line.split("tgi_", 1)[1] for line in stream.getvalue().splitlines()]
    assert told == [
        'gateway.hub: Downloading m: 0% phase="Downloading m" progress=0.0',
        'gateway.hub: Downloading m: 100% phase="Downloading m" progress=1.0',
        'model_server: Warming up phase="Warming up"',
    ]


def test_on_a_terminal_log_lines_appear_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    log = Log(json_output=False)
    with Display(log) as display:
        display.update(Line.now("Loading weights", "t", fields={"phase": "Loading weights", "progress": 0.5}))
        log.write(Line.now("a log line", "t"))
    text = terminal.getvalue()
    assert "a log line" in text
    assert "Loading weights" in text
    assert "50%" in text
