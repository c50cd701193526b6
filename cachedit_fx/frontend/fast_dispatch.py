"""Fast dispatch: serves calls of a module without Dynamo. A reused step checks and fetches only what it runs.

Before Dynamo runs a compiled graph, it checks its guards over the whole model and fetches all weights. It does so at
every call, since it does not know whether the step reuses. Once Dynamo has served a call, this module serves the
following calls of the same kind:

    1. The guards are checked, except those on the blocks of the region.
    2. The head runs, and the step decides.
    3. If it reuses, the reuse branch and the tail run.
    4. If it computes, all of Dynamo's guards are checked. Then the compute branch and the tail run.

If the guards fail in 1 or 4, the call goes to Dynamo, and nothing has changed: the head of a graph that is served here
has no effects. After a failure in 4, all guards of that graph are checked before its head runs. The same applies to a
graph whose regions communicate with other ranks.

A reused step needs no guards on the blocks of the region, because it runs none of them.
"""

from __future__ import annotations

import itertools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from cachedit_fx.errors import cut
from cachedit_fx.forking import released_in_child
from cachedit_fx.frontend.argument_records import ArgumentRecord
from cachedit_fx.frontend.input_fetcher import Binder, Fetch, Path, path_of
from cachedit_fx.frontend.torch_internals import (
    Guards,
    begin_cudagraph_generation,
    find_guards,
    is_tested_version,
    runs_compiled_forward,
    tested_versions,
)
from cachedit_fx.passes.transforms.flatten import FlatGraph, flatten

if TYPE_CHECKING:
    from cachedit_fx.runtime.cached_call import CachedCall

log = logging.getLogger(__name__)

NOT_SERVED = object()  # Returned instead of an output: Dynamo has to serve the call.
_GUARDS_FAILED = object()  # The same, after the head has run.


class NotServed(Exception):
    """Why Dynamo has to serve the calls of a module. The text completes a sentence that ends with `because`."""


