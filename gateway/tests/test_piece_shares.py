"""Workers that share the pieces of long texts encode each once, and do without one that does not answer."""

from __future__ import annotations

import socket
import stat
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tgi_gateway.prompt import piece_shares
from tgi_gateway.prompt.piece_shares import PieceShares
from tgi_gateway.prompt.pieces import Pieces

WORKERS = 3


class Counted:
    """A tokenizer of bytes that notes what it encodes."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.fail = False

    def encode_batch_fast(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Any]:
        assert not add_special_tokens
        if self.fail:
            raise RuntimeError("no memory")
        self.encoded += texts
        time.sleep(0.01)
        return [type("Encoding", (), {"ids": list(text.encode())}) for text in texts]


def text_of(seed: int, words: int = 400) -> str:
    return " ".join(f"word {chr(97 + (n * seed) % 26)}{chr(97 + n // 26)} of {seed}" for n in range(words))


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ps") as name:  # a socket's path must be short
        yield Path(name)


Make = Callable[[int], tuple[Pieces, Counted]]


@pytest.fixture
def make(folder: Path) -> Iterator[Make]:
    """Make the worker of that number."""
    made: list[PieceShares] = []

    def worker_of(worker: int) -> tuple[Pieces, Counted]:
        inner, shares = Counted(), PieceShares(folder, worker, WORKERS)
        pieces = Pieces(inner, 20, 10_000, ([1], [2]), shares)
        shares.serve(pieces.ids)
        made.append(shares)
        return pieces, inner

    yield worker_of
    for each in made:
        each.close()


def answer_once(path: Path, answer: Callable[[bytes], bytes]) -> threading.Thread:
    """Be a worker that answers one question, and is gone."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen()

    def serve() -> None:
        connection, _ = listening.accept()
        with connection, listening:
            body = piece_shares._read(connection)
            assert body is not None
            piece_shares._write(connection, answer(body))

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def right(text: str) -> list[int]:
    return [1, *text.encode(), 2]


def test_a_text_that_comes_to_all_workers_at_once_is_encoded_once(make: Make) -> None:
    workers = [make(number) for number in range(WORKERS)]
    texts = [f"{text_of(3)} and question {'abcdefghi'[n]} of its own" for n in range(9)]
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda n: workers[n % WORKERS][0].encode(texts[n], True).tolist(), range(9)))
    assert found == [right(text) for text in texts]
    encoded = [piece for _, inner in workers for piece in inner.encoded]
    common = set.intersection(*({*workers[0][0].cut(text)} for text in texts))
    assert len(common) > 100
    assert all(encoded.count(piece) == 1 for piece in common)
    assert min(len(inner.encoded) for _, inner in workers) > len(common) // 5, "each has its part"


def test_short_texts_are_nobody_elses_business(make: Make) -> None:
    (pieces, inner), (_, other) = (make(number) for number in (0, 1))
    text = text_of(5, 10)
    assert pieces.encode(text, True).tolist() == right(text)
    assert len(inner.encoded) == len(list(pieces.cut(text)))
    assert not other.encoded


def test_only_this_user_may_ask(make: Make, folder: Path) -> None:
    make(0)
    assert stat.S_IMODE((folder / "text0").stat().st_mode) == 0o600


def test_a_worker_without_a_socket_still_encodes(make: Make, folder: Path) -> None:
    (folder / "text0").mkdir()  # where it cannot be
    pieces, _ = make(0)
    _, other = make(1)
    assert pieces.encode(text_of(3), True).tolist() == right(text_of(3))
    assert other.encoded


def test_a_worker_that_is_not_there_is_done_without(make: Make) -> None:
    pieces, inner = make(1)
    for seed in (3, 7):
        assert pieces.encode(text_of(seed), True).tolist() == right(text_of(seed))
    assert len(inner.encoded) == len(set(inner.encoded)) > 200


def test_a_worker_that_hangs_is_waited_for_once(make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piece_shares, "WAIT_S", 0.1)
    monkeypatch.setattr(piece_shares, "WAIT_PER_PIECE_S", 0.0)
    pieces, _ = make(0)
    asked = []

    def hangs(wanted: Sequence[str]) -> list[array[int]]:
        asked.append(wanted)
        threading.Event().wait(1.0)
        return []

    other = PieceShares(folder, 1, WORKERS)
    other.serve(hangs)
    for seed in (3, 5, 7):
        assert pieces.encode(text_of(seed), True).tolist() == right(text_of(seed))
    assert len(asked) == 1
    other.close()


@pytest.mark.parametrize(
    "answer",
    [msgspec.msgpack.encode([b"1234"]), msgspec.msgpack.encode([b"12345"]), msgspec.msgpack.encode(5), b"\xc1", b""],
    ids=["too few", "half a number", "no list", "no message", "nothing"],
)
def test_an_answer_that_makes_no_sense_is_not_believed(make: Make, folder: Path, answer: bytes) -> None:
    pieces, _ = make(0)
    thread = answer_once(folder / "text1", lambda _: answer)
    assert pieces.encode(text_of(3), True).tolist() == right(text_of(3))
    thread.join()


def test_a_worker_that_comes_back_is_asked_again(make: Make, folder: Path) -> None:
    pieces, _ = make(0)

    def answer(body: bytes) -> bytes:
        pieces = msgspec.msgpack.decode(body, type=list[str])
        return msgspec.msgpack.encode([array("i", list(piece.encode())).tobytes() for piece in pieces])

    thread = answer_once(folder / "text1", answer)
    assert pieces.encode(text_of(3), True).tolist() == right(text_of(3))
    thread.join()
    _, after = make(1)
    assert pieces.encode(text_of(7), True).tolist() == right(text_of(7))
    assert after.encoded, "the connection was to the one that had its place before"


def test_a_failure_here_leaves_no_answer_for_the_next_text(make: Make) -> None:
    pieces, inner = make(0)
    _, other = make(1)
    inner.fail = True
    with pytest.raises(RuntimeError, match="no memory"):
        pieces.encode(text_of(3), True)
    inner.fail = False
    for seed in (5, 3):
        assert pieces.encode(text_of(seed), True).tolist() == right(text_of(seed))
    assert other.encoded
