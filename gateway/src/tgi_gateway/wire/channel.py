"""What both ends of the socket agree on: method names, limits, and a socket path that is safe to use."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from tgi_gateway.errors import StartError

SERVICE = "tgi_gateway.wire.Engine"
ATTACH, HEALTH, CANCEL = "Attach", "Health", "Cancel"

MAX_MESSAGE_BYTES = 256 << 20
"""A prompt of a million tokens takes about 4 MB; its log-probabilities 8 MB."""
WORKER_SHIFT = 48
"""Request ids carry their worker above this bit."""

MAX_SOCKET_PATH_BYTES = 107
"""sockaddr_un.sun_path less its closing zero (unix(7))."""

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # The peer is on this machine: when it dies the socket closes, so pings would tell nothing new.
    ("grpc.keepalive_time_ms", 2**31 - 1),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Proxies of the environment are for http, never for a Unix socket.
    ("grpc.enable_http_proxy", 0),
)

WORKER_OPTIONS: tuple[tuple[str, int], ...] = (
    *OPTIONS,
    # A small, fixed receive window. By default gRPC widens it and keeps whole seconds of unread steps; so the host
    # notices at once when a worker is behind, and merges steps instead, which then cost the worker far less.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024),
)


def address(socket_path: Path) -> str:
    """gRPC's name of the socket. Raises StartError if the system cannot hold so long a path."""
    size = len(os.fsencode(socket_path.absolute()))
    if size > MAX_SOCKET_PATH_BYTES:
        raise StartError(
            f"the socket path {socket_path} has {size} bytes; Unix sockets allow {MAX_SOCKET_PATH_BYTES}. "
            "Choose a shorter folder."
        )
    return f"unix:{socket_path.absolute()}"


def prepare_folder(socket_path: Path) -> None:
    """Make the socket's folder, for this user alone. Raises StartError if others could reach it or we cannot write.

    The folder is what protects the socket: between bind and chmod the socket itself has the umask's mode.
    """
    folder = socket_path.absolute().parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise StartError(f"the socket folder {folder} cannot be made: {error.strerror}. Choose another.") from error
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise StartError(
            f"the socket folder {folder} has mode {stat.S_IMODE(found.st_mode):04o} and owner {found.st_uid}; other "
            "users must not reach the engine's socket. Use a folder of your own with mode 0700."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StartError(f"the socket folder {folder} is not writable. Choose another.")
    try:
        socket_mode = socket_path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(socket_mode):
        raise StartError(f"{socket_path} exists and is not a socket. Remove it or choose another path.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(socket_path.absolute()))
        except OSError:
            socket_path.unlink(missing_ok=True)  # left by a host that was killed
            return
    raise StartError(f"another engine host already listens on {socket_path}. Stop it or choose another path.")
