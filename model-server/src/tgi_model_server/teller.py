"""The teller: a thread that hands a step's events on while the next step computes, whose core it does not use.

Events wait in the step loop's thread until the Runner is about to compute: woken earlier, the teller would want the
interpreter at once, and the next step would wait for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from tgi_gateway.types import StepEvents

log = logging.getLogger(__name__)


class Teller:
    """All but `_main` is called from the step loop's thread. Events are told in the order in which they came."""

    def __init__(self, emit: Callable[[StepEvents], None], broken: Callable[[str], None]) -> None:
        """`broken` is told, from the teller's thread, that `emit` raised: nothing is told any more."""
        self._emit = emit
        self._broken = broken
        self._held: list[StepEvents] = []
        self._queue: SimpleQueue[list[StepEvents] | None] = SimpleQueue()
        self._free = threading.Lock()
        """Held while events are being told."""
        self._thread = threading.Thread(target=self._main, name="teller", daemon=True)
        self._thread.start()

    def hold(self, events: StepEvents) -> None:
        """Keep them until `tell`."""
        self._held.append(events)

    def tell(self) -> None:
        """Now is the time: this thread goes on without the interpreter, or sleeps.

        Waits until those before them are told: an engine does not run ahead of a busy gateway.
        """
        if self._held:
            self._free.acquire()
            self._queue.put(self._held)
            self._held = []

    def close(self) -> None:
        """Tell what is left, and return when all is told."""
        self.tell()
        self._queue.put(None)
        self._thread.join()

    def _main(self) -> None:
        try:
            while (steps := self._queue.get()) is not None:
                for events in steps:
                    self._emit(events)
                self._free.release()
        except Exception as error:
            log.critical("a step's events could not be handed on: %s", error, exc_info=True)
            self._broken(f"a step's events could not be handed on: {error}")
            self._free.release()
            while self._queue.get() is not None:  # whoever waits for it to be told must not wait for ever
                self._free.release()
