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

from cachedit_fx.runtime.host_read import HostRead

MAX_ORPHANS = 8  # Deleted tensors whose content may come back. The cached values of each remain in memory.
ORPHAN_CALLS = 64  # The number of calls after which an orphan whose content did not come back is dropped.

_serial = itertools.count()


class _Entry:
    """A conditioning: a weak reference to its tensor, and its content."""

    __slots__ = ("calls", "content", "last_call", "ref", "token", "version")

    def __init__(self, tensor: torch.Tensor, token: int, content: Content) -> None:
        self.token = token
        self.content = content
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
        """The token of a tensor. Reads from the device only if the tensor is new and one like it is known."""
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
        content = Content(tensor)
        is_like_orphan = any(orphan.content.kind == content.kind for orphan in self._orphans.values())
        known = self._orphans.pop(content.fingerprint, None) if is_like_orphan else None
        known = known or self._take_from_model(content)
        entry = _Entry(tensor, known.token if known else next(_serial), content)
        key = id(tensor)
        entry.ref = weakref.ref(tensor, lambda _: self._deleted(key, entry))
        self._live[key] = entry
        for stale in [o for o in self._orphans.values() if self._calls - o.last_call > ORPHAN_CALLS]:
            self._on_end(self._orphans.pop(stale.content.fingerprint).token)
        return entry

    def _take_from_model(self, content: Content) -> _Entry | None:
        """Removes from the table, and returns, an entry of this content whose tensor only the model still holds."""
        tensor: torch.Tensor | None = torch.empty(0)
        ours = sys.getrefcount(tensor)  # The references by this variable and by the argument.
        for key, entry in self._live.items():
            is_alike = entry.content.kind == content.kind and entry.content.fingerprint == content.fingerprint
            tensor = entry.ref() if entry.ref is not None and is_alike else None
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
            self._orphans[entry.content.fingerprint] = entry
            while len(self._orphans) > MAX_ORPHANS:
                self._on_end(self._orphans.popitem(last=False)[1].token)

    def clear(self) -> None:
        with self._lock:
            self._live.clear()
            self._orphans.clear()


class Content:
    """The content of a tensor when the object was made.

    Attributes:
        kind: Shape, dtype and device, which are known without a read.
    """

    __slots__ = ("_read", "kind")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.kind = (tuple(tensor.shape), tensor.dtype, tensor.device)
        sums = _sums(tensor)
        self._read = HostRead(sums) if sums is not None else None

    @property
    def fingerprint(self) -> Hashable:
        """Equal for equal content and kind; without sums, it equals no other. May wait for the device."""
        return self if self._read is None else (*self.kind, *self._read.numbers)


def _sums(tensor: torch.Tensor) -> torch.Tensor | None:
    """Two position-weighted sums of a tensor, int64 [2]; None if they cannot be computed (a subclass, sparse)."""
    try:
        with torch.no_grad():
            flat = tensor.detach().contiguous().reshape(-1)
            whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
            bits = flat.view(whole).to(torch.int64)
            place = torch.arange(1, bits.numel() + 1, device=bits.device)
            return torch.stack(
                [(bits * (place * 0x9E3779B1 + 1)).sum(), ((bits ^ (bits >> 7)) * (place * place)).sum()]
            )
    except (RuntimeError, NotImplementedError, KeyError):
        return None


def _version(tensor: torch.Tensor) -> int:
    """The number of writes in place; 0 for inference tensors, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version
