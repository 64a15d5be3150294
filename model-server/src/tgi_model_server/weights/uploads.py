"""Uploads: how bytes that were read from a file get into a device's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Uploads(Protocol):
    """All calls come from the thread that loads."""

    def staging(self, size: int) -> torch.Tensor:
        """uint8 [size] on the host, from where `copy` is fast."""
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
        """Start to copy `source`, in staging memory, to `target` of its shape on the device, in the target's dtype.

        What is returned waits until `source` may be overwritten.
        """
        ...

    def settle(self) -> None:
        """Whatever the calling thread asks of the device from now on happens after the copies so far."""
        ...


class PlainUploads:
    """torch's own copy, finished when it returns."""

    def staging(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
        target.copy_(source)
        return _nothing

    def settle(self) -> None:
        """Copies were finished when they returned."""


class PinnedUploads:
    """Copies that the device makes by itself, from pinned memory, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def staging(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
        # The target's memory may have served something else, whose work is not done.
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            if source.dtype is not target.dtype:
                # torch would convert on the host, and wait.
                source = source.to(self._device, non_blocking=True)
            target.copy_(source, non_blocking=True)
            event = self._stream.record_event()
        return event.synchronize

    def settle(self) -> None:
        torch.accelerator.current_stream(self._device).wait_stream(self._stream)


def uploads_to(device: torch.device) -> Uploads:
    """The fastest way to `device`."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return PinnedUploads(device) if accelerator is not None and device.type == accelerator.type else PlainUploads()


def _nothing() -> None:
    pass
