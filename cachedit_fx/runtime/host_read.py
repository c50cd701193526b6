"""Numbers that a graph computes on the device and the host reads: `HostRead`.

On a CUDA device, starting a read queues a copy into pinned memory and an event behind it. Whatever the host queues
afterwards keeps the device busy while the host waits for that event alone. A read that nobody needs is never waited
for. On other devices, a read begins when its numbers are needed.
"""

from __future__ import annotations

import torch


class HostRead:
    """A read of a one-dimensional tensor by the host, which has been started.

    Args:
        tensor: The tensor. It must not be overwritten before the read, except on a CUDA device, where the copy comes
            first in the stream.
    """

    __slots__ = ("_event", "_numbers", "_tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor
        self._event: torch.Event | None = None
        self._numbers: list[float] | None = None
        if is_copied(tensor):
            self._tensor, self._event = copy_to_host(tensor)

    @property
    def numbers(self) -> list[float]:
        """The numbers. The first access waits until the device has computed them."""
        if self._numbers is None:
            event, tensor = self._event, self._tensor  # Another thread may be here as well.
            if event is not None:
                event.synchronize()
            if tensor is not None:
                self._numbers = tensor.tolist()
            self._tensor = self._event = None
        assert self._numbers is not None
        return self._numbers


class Unread:
    """One number of a read, which nobody has needed yet."""

    __slots__ = ("_position", "_read")

    def __init__(self, read: HostRead, position: int) -> None:
        self._read, self._position = read, position

    @property
    def number(self) -> float:
        """The number. The first access may wait, as that of `HostRead.numbers` does."""
        return float(self._read.numbers[self._position])


# A timestep; None if there is none.
Timestep = float | Unread | None


def known(timestep: Timestep) -> float | None:
    """The timestep as a number. May wait for the device."""
    return timestep.number if isinstance(timestep, Unread) else timestep


def is_copied(tensor: torch.Tensor) -> bool:
    """Whether a read of the tensor is a copy that the host can start without waiting for it."""
    return tensor.is_cuda


def copy_to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Event]:
    """Starts a copy. Returns the tensor in pinned memory, and the event after which it holds the numbers."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.Event(tensor.device)
    event.record()
    return copy, event
