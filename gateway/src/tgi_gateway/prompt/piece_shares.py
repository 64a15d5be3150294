"""Which HTTP worker encodes which piece of a long text, and how the others get its ids.

A prompt that comes to all workers at once, and a conversation that comes to one after the other, is so encoded once, by
the threads of all of them. Whose a piece is depends on its text alone. Workers talk over Unix sockets in the server's
private folder; a piece whose worker does not answer is encoded by whoever wants it.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

logger = logging.getLogger(__name__)

WAIT_S = 0.5
WAIT_PER_PIECE_S = 0.005
"""For an answer, before the pieces are encoded here."""
REST_S = 5.0
"""For so long a worker that did not answer is not asked again."""
_BACKLOG = 64
_AGAIN_S = 0.1
_LENGTH_BYTES = 4

Encode: TypeAlias = "Callable[[Sequence[str]], list[array[int]]]"
"""Pieces -> their token ids, int32."""


class PieceShares:
    """One worker's view; from any thread."""

    def __init__(self, folder: Path, worker: int, workers: int) -> None:
        """`folder` is the server's own; `worker` is one of ``0 .. workers - 1``."""
        self._folder = folder
        self._worker = worker
        self._workers = workers
        self._connections: dict[tuple[int, int], socket.socket] = {}
        """By thread and worker: each thread has its own, as it sends, works, and then reads the answers."""
        self._listening: socket.socket | None = None
        self._resting_until_s = [0.0] * workers

    def owner(self, piece: str) -> int:
        return zlib.crc32(piece.encode()) % self._workers

    def serve(self, encode: Encode) -> None:
        """Answer the other workers from threads of its own, with what `encode` gives."""
        path = self._path(self._worker)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)  # of a worker that had this place before
            listening.bind(str(path))
            path.chmod(0o600)
            listening.listen(_BACKLOG)
        except OSError as error:
            listening.close()
            logger.warning("HTTP worker %d encodes long texts for itself alone: %s: %s", self._worker, path, error)
            return
        self._listening = listening
        threading.Thread(target=_accept, args=(listening, encode), name="piece-shares", daemon=True).start()

    def close(self) -> None:
        """Neither ask nor answer any more. No thread is in `ask` or `wait`."""
        while self._connections:
            self._connections.popitem()[1].close()
        if self._listening is not None:
            self._listening.shutdown(socket.SHUT_RDWR)  # ends the thread that accepts
            self._listening.close()

    def ask(self, pieces: Iterable[str]) -> tuple[list[str], list[Asked]]:
        """Those of `pieces` that are to be encoded here, and what others were asked for."""
        parts: list[list[str]] = [[] for _ in range(self._workers)]
        for piece in pieces:
            parts[self.owner(piece)].append(piece)
        own, asked = parts[self._worker], []
        for worker, part in enumerate(parts):
            if worker == self._worker or not part:
                continue
            connection = self._send(worker, part)
            if connection is None:
                own += part
            else:
                asked.append(Asked(self, worker, part, connection))
        return own, asked

    def forget(self, worker: int) -> None:
        """Close this thread's connection to `worker`, which may bring an answer that nobody waits for."""
        connection = self._connections.pop((threading.get_ident(), worker), None)
        if connection is not None:
            connection.close()

    def give_up(self, worker: int, why: Exception) -> None:
        """`forget` it, and leave it alone for a while."""
        self.forget(worker)
        if self._resting_until_s[worker] < time.monotonic():
            self._resting_until_s[worker] = time.monotonic() + REST_S
            logger.debug("HTTP worker %d encodes no pieces of texts for worker %d: %s", worker, self._worker, why)

    def _send(self, worker: int, pieces: Sequence[str]) -> socket.socket | None:
        if time.monotonic() < self._resting_until_s[worker]:
            return None
        body = msgspec.msgpack.encode(pieces)
        place = (threading.get_ident(), worker)
        for _ in range(2):  # a connection that was there may be to a worker that is gone, whose place has another
            connection = self._connections.get(place)
            known = connection is not None
            if connection is None:
                connection = self._connections[place] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                if not known:
                    connection.settimeout(WAIT_S)
                    connection.connect(str(self._path(worker)))
                connection.settimeout(WAIT_S + WAIT_PER_PIECE_S * len(pieces))
                _write(connection, body)
            except OSError as error:
                self.forget(worker)
                if not known:
                    self.give_up(worker, error)
            else:
                return connection
        return None

    def _path(self, worker: int) -> Path:
        return self._folder / f"text{worker}"  # no longer than the engine's socket, which is known to fit


class Asked:
    """Pieces that another worker was asked for, and is encoding."""

    def __init__(self, shares: PieceShares, worker: int, pieces: list[str], connection: socket.socket) -> None:
        self.pieces = pieces
        self._shares = shares
        self._worker = worker
        self._connection = connection

    def drop(self) -> None:
        """Nobody will wait. In the thread that asked."""
        self._shares.forget(self._worker)

    def wait(self) -> list[array[int]] | None:
        """Their ids; None if they did not come in time. In the thread that asked."""
        try:
            body = _read(self._connection)
            if body is None:
                raise ConnectionResetError("it closed the connection")
            ids = [array("i", part) for part in msgspec.msgpack.decode(body, type=list[bytes])]
            if len(ids) != len(self.pieces):
                raise ValueError(f"{len(ids)} answers for {len(self.pieces)} pieces")
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self._shares.give_up(self._worker, error)
            return None
        return ids


def _accept(listening: socket.socket, encode: Encode) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            if listening.fileno() < 0:
                return  # closed
            time.sleep(_AGAIN_S)  # out of file descriptors, say
            continue
        threading.Thread(target=_answer, args=(connection, encode), name="piece-share", daemon=True).start()


def _answer(connection: socket.socket, encode: Encode) -> None:
    """Until the other side is gone."""
    with connection:
        try:
            while (body := _read(connection)) is not None:
                ids = encode(msgspec.msgpack.decode(body, type=list[str]))
                _write(connection, msgspec.msgpack.encode([each.tobytes() for each in ids]))
        except OSError:
            return  # it did not wait for the answer
        except Exception:
            logger.exception("pieces of a text could not be encoded for another HTTP worker, which will do it itself")


def _write(connection: socket.socket, body: bytes) -> None:
    connection.sendall(len(body).to_bytes(_LENGTH_BYTES, "little") + body)


def _read(connection: socket.socket) -> bytes | None:
    """A frame's body; None at the connection's end."""
    head = _exactly(connection, _LENGTH_BYTES)
    return None if head is None else _exactly(connection, int.from_bytes(head, "little"))


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts, left = [], size
    while left:
        part = connection.recv(min(left, 1 << 20))
        if not part:
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
