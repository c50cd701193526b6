"""Finds the sessions of a module: by the module if `enable_cache` was called for it, otherwise by its weights."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from cachedit_fx.forking import released_in_child
from cachedit_fx.runtime.call_counts import CallCounts
from cachedit_fx.runtime.instance import Instance
from cachedit_fx.runtime.session import Record


@dataclass(slots=True)
class _Holder:
    """A module instance that is known by its weights only. Several may hold the same first weight.

    Attributes:
        weights: Weak references to one weight per block.
        versions: The number of writes in place to these weights.
    """

    weights: list[weakref.ref[torch.Tensor]]
    versions: int
    instance: Instance

    def holds(self, weights: Sequence[torch.Tensor]) -> bool:
        return len(weights) == len(self.weights) and all(
            ref() is weight for ref, weight in zip(self.weights, weights, strict=True)
        )


KEY = "_cachedit_fx"  # The attribute of a module that holds its `Enabled` object, and that is copied with it.
_instances: Any = WeakIdKeyDictionary()  # Module -> instance, of modules for which the cache is enabled.
_holders: Any = WeakIdKeyDictionary()  # First weight -> holders, of modules compiled with `backend="cachedit"`.
_instances_lock = released_in_child(threading.Lock())


def instance_of(module: torch.nn.Module) -> Instance:
    """The sessions of a module for which the cache is enabled. They are deleted with the module."""
    with _instances_lock:
        found: Instance | None = _instances.get(module)
        if found is None:
            found = _instances[module] = Instance(module)
        return found


def instance_of_weights(weights: Sequence[torch.Tensor]) -> Instance:
    """The sessions of the module that holds `weights`, one weight per block. They are deleted with the first weight.

    Two instances of a class share their compiled graphs, and two models may share some of their blocks.
    """
    for holder in _holders.get(weights[0], ()):
        if holder.holds(weights):
            versions = _versions(weights)
            if versions != holder.versions:  # Weights were loaded in place.
                holder.versions = versions
                holder.instance.weights_version += 1
            return holder.instance  # type: ignore[no-any-return]
    with _instances_lock:
        holder = _Holder(list(map(weakref.ref, weights)), _versions(weights), Instance())
        _holders[weights[0]] = [*_holders.get(weights[0], ()), holder]
    return holder.instance


def _versions(weights: Sequence[torch.Tensor]) -> int:
    return sum(0 if weight.is_inference() else weight._version for weight in weights)


def instances_in(module: torch.nn.Module) -> list[Instance]:
    """The instances of `module` and of the modules in it. Each module with a chain of its own has one."""
    enabled = [_instances[inner] for inner in module.modules() if inner in _instances]
    held = [*itertools.chain(module.parameters(), module.buffers())]
    known = set(map(id, held))
    holders = [holder for tensor in held for holder in _holders.get(tensor, ())]
    return enabled + [h.instance for h in holders if all(id(ref()) in known for ref in h.weights)]


def is_cached(module: torch.nn.Module) -> bool:
    """Whether the cache serves `module`.

    After `enable_cache`, whether the last call went through the cache. With the bare backend, whether a cached graph
    was compiled, and no uncached graph of the whole forward since.
    """
    found = instances_in(module)
    enabled = [instance for instance in found if instance.is_enabled]
    installed = [_instances.get(inner) for inner in module.modules() if installed_in(inner) is not None]
    return any(instance.has_cached_graph for instance in (installed if enabled else found) if instance is not None)


def installed_in(module: torch.nn.Module) -> Any:
    """The `Enabled` object of a module; None if there is none, or if something else has replaced it."""
    held: Any = vars(module).get(KEY)
    return held if held is not None and vars(module).get(getattr(held, "place", "")) is held else None


def calls_of(module: torch.nn.Module) -> dict[str, CallCounts]:
    """How the calls of `module` and of the modules in it were served, where the cache is or was enabled.

    Returns:
        The counts by the path in `module`; the path of `module` itself is empty.
    """
    known = ((path, _instances.get(inner)) for path, inner in module.named_modules())
    found = {path: (instance.is_enabled, instance.calls.counts) for path, instance in known if instance is not None}
    return {path: counts for path, (is_enabled, counts) in found.items() if is_enabled or counts.total}


def reset(module: torch.nn.Module | None = None) -> None:
    """Ends all sessions of `module`, or of all modules, and clears their statistics. Compiled graphs are kept."""
    everyone = [*_instances.values(), *(h.instance for holders in list(_holders.values()) for h in holders)]
    for instance in everyone if module is None else instances_in(module):
        instance.clear()


if hasattr(os, "register_at_fork"):  # Not on Windows, which has no fork.
    os.register_at_fork(after_in_child=reset)  # The sessions belong to requests of the parent process.


def end_generation(module: torch.nn.Module, *, everyone: bool = False) -> None:
    """Ends the sessions that the current request (or thread and async task) has of `module`, or all its sessions.

    Their statistics are kept.
    """
    for instance in instances_in(module):
        instance.end(everyone=everyone)


def records_of(module: torch.nn.Module, *, every_generation: bool) -> list[Record]:
    """The sessions of `module` in the order of their first steps: those of its last generation, or all."""
    found = [record for instance in instances_in(module) for record in instance.records()]
    last = max(found, key=lambda record: record.last, default=None)
    shown = [r for r in found if last is None or every_generation or _are_one_generation(r, last)]
    return sorted(shown, key=lambda record: record.first)


def notes_of(module: torch.nn.Module) -> list[str]:
    """What was dropped to keep the bounds on the sessions of `module`, and why steps did not follow another guidance
    branch, one sentence each."""
    return [note for i in instances_in(module) for note in (*i.bounds.notes, *i.unguided.notes)]


def _are_one_generation(one: Record, last: Record) -> bool:
    """Whether the steps of two sessions overlap in time. The guidance branches of a generation alternate."""
    return one.key.guidance_branch.who == last.key.guidance_branch.who and one.last >= last.first
