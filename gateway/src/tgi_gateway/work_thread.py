"""WorkThread: calls made one after the other, in a thread of their own that keeps no process from ending."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


class WorkThread:
    """As a ThreadPoolExecutor of one, for whose thread Python would wait at exit: for ever, when a call hangs."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._turn, name=name, daemon=True)
        self._ended = False

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Call `work` after what was asked for before. From one thread only."""
        assert not self._ended, "end() comes last"
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        if self._thread.ident is None:
            self._thread.start()
        return future

    def end(self) -> None:
        """The thread ends after the calls that were asked for. Idempotent; nothing may be asked for afterwards."""
        self._ended = True
        self._calls.put(None)

    def _turn(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
