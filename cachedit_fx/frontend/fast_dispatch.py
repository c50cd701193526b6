"""Calls a guarded graph without asking Dynamo: a reused step checks and fetches only what it runs.

Dynamo checks its guards over the whole model, and fetches every weight of it, before it knows whether the step reuses.
After a call by way of Dynamo this knows the graph that it took. From then on

    the guards on all but the region's blocks hold      ->  front: the head, and the decision
    reuse                                               ->  the tail
    compute, and all of Dynamo's guards hold            ->  the region's blocks, the tail
    one does not hold                                   ->  nothing has happened; Dynamo is asked, as ever

What a reused step does not run it need not guard: the residual that it adds is of an earlier step anyway. Where the
front has run for nothing, a graph without effects has changed nothing; one with effects is not served so at all. It
happens once to a graph: from then on all of its guards are checked before the front. Knows Dynamo.
"""

from __future__ import annotations

import itertools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from cachedit_fx.errors import cut
from cachedit_fx.frontend.input_fetcher import Binder, Fetch, Locals, Path, path_of
from cachedit_fx.passes.transforms.flatten import FlatGraph, flatten

if TYPE_CHECKING:
    from cachedit_fx.runtime.cached_call import CachedCall

log = logging.getLogger(__name__)

# Dynamo's guards and sources are private to it. On another version what it passes is compared as well, before a graph
# is served; but the tests have not run there.
TESTED_VERSIONS = ("2.13.",)

NOT_SERVED = object()  # What a fast call returns where Dynamo has to be asked.
_STALE = object()  # The same, and the front has run before that was known.


class NotServed(Exception):
    """Why Dynamo has to make the calls of a module; the text follows `because`."""


class FastDispatcher:
    """All that are known of a module.

    Attributes:
        is_on: Whether any call is served (`CacheConfig.fast_dispatch`).
    """

    def __init__(self, module: nn.Module, *, is_on: bool = True) -> None:
        self.is_on = is_on
        self._name = type(module).__name__
        self._module = weakref.ref(module)
        self._lock = threading.Lock()  # Held to change what follows; calls only read `_known`.
        self._known: tuple[FastCall, ...] = ()
        self._tried: weakref.WeakSet[CachedCall] = weakref.WeakSet()
        self._changed: weakref.WeakSet[CachedCall] = weakref.WeakSet()  # All of their guards are checked at first.
        self._reason = "no call has been made yet"

    @property
    def reason(self) -> str:
        """Why Dynamo has to serve calls like the latest that it served; empty if the next one goes without it."""
        return self._reason if self.is_on else "fast_dispatch is False"

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module's forward returns, or `NOT_SERVED`; then nothing has changed."""
        module = self._module() if self._known and self.is_on else None
        if module is None or not _is_plain(module):
            return NOT_SERVED
        for fast_call in self._known:
            if not fast_call.is_live:
                self._drop(fast_call, "Dynamo has dropped the graph")
                continue
            result = fast_call(module, args, kwargs)
            if result is _STALE:
                self._changed.add(fast_call.cached_call)
                self._drop(fast_call, "a guard of Dynamo's on the region's blocks failed, as where a block was changed")
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
        """Takes in a call that Dynamo served.

        Args:
            given: What the module was called with.
            ran: The guarded graphs that Dynamo ran for it, with their arguments and outputs.
            result: What the module returned.
        """
        cached_call, args, outputs = ran[0]
        if not self.is_on or cached_call in self._tried:
            return
        with self._lock:
            self._tried.add(cached_call)
        try:
            if len(ran) > 1:
                raise NotServed(f"Dynamo breaks the forward up into {len(ran)} graphs with a cache")
            found = fast_call_for(
                cached_call, module, given, args, outputs, result, at_once=cached_call in self._changed
            )
            found.is_live, _is_plain(module)  # What a call will ask of Dynamo.
        except NotServed as why:
            self._tell(str(why))
        except Exception as error:  # Another version of torch may keep its guards in another way.
            self._tell(f"this version of torch could not be asked for its guards ({type(error).__name__})")
            _warn_unsupported(error)
        else:
            _say_untested()
            self._reason = ""
            with self._lock:
                self._known = (*self._known, found)

    def _drop(self, fast_call: FastCall, reason: str) -> None:
        """Forgets what does not hold any more. It is learned again where Dynamo runs its graph again."""
        with self._lock:
            self._known = tuple(known for known in self._known if known is not fast_call)
            self._tried.discard(fast_call.cached_call)
        self._reason = reason

    def _tell(self, reason: str) -> None:
        if reason != self._reason:
            log.info("cachedit_fx: Dynamo makes every call of %s, because %s", self._name, reason)
        self._reason = reason


