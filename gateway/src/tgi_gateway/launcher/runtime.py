"""What a server owns on its host: a private folder for its sockets, and its port."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tgi_gateway.errors import StartError
from tgi_gateway.telemetry import files
from tgi_gateway.wire.channel import address

BACKLOG = 2048
_PREFIX = "tgi-gateway-"
_IN_USE = {errno.EADDRINUSE}


@dataclass(frozen=True, slots=True)
class RuntimeFolder:
    """Mode 0700 and a name of its own, so two servers on one host never meet."""

    path: Path

    @property
    def socket(self) -> Path:
        """The engine host's socket."""
        return self.path / "engine"

    @property
    def metrics(self) -> Path:
        """Where the processes' counters are added up."""
        return self.path / "metrics"

    def reserve(self, place: str) -> None:
        """Have the disk hold what a process will count. Raises `StartError`."""
        try:
            files.reserve(self.metrics, place)
        except OSError as error:
            raise StartError(
                f"cannot reserve room for the metrics in {self.metrics}: {error.strerror}. Make room, or choose "
                "another folder with --shard-uds-path, or TMPDIR"
            ) from error

    @property
    def lock(self) -> Path:
        """Held locked by the launcher for as long as it lives."""
        return self.path / "launcher"


@contextlib.contextmanager
def runtime_folder(parent: str | None) -> Iterator[RuntimeFolder]:
    """Make the folder under `parent` (None: the system's temporary files) and remove it at the end.

    Raises `StartError` if it cannot be made or its name is too long for a socket.
    """
    try:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        folder = RuntimeFolder(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)))
    except OSError as error:
        where = parent if parent is not None else "the folder for temporary files"
        raise StartError(
            f"cannot make the folder for sockets in {where}: {error.strerror}. Choose a writable one with "
            "--shard-uds-path, or TMPDIR"
        ) from error
    _sweep(folder.path.parent)
    with (folder.path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path(lock.name).rename(folder.lock)  # under its name it is never seen unlocked
        try:
            address(folder.socket)
            folder.metrics.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder.path, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove the folders of servers that were killed with all their processes at once."""
    for lock in parent.glob(f"{_PREFIX}*/launcher"):
        try:
            if lock.parent.lstat().st_uid != os.geteuid():
                continue
            with lock.open("r+") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:
            continue  # its launcher lives


def bind(hostname: str, port: int) -> socket.socket:
    """Take the port without listening yet: clients are refused until the model is ready. Raises `StartError`."""
    try:
        found = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(f"--hostname: {hostname} is no address of this machine ({error.strerror})") from error
    # A name such as localhost may stand for both; clients that cannot do IPv6 are the more common kind.
    family, kind, protocol, _, where = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    taken = socket.socket(family, kind, protocol)
    try:
        _bind(taken, where)
    except OSError as error:
        taken.close()
        raise _explained(error, hostname, port) from error
    return taken


def _bind(taken: socket.socket, where: object) -> None:
    if taken.family == socket.AF_INET6:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    try:
        # Without SO_REUSEADDR, so that a second server fails now and not after it has loaded its model.
        taken.bind(where)  # type: ignore[arg-type]
    except OSError as error:
        if error.errno not in _IN_USE:
            raise
        # Perhaps only connections of an earlier server, still winding up, are in the way.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(where)  # type: ignore[arg-type]


def listen(taken: socket.socket, *, dead_after_s: float) -> None:
    """Open the port. Raises `StartError` if somebody else was faster.

    A connection whose client takes no byte of what is sent, or has vanished without a word, ends after `dead_after_s`.
    """
    hostname, port = taken.getsockname()[:2]
    try:
        taken.listen(BACKLOG)
    except OSError as error:
        raise _explained(error, hostname, port) from error
    # Accepted connections inherit all of these.
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe_s = max(int(dead_after_s / 4), 1)
    for name, value in (
        ("TCP_KEEPIDLE", probe_s),
        ("TCP_KEEPINTVL", probe_s),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", int(dead_after_s * 1000)),
    ):
        if hasattr(socket, name):  # not every system has them
            taken.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    # Those still winding up will not keep the next server from binding.
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.setblocking(False)


def _explained(error: OSError, hostname: str, port: int) -> StartError:
    match error.errno:
        case errno.EADDRINUSE:
            return StartError(f"port {port} of {hostname} is in use. Stop what uses it, or choose another with --port")
        case errno.EACCES:
            return StartError(f"port {port} needs rights that this user lacks. Choose one above 1023 with --port")
        case errno.EADDRNOTAVAIL:
            return StartError(f"{hostname} is no address of this machine. Correct --hostname")
    return StartError(f"cannot listen on {hostname} port {port}: {os.strerror(error.errno or 0)}")
