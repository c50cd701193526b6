"""Which conditioning is it? Tells requests and guidance branches apart by the identity of a tensor.

Pipelines pass the same `prompt_embeds` object at every step and another one for the negative prompt. A loop that
builds its prompt anew at every call passes a new object while the old one is dead: equal content then continues it.
Two live objects of equal content are two requests.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

MAX_ORPHANS = 8  # Dead objects whose content may come back; each holds a session's state alive.
ORPHAN_CALLS = 64  # Look-ups after which an orphan that did not come back is given up.

_serial = itertools.count()


class _Entry:
    """A conditioning that was seen: its live object, or the content of its dead one."""

    __slots__ = ("calls", "fingerprint", "last_call", "ref", "token", "version")

    def __init__(self, tensor: torch.Tensor, token: int, fingerprint: Hashable) -> None:
        self.token = token
        self.fingerprint = fingerprint
        self.version = _version(tensor)
        self.calls = 0
        self.last_call = 0
        self.ref: weakref.ref[torch.Tensor] | None = None


class ConditioningTable:
    """Tensor -> token; equal tokens are the same conditioning of the same request.

    Args:
        on_end: Called with a token that can't come back, from whichever thread lets the tensor die.
        lock: Held by every method and during `on_end`; its owner shares it, so that there is no order of locks.
        is_let_go: Whether the model itself holds so many references to a tensor: one that nobody else holds is as good
            as dead.
    """

    def __init__(
        self,
        on_end: Callable[[int], None],
        lock: threading.RLock,
        is_let_go: Callable[[torch.Tensor, int], bool] = lambda _tensor, _references: False,
    ) -> None:
        self._is_let_go = is_let_go
        self._on_end = on_end
        self._lock = lock
        self._live: dict[int, _Entry] = {}
        self._orphans: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._calls = 0

    def token(self, tensor: torch.Tensor) -> int:
        """The token of this object. Reads from the device only when the object was not seen before."""
        with self._lock:
            self._calls += 1
            entry = self._live.get(id(tensor))
            if entry is None or entry.ref is None or entry.ref() is not tensor:
                entry = self._admit(tensor)
            elif entry.version != _version(tensor):  # Written over in place: another prompt in the same buffer.
                self._on_end(entry.token)
                entry = self._admit(tensor)
            entry.calls += 1
            entry.last_call = self._calls
            return entry.token

    def take_back(self, token: int) -> None:
        """Counts the latest call with this token as not made."""
        with self._lock:
            for entry in self._live.values():
                if entry.token == token:
                    entry.calls -= 1
                    self._calls -= 1

    def _admit(self, tensor: torch.Tensor) -> _Entry:
        content = fingerprint(tensor)
        known = self._orphans.pop(content, None) or self._left_to_the_model(content)
        entry = _Entry(tensor, known.token if known else next(_serial), content)
        key = id(tensor)
        entry.ref = weakref.ref(tensor, lambda _: self._died(key, entry))
        self._live[key] = entry
        for stale in [o for o in self._orphans.values() if self._calls - o.last_call > ORPHAN_CALLS]:
            self._on_end(self._orphans.pop(stale.fingerprint).token)
        return entry

    def _left_to_the_model(self, content: Hashable) -> _Entry | None:
        """A live object of this content that the model alone still holds, taken off the table."""
        tensor: torch.Tensor | None = torch.empty(0)
        ours = sys.getrefcount(tensor)  # This variable and the question itself.
        for key, entry in self._live.items():
            tensor = entry.ref() if entry.ref is not None and entry.fingerprint == content else None
            references = sys.getrefcount(tensor) - ours
            if tensor is not None and self._is_let_go(tensor, references):
                del self._live[key]
                return entry
        return None

    def _died(self, key: int, entry: _Entry) -> None:
        with self._lock:
            if self._live.get(key) is not entry:
                return
            del self._live[key]
            if entry.calls > 1:  # A loop that keeps its prompt: it let go, so the generation is over.
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
    """Equal for equal content, shape, dtype and device; two position-weighted 64-bit sums, one host read.

    A tensor that cannot be looked at like this (a subclass, a sparse one) equals nothing else.
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
    """How often the tensor was written in place; inference tensors keep no count."""
    return 0 if tensor.is_inference() else tensor._version