class FastCall:
    """One guarded graph of one module. Made by `fast_call_for`.

    Args:
        cached_call: Whose pieces run.
        flat: These.
        guards: Dynamo's for this graph.
        function: The module's forward.
        paths: Where the graph's inputs are found.
        rebuild: Makes of the graph's outputs what the forward returns.
        at_once: Check all guards before the front runs.
    """

    def __init__(
        self,
        cached_call: CachedCall,
        flat: FlatGraph,
        guards: Any,
        function: types.FunctionType,
        paths: Sequence[Path],
        rebuild: Callable[[Sequence[Any]], Any],
        *,
        at_once: bool = False,
    ) -> None:
        self.cached_call, self._guards, self._rebuild = cached_call, guards, rebuild
        self._at_once = at_once
        few = guards if at_once else guards.root.clone_manager(_outside(cached_call.region_paths))
        self._check_few, self._check_all = few.check, guards.check
        self._function, self._bind = function, Binder(function)
        front, reuse, compute = flat.front, flat.reuse, flat.compute
        self._front, self._reuse, self._compute = front.call, reuse.call, compute.call
        self._early = sorted({*front.positions, *reuse.positions, *cached_call.asked})
        self._late = sorted({*compute.positions} - {*self._early})
        self._positions = front.positions, reuse.positions, compute.positions
        self._fetch_early = Fetch([paths[i] for i in self._early], function.__globals__)
        self._fetch_late = Fetch([paths[i] for i in self._late], function.__globals__)

    @property
    def is_live(self) -> bool:
        """Whether Dynamo still holds the graph: it drops one whose guarded objects have gone, and all at a reset."""
        return self._guards.extra_state is not None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module's forward returns, or `NOT_SERVED`, or `_STALE`; then nothing has changed."""
        if getattr(module.forward, "__func__", None) is not self._function:
            return NOT_SERVED
        frame = self._bind((module, *args), kwargs)
        if frame is None or not self._check_few(frame):  # What the forward does not take it is to say itself.
            return NOT_SERVED
        held = dict(zip(self._early, self._fetch_early(frame), strict=True))
        run = self.cached_call.begin(held)
        if run.step.asks_decider and not self._check_all(frame):
            run.give_up()
            return NOT_SERVED
        front, reuse, compute = self._positions
        computes, *needed = self._front(run.step, *map(held.__getitem__, front))
        if not computes:
            outputs = self._reuse(run.step, *needed, *map(held.__getitem__, reuse))
        elif self._at_once or self._check_all(frame):
            held.update(zip(self._late, self._fetch_late(frame), strict=True))
            outputs = self._compute(run.step, *needed, *map(held.__getitem__, compute))
        else:
            run.give_up()
            return _STALE
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
    at_once: bool = False,
) -> FastCall:
    """What takes Dynamo's place for calls like the one that was just made.

    Args:
        given: What the module was called with; Dynamo made `args` of it for the graph.
        outputs: What the graph returned; Dynamo made `result` of it.
        at_once: Check all guards before the front runs.

    Raises:
        NotServed: It would not be the same.
    """
    function = getattr(module.forward, "__func__", None)
    if not isinstance(function, types.FunctionType):
        raise NotServed("its forward is no plain method")
    if cached_call.config.shadow:
        raise NotServed("shadow mode runs a step twice")
    if cached_call.sources.error:
        raise RuntimeError(cached_call.sources.error)
    if cached_call.sources.reason:
        raise NotServed(cached_call.sources.reason)
    try:
        paths = [path_of(source) for source in cached_call.sources.expressions]
        frame = Binder(function)((module, *given[0]), given[1]) or {}  # It took them when Dynamo ran it.
    except ValueError as error:
        raise NotServed(str(error)) from error
    guards = _guards_of(cached_call, function, frame)
    flat = flatten(cached_call.graph)
    if flat is None:
        raise NotServed("it decides more than once in a step")
    rebuild = _rebuilder(outputs, result)
    early = {*flat.front.positions, *flat.reuse.positions, *cached_call.asked}
    if any(_is_below(paths[i], cached_call.region_paths) for i in early):
        raise NotServed("the region's blocks share a weight with what runs without them")
    found = Fetch(paths, function.__globals__)(frame)
    if not all(_is_same(one, other) for one, other in zip(found, args, strict=True)):
        raise NotServed("what stands where Dynamo looks is not what it passed, as where the forward changes it")
    return FastCall(cached_call, flat, guards, function, paths, rebuild, at_once=at_once)


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its forward, and compiled code is to run."""
    stance = torch._dynamo.eval_frame._stance
    return stance.stance == "default" and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        or torch._C._get_tracing_state()
    )


def _guards_of(cached_call: CachedCall, function: types.FunctionType, frame: Locals) -> Any:
    """The guards that Dynamo holds before it runs `cached_call` for `frame`.

    One function may have graphs of several backends, as of an earlier configuration, whose guards hold as well.
    """
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list, innermost_fn

    for entry in _debug_get_cache_entry_list(function.__code__):
        names = [name for name in entry.code.co_names if name.startswith(("__compiled_fn", "__resume_at"))]
        compiled = [innermost_fn(function.__globals__[name]) for name in names if name in function.__globals__]
        if compiled == [cached_call] and entry.guard_manager.check(frame):
            return entry.guard_manager
    raise NotServed("the forward is more than one graph, or Dynamo's guards do not hold after the call")


def _outside(paths: Sequence[str]) -> Callable[[Any], bool]:
    """Whether a guard manager is on something outside of the modules at `paths`."""

    def is_outside(manager: Any) -> bool:
        try:
            return not _is_below(path_of(manager.get_source()), paths)
        except ValueError:  # Not a plain way to an object; checking it is never wrong.
            return True

    return is_outside


def _is_below(path: Path, modules: Sequence[str]) -> bool:
    """Whether a path leads into one of the `modules` (`blocks.3`) of the frame's own module."""
    if path[:2] != (("frame", "L"), ("item", "self")):
        return False
    names = [after[1] for before, after in itertools.pairwise(path) if before[1] == "_modules" and after[0] == "item"]
    found = ".".join(map(str, names)) + "."
    return any(found.startswith(f"{module}.") for module in modules)