class FastDispatcher:
    """The fast calls of one module.

    Attributes:
        is_on: Whether any call is served (`CacheConfig.fast_dispatch`).
    """

    def __init__(self, module: nn.Module, *, is_on: bool = True) -> None:
        self.is_on = is_on
        self._name = type(module).__name__
        self._module = weakref.ref(module)
        self._lock = released_in_child(threading.Lock())  # Held to change what follows. Calls only read `_fast_calls`.
        self._fast_calls: tuple[FastCall, ...] = ()
        self._tried: weakref.WeakSet[CachedCall] = weakref.WeakSet()
        self._failed: weakref.WeakSet[CachedCall] = weakref.WeakSet()  # Guards of these failed after the head ran.
        self._reason = "no call has been made yet"

    @property
    def reason(self) -> str:
        """Why Dynamo has to serve calls like the last one that it served; empty if it does not have to."""
        return self._reason if self.is_on else "fast_dispatch is False"

    @property
    def fast_calls(self) -> tuple[FastCall, ...]:
        """The fast calls that are made, one per graph."""
        return self._fast_calls

    @property
    def why_not_all(self) -> str:
        """Why some of the graphs that the module has used have no fast call; empty if all have one."""
        if not self.is_on or (not self._fast_calls and not self._tried):
            return self.reason
        return "" if len(self._fast_calls) >= len(self._tried) else self._reason or "Dynamo serves one of its graphs"

    def add(self, fast_call: FastCall) -> None:
        """Serves calls by a fast call that was made for another process."""
        with self._lock:
            self._fast_calls = (*self._fast_calls, fast_call)
            self._tried.add(fast_call.cached_call)
        self._reason = ""

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the forward of the module returns, or `NOT_SERVED` if nothing has been done."""
        module = self._module() if self._fast_calls and self.is_on else None
        if module is None or not runs_compiled_forward(module):
            return NOT_SERVED
        for fast_call in self._fast_calls:
            if not fast_call.is_live():
                self._drop(fast_call, "Dynamo has dropped the graph")
                continue
            result = fast_call(module, args, kwargs)
            if result is _GUARDS_FAILED:
                self._failed.add(fast_call.cached_call)
                self._drop(fast_call, "a guard on a block of the region failed, for example because it was changed")
            elif result is not NOT_SERVED:
                return result
        return NOT_SERVED

    def learn(
        self,
        module: nn.Module,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        ran: Sequence[tuple[CachedCall, Sequence[Any], Sequence[Any]]],
        result: Any,
    ) -> None:
        """Serves calls like this one from now on, if possible; otherwise records the reason.

        Args:
            given: The arguments of the call, which Dynamo served.
            ran: The cached graphs that Dynamo ran for it, with their arguments and outputs.
            result: What the module returned.
        """
        cached_call, args, outputs = ran[0]
        if not self.is_on or cached_call in self._tried:
            return
        with self._lock:
            self._tried.add(cached_call)
        # Ranks that communicate run the same collectives, so a head whose collectives have run must not run again.
        has_groups = any(region.groups for region in cached_call.regions)
        check_all_first = has_groups or cached_call in self._failed
        try:
            if len(ran) > 1:
                raise NotServed(f"Dynamo breaks the forward up into {len(ran)} cached graphs")
            fast_call = fast_call_for(
                cached_call, module, given, args, outputs, result, check_all_first=check_all_first
            )
            fast_call.is_live(), runs_compiled_forward(module)  # A version of torch that lacks a name fails here.
        except NotServed as why:
            self._set_reason(str(why))
        except Exception as error:  # Another version of torch may store its guards in another way.
            self._set_reason(f"the guards of this version of torch cannot be read ({type(error).__name__})")
            _warn_unsupported(error)
        else:
            _log_untested()
            self._reason = ""
            with self._lock:
                self._fast_calls = (*self._fast_calls, fast_call)

    def _drop(self, fast_call: FastCall, reason: str) -> None:
        """Stops using a fast call. When Dynamo runs its graph again, another one is made."""
        with self._lock:
            self._fast_calls = tuple(other for other in self._fast_calls if other is not fast_call)
            self._tried.discard(fast_call.cached_call)
        self._reason = reason

    def refuse(self, reason: str) -> None:
        """Records why Dynamo makes a call that is not passed to `learn`."""
        self._set_reason(reason)

    def _set_reason(self, reason: str) -> None:
        if reason != self._reason:
            log.info("cachedit_fx: Dynamo makes every call of %s, because %s", self._name, reason)
        self._reason = reason


class FastCall:
    """Calls one cached graph of one module. Made by `fast_call_for`.

    Args:
        cached_call: The cached graph.
        flat: Its three flat functions.
        guards: Dynamo's guards on this graph.
        function: The forward of the module.
        paths: Where the inputs of the graph are found.
        outputs: Makes the forward's return value from the outputs of the graph.
        check_all_first: Check all guards before the head runs.
        given: The arguments of the call from which it was made; None if they cannot be recorded.

    Attributes:
        is_live: Whether Dynamo still holds the graph.
    """

    def __init__(
        self,
        cached_call: CachedCall,
        flat: FlatGraph,
        guards: Guards,
        function: types.FunctionType,
        paths: Sequence[Path],
        outputs: OutputMap,
        *,
        check_all_first: bool = False,
        given: ArgumentRecord | None = None,
    ) -> None:
        self.cached_call, self.outputs, self.given = cached_call, outputs, given
        self._rebuild = outputs.rebuilder()
        self.is_live = guards.is_live
        self._check_all_first, self._check_all = check_all_first, guards.check
        self._check_first = guards.check if check_all_first else guards.check_of(_outside(cached_call.region_paths))
        self.function, self._bind = function, Binder(function)
        front, reuse, compute = flat.front, flat.reuse, flat.compute
        self._front, self._reuse, self._compute = front.call, reuse.call, compute.call
        # Inputs that are fetched before the head runs, and those that only a computed step needs.
        self._early = sorted({*front.positions, *reuse.positions, *cached_call.begin_arguments})
        self._late = sorted({*compute.positions} - {*self._early})
        self._positions = front.positions, reuse.positions, compute.positions
        self._fetch_early = Fetch([paths[i] for i in self._early], function.__globals__)
        self._fetch_late = Fetch([paths[i] for i in self._late], function.__globals__)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the forward returns. Or, if nothing has changed, `NOT_SERVED` or `_GUARDS_FAILED`."""
        if getattr(module.forward, "__func__", None) is not self.function:
            return NOT_SERVED
        frame = self._bind((module, *args), kwargs)
        if frame is None or not self._check_first(frame):  # The forward itself raises an error for wrong arguments.
            return NOT_SERVED
        inputs = dict(zip(self._early, self._fetch_early(frame), strict=True))
        begin_cudagraph_generation()
        run = self.cached_call.begin(inputs)
        if run.step.has_decider and not self._check_all(frame):
            run.discard()
            return NOT_SERVED
        front, reuse, compute = self._positions
        computes, *values = self._front(run.step, *map(inputs.__getitem__, front))
        if not computes:
            outputs = self._reuse(run.step, *values, *map(inputs.__getitem__, reuse))
        elif self._check_all_first or self._check_all(frame):
            inputs.update(zip(self._late, self._fetch_late(frame), strict=True))
            outputs = self._compute(run.step, *values, *map(inputs.__getitem__, compute))
        else:
            run.discard()
            return _GUARDS_FAILED
        run.commit()
        return self._rebuild(outputs)


