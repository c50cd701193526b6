"""Locks that are free in a forked process."""

from __future__ import annotations

import os
import weakref
from typing import Any, TypeVar

_Lock = TypeVar("_Lock")
_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def released_in_child(lock: _Lock) -> _Lock:
    """Returns `lock`, which is released in every process that is forked from this one.

    Another thread may hold it at the fork. That thread does not exist in the forked process, so it would never release
    the lock there.
    """
    _locks.add(lock)
    return lock


def _release_all() -> None:
    for lock in _locks:
        lock._at_fork_reinit()  # As the `logging` module does.


if hasattr(os, "register_at_fork"):  # Not on Windows, which has no fork.
    os.register_at_fork(after_in_child=_release_all)
