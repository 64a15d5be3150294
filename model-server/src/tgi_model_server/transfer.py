"""Small copies between host and device that neither waits for: pinned memory where the device has its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def pinned_copy(
    values: Sequence[float] | npt.NDArray[np.generic], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`values` in host memory from which a copy to `device` does not block.

    Pinned memory comes from a cache that hands a piece out again only when the copies from it are done.
    """
    found = (
        torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype, device="cpu")
    )
    if device.type == "cpu":
        return found
    return torch.empty(found.shape, dtype=dtype, device="cpu", pin_memory=True).copy_(found)


def to_device(
    values: Sequence[float] | npt.NDArray[np.generic], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`values` as a new tensor on `device`, in the order of its work."""
    return pinned_copy(values, dtype, device).to(device, non_blocking=True)


class HostCopy:
    """A tensor of the device on its way to the host. The copy starts here, in the order of the device's work."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        # Blocking: whoever waits sleeps. The device has its next step by then, so the time to wake up costs nothing.
        self._event = torch.Event(tensor.device, blocking=True)
        self._event.record()

    def wait(self) -> torch.Tensor:
        """The values, on the host; waits for the work up to the copy and for none that was started later."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host