def fast_call_for(
    cached_call: CachedCall,
    module: nn.Module,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    args: Sequence[Any],
    outputs: Sequence[Any],
    result: Any,
    *,
    check_all_first: bool = False,
) -> FastCall:
    """A fast call that does what Dynamo does for calls like the given one.

    Args:
        given: The arguments of the module, from which Dynamo made `args` for the graph.
        outputs: The outputs of the graph, from which Dynamo made `result`.
        check_all_first: Check all guards before the head runs.

    Raises:
        NotServed: Dynamo does something that a fast call would leave out.
    """
    function = getattr(module.forward, "__func__", None)
    if not isinstance(function, types.FunctionType):
        raise NotServed("its forward is not a plain method")
    if cached_call.config.shadow:
        raise NotServed("shadow mode runs a step twice")
    if cached_call.sources.error:
        raise RuntimeError(cached_call.sources.error)
    if cached_call.sources.reason:
        raise NotServed(cached_call.sources.reason)
    try:
        paths = [path_of(source) for source in cached_call.sources.expressions]
        frame = Binder(function)((module, *given[0]), given[1]) or {}  # The arguments fit: Dynamo called it with them.
    except ValueError as error:
        raise NotServed(str(error)) from error
    guards = find_guards(function, cached_call, frame)
    if guards is None:
        raise NotServed("the forward is more than one graph, or Dynamo's guards do not hold after the call")
    flat = flatten(cached_call.graph)
    if flat is None:
        raise NotServed("a step decides more than once")
    output_map = OutputMap.of(outputs, result)
    early = {*flat.front.positions, *flat.reuse.positions, *cached_call.begin_arguments}
    if any(_is_below(paths[i], cached_call.region_paths) for i in early):
        raise NotServed("the blocks of the region share a weight with the rest of the model")
    found = Fetch(paths, function.__globals__)(frame)
    if not all(_is_same(one, other) for one, other in zip(found, args, strict=True)):
        raise NotServed("an input of the graph is not what its expression finds after the call")
    recorded = ArgumentRecord.of(*given)
    return FastCall(
        cached_call, flat, guards, function, paths, output_map, check_all_first=check_all_first, given=recorded
    )


def _outside(paths: Sequence[str]) -> Callable[[str], bool]:
    """Whether an expression leads to something outside of the modules at `paths`."""

    def is_outside(source: str) -> bool:
        try:
            return not _is_below(path_of(source), paths)
        except ValueError:  # Another kind of expression. To check a guard without need is never wrong.
            return True

    return is_outside


def _is_below(path: Path, modules: Sequence[str]) -> bool:
    """Whether a path leads into one of the `modules` (`blocks.3`) of the module whose forward it is."""
    if path[:2] != (("frame", "L"), ("item", "self")):
        return False
    names = [after[1] for before, after in itertools.pairwise(path) if before[1] == "_modules" and after[0] == "item"]
    found = ".".join(map(str, names)) + "."
    return any(found.startswith(f"{module}.") for module in modules)


@dataclass(frozen=True, slots=True)
class OutputMap:
    """How the forward's return value consists of the outputs of the graph.

    Attributes:
        positions: For every leaf of the return value, the position of the output; None for None.
        spec: The structure of the return value.
        is_tuple: Whether it is a plain tuple of outputs.
    """

    positions: tuple[int | None, ...]
    spec: pytree.TreeSpec
    is_tuple: bool

    @classmethod
    def of(cls, outputs: Sequence[Any], result: Any) -> OutputMap:
        """How `result` consists of `outputs`.

        Raises:
            NotServed: The return value contains something other than the outputs and None.
        """
        leaves, spec = pytree.tree_flatten(result)
        positions: list[int | None] = []
        for leaf in leaves:
            found = next((i for i, output in enumerate(outputs) if output is leaf), None)
            if found is None and leaf is not None:
                raise NotServed(f"the forward returns a {type(leaf).__name__} that the graph does not return")
            positions.append(found)
        is_tuple = type(result) is tuple and len(leaves) == len(result) and None not in positions
        return cls(tuple(positions), spec, is_tuple)

    def rebuilder(self) -> Callable[[Sequence[Any]], Any]:
        """A function that makes the forward's return value from the outputs of the graph."""
        positions, spec = self.positions, self.spec
        if self.is_tuple:
            order = [i for i in positions if i is not None]
            return lambda given: tuple(given[i] for i in order)
        return lambda given: pytree.tree_unflatten([None if i is None else given[i] for i in positions], spec)


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, int | float | bool) and one == other)


_logged: set[str] = set()  # What was logged about this version of torch; each message once per process.


def _warn_unsupported(error: Exception) -> None:
    if "unsupported" not in _logged:
        _logged.add("unsupported")
        log.warning(
            "cachedit_fx: fast_dispatch does not work with torch %s (%s: %s).\n"
            "What it costs: Dynamo checks its guards over the whole model at every step, also at reused steps. The "
            "outputs are the same.\n"
            "What to do: use torch %s, or set fast_dispatch=False.",
            torch.__version__,
            type(error).__name__,
            cut(error, 160),
            tested_versions(),
            exc_info=log.isEnabledFor(logging.DEBUG),
        )


def _log_untested() -> None:
    if not is_tested_version() and "untested" not in _logged:
        _logged.add("untested")
        log.info("cachedit_fx: fast_dispatch was tested on torch %s, not on %s", tested_versions(), torch.__version__)