def _rebuilder(outputs: Sequence[Any], result: Any) -> Callable[[Sequence[Any]], Any]:
    """Makes of the graph's outputs what the forward returns, if that is those and None alone."""
    leaves, spec = pytree.tree_flatten(result)
    positions: list[int | None] = []
    for leaf in leaves:
        found = next((i for i, output in enumerate(outputs) if output is leaf), None)
        if found is None and leaf is not None:
            raise NotServed(f"the forward returns a {type(leaf).__name__} that the graph does not")
        positions.append(found)
    if type(result) is tuple and len(leaves) == len(result) and None not in positions:
        order = [i for i in positions if i is not None]
        return lambda given: tuple(given[i] for i in order)
    return lambda given: pytree.tree_unflatten([None if i is None else given[i] for i in positions], spec)


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, int | float | bool) and one == other)


_told: set[str] = set()  # What was said of this version of torch, once per process.


def _warn_unsupported(error: Exception) -> None:
    if "unsupported" not in _told:
        _told.add("unsupported")
        log.warning(
            "cachedit_fx: fast_dispatch does not work with torch %s (%s: %s).\n"
            "What it costs: every step checks Dynamo's guards over the whole model, and so does one that reuses. What "
            "the model returns is the same.\n"
            "What to do: use torch %s, or set fast_dispatch=False.",
            torch.__version__,
            type(error).__name__,
            cut(error, 160),
            _tested(),
            exc_info=log.isEnabledFor(logging.DEBUG),
        )


def _say_untested() -> None:
    if not str(torch.__version__).startswith(TESTED_VERSIONS) and "untested" not in _told:
        _told.add("untested")
        log.info("cachedit_fx: fast_dispatch was tested on torch %s, not on %s", _tested(), torch.__version__)


def _tested() -> str:
    return ", ".join(f"{version}x" for version in TESTED_VERSIONS)
