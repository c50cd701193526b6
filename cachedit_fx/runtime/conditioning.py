"""Distinguishes requests and guidance branches by the identity of their conditioning.

Pipelines pass the same `prompt_embeds` tensor at every step, and another one for the negative prompt. A loop that
rebuilds its prompt for every call passes a new tensor after the old one was deleted; a new tensor of equal content then
continues the old one. Two existing tensors of equal content are two requests.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

MAX_ORPHANS = 8  # Deleted tensors whose content may come back. The cached values of each remain in memory.
ORPHAN_CALLS = 64  # The number of calls after which an orphan whose content did not come back is dropped.

_serial = itertools.count()


class _Entry:
    """A conditioning: a weak reference to its tensor, and the fingerprint of its content."""

    __slots__ = ("calls", "fingerprint", "last_call", "ref", "token", "version")

    def __init__(self, tensor: torch.Tensor, token: int, fingerprint: Hashable) -> None:
        self.token = token
        self.fingerprint = fingerprint
        self.version = _version(tensor)
        self.calls = 0
        self.last_call = 0
        self.ref: weakref.ref[torch.Tensor] | None = None


class ConditioningTable:
    """Maps tensors to tokens. Equal tokens are the same conditioning of the same request.

    Args:
        on_end: Called with a token that cannot come back, in the thread that deletes the tensor.
        lock: Held by every method and during `on_end`. The owner of the table uses the same lock, so that no two locks
            can be taken in different orders.
        is_held_by_model_only: Whether the model itself holds that many references to a tensor. A tensor that nothing
            else holds counts as deleted.
    """

    def __init__(
        self,
        on_end: Callable[[int], None],
        lock: threading.RLock,
        is_held_by_model_only: Callable[[torch.Tensor, int], bool] = lambda _tensor, _references: False,
    ) -> None:
        self._is_held_by_model_only = is_held_by_model_only
        self._on_end = on_end
        self._lock = lock
        self._live: dict[int, _Entry] = {}
        self._orphans: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._calls = 0

    def token(self, tensor: torch.Tensor) -> int:
        """The token of a tensor. Reads from the device only if the tensor is new."""
        with self._lock:
            self._calls += 1
            entry = self._live.get(id(tensor))
            if entry is None or entry.ref is None or entry.ref() is not tensor:
                entry = self._add(tensor)
            elif entry.version != _version(tensor):  # Another prompt was written into the tensor.
                self._on_end(entry.token)
                entry = self._add(tensor)
            entry.calls += 1
            entry.last_call = self._calls
            return entry.token

    def uncount(self, token: int) -> None:
        """Undoes the count of the last call with this token."""
        with self._lock:
            for entry in self._live.values():
                if entry.token == token:
                    entry.calls -= 1
                    self._calls -= 1

    def _add(self, tensor: torch.Tensor) -> _Entry:
        content = fingerprint(tensor)
        known = self._orphans.pop(content, None) or self._take_from_model(content)
        entry = _Entry(tensor, known.token if known else next(_serial), content)
        key = id(tensor)
        entry.ref = weakref.ref(tensor, lambda _: self._deleted(key, entry))
        self._live[key] = entry
        for stale in [o for o in self._orphans.values() if self._calls - o.last_call > ORPHAN_CALLS]:
            self._on_end(self._orphans.pop(stale.fingerprint).token)
        return entry

    def _take_from_model(self, content: Hashable) -> _Entry | None:
        """Removes from the table, and returns, an entry of this content whose tensor only the model still holds."""
        tensor: torch.Tensor | None = torch.empty(0)
        ours = sys.getrefcount(tensor)  # The references by this variable and by the argument.
        for key, entry in self._live.items():
            tensor = entry.ref() if entry.ref is not None and entry.fingerprint == content else None
            references = sys.getrefcount(tensor) - ours
            if tensor is not None and self._is_held_by_model_only(tensor, references):
                del self._live[key]
                return entry
        return None

    def _deleted(self, key: int, entry: _Entry) -> None:
        with self._lock:
            if self._live.get(key) is not entry:
                return
            del self._live[key]
            if entry.calls > 1:  # The loop used one tensor for several calls, so its generation has ended.
                self._on_end(entry.token)
                return
            self._orphans[entry.fingerprint] = entry
            while len(self._orphans) > MAX_ORPHANS:
                self._on_end(self._orphans.popitem(last=False)[1].token)

    def clear(self) -> None:
        with self._lock:
            self._live.clear()
            self._orphans.clear()


def fingerprint(tensor: torch.Tensor) -> Hashable:
    """Equal for equal content, shape, dtype and device. Two position-weighted 64-bit sums, which the host reads once.

    The fingerprint of a tensor for which they cannot be computed (a subclass, a sparse tensor) equals no other.
    """
    try:
        with torch.no_grad():
            flat = tensor.detach().contiguous().reshape(-1)
            whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
            bits = flat.view(whole).to(torch.int64)
            place = torch.arange(1, bits.numel() + 1, device=bits.device)
            sums = torch.stack(
                [(bits * (place * 0x9E3779B1 + 1)).sum(), ((bits ^ (bits >> 7)) * (place * place)).sum()]
            )
            return (tuple(tensor.shape), tensor.dtype, tensor.device, *sums.tolist())
    except (RuntimeError, NotImplementedError, KeyError):
        return object()


def _version(tensor: torch.Tensor) -> int:
    """The number of writes in place; 0 for inference tensors, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version
