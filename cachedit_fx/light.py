"""Calls a guarded graph without asking Dynamo: a reused step checks and fetches only what it runs.

Dynamo checks its guards over the whole model, and fetches every weight of it, before it knows whether the step reuses.
After a call by way of Dynamo this knows the graph that it took. From then on

    the guards on all but the region's blocks hold      ->  front: the head, and the decision
    reuse                                               ->  the tail
    compute, and all of Dynamo's guards hold            ->  the region's blocks, the tail
    one does not hold                                   ->  nothing has happened; Dynamo is asked, as ever

What a reused step does not run it need not guard: the residual that it adds is of an earlier step anyway. Knows Dynamo.
"""

from __future__ import annotations

import logging
import re
import types
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from cachedit_fx.passes.flat import FlatGraph, flatten

if TYPE_CHECKING:
    from cachedit_fx.runtime import GuardedCall

log = logging.getLogger(__name__)

MISSED = object()  # What a light call returns where Dynamo has to be asked.
Locals = dict[str, Any]


class LightCalls:
    """All that are known of a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._known: list[LightCall] = []
        self._tried: weakref.WeakSet[GuardedCall] = weakref.WeakSet()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module's forward returns, or `MISSED`; then nothing has changed."""
        module = self._module() if self._known else None
        if module is None or not _is_plain(module):
            return MISSED
        self._known = [light for light in self._known if light.is_live]
        for light in self._known:
            result = light(module, args, kwargs)
            if result is not MISSED:
                return result
        return MISSED

    def learn(
        self,
        module: nn.Module,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        ran: Sequence[tuple[GuardedCall, Sequence[Any], Sequence[Any]]],
        result: Any,
    ) -> None:
        """Takes in a call that Dynamo served.

        Args:
            given: What the module was called with.
            ran: The guarded graphs that Dynamo ran for it, with their arguments and outputs.
            result: What the module returned.
        """
        guarded, args, outputs = ran[0]
        if len(ran) > 1 or guarded in self._tried:
            return
        self._tried.add(guarded)
        try:
            found = light_call(guarded, module, given, args, outputs, result)
        except Exception:  # Another release of torch may keep its guards in another way; Dynamo goes on serving.
            log.info("Dynamo will be asked at every call", exc_info=True)
            return
        if found is not None:
            self._known.append(found)


class LightCall:
    """One guarded graph of one module. Made by `light_call`.

    Args:
        guarded: Whose pieces run.
        flat: These.
        guards: Dynamo's for this graph.
        function: The module's forward.
        fetch: Finds the graph's inputs.
        rebuild: Makes of the graph's outputs what the forward returns.
    """

    def __init__(
        self,
        guarded: GuardedCall,
        flat: FlatGraph,
        guards: Any,
        function: types.FunctionType,
        fetch: Fetch,
        rebuild: Callable[[Sequence[Any]], Any],
    ) -> None:
        self._guarded, self._guards, self._rebuild = guarded, guards, rebuild
        self._few_guards = guards.root.clone_manager(_outside(guarded.region_paths))
        self._function, self._bind = function, _binder(function)
        front, reuse, compute = flat.front, flat.reuse, flat.compute
        self._front, self._reuse, self._compute = front.call, reuse.call, compute.call
        asked = guarded.asked
        self._early = sorted({*front.positions, *reuse.positions, *asked})
        self._late = sorted({*compute.positions} - {*self._early})
        self._positions = front.positions, reuse.positions, compute.positions
        self._fetch_early, self._fetch_late = fetch(self._early), fetch(self._late)

    @property
    def is_live(self) -> bool:
        """Whether Dynamo still holds the graph: it drops one whose guarded objects have gone, and all at a reset."""
        return self._guards.extra_state is not None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module's forward returns, or `MISSED`; then nothing has changed."""
        if getattr(module.forward, "__func__", None) is not self._function:
            return MISSED
        try:
            frame = self._bind(module, *args, **kwargs)
        except TypeError:  # The forward itself is to say what it does not take.
            return MISSED
        if not self._few_guards.check(frame):
            return MISSED
        held = dict(zip(self._early, self._fetch_early(frame), strict=True))
        run = self._guarded.begin(held)
        front, reuse, compute = self._positions
        computes, *kept = self._front(run.step, *map(held.__getitem__, front))
        if not computes:
            outputs = self._reuse(run.step, *kept, *map(held.__getitem__, reuse))
        elif self._guards.check(frame):
            held.update(zip(self._late, self._fetch_late(frame), strict=True))
            outputs = self._compute(run.step, *kept, *map(held.__getitem__, compute))
        else:
            return MISSED
        run.commit()
        return self._rebuild(outputs)


def light_call(
    guarded: GuardedCall,
    module: nn.Module,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    args: Sequence[Any],
    outputs: Sequence[Any],
    result: Any,
) -> LightCall | None:
    """What takes Dynamo's place for calls like the one that was just made; None where that would not be the same.

    Args:
        given: What the module was called with; Dynamo made `args` of it for the graph.
        outputs: What the graph returned; Dynamo made `result` of it.
    """
    function = getattr(module.forward, "__func__", None)
    if not isinstance(function, types.FunctionType) or guarded.sources is None or guarded.config.shadow:
        return None
    frame = _binder(function)(module, *given[0], **given[1])
    guards = _guards_of(guarded, function, frame)
    flat = flatten(guarded.graph)
    rebuild = _rebuilder(outputs, result)
    if guards is None or flat is None or rebuild is None:
        return None
    fetch = Fetch(guarded.sources, function.__globals__)
    early = {*flat.front.positions, *flat.reuse.positions, *guarded.asked}
    if any(_is_below(guarded.sources[i], guarded.region_paths) for i in early):
        return None  # A weight that the region's blocks share with what runs without them.
    found = fetch(range(len(args)))(frame)
    if not all(_is_same(one, other) for one, other in zip(found, args, strict=True)):
        return None
    return LightCall(guarded, flat, guards, function, fetch, rebuild)


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


class Fetch:
    """Makes functions from a frame's locals to what stands at some of the graph's inputs.

    Args:
        sources: Of every input the expression that Dynamo found it by, over `L` (locals) and `G` (globals).
    """

    def __init__(self, sources: Sequence[str], names: dict[str, Any]) -> None:
        self._sources, self._globals = sources, names

    def __call__(self, positions: Sequence[int]) -> Callable[[Locals], tuple[Any, ...]]:
        lines: list[str] = []
        known: dict[str, str] = {}
        values = [_variable(self._sources[i], known, lines) for i in positions]
        text = "\n    ".join(["def fetch(L):", *lines, f"return ({''.join(f'{value}, ' for value in values)})"])
        made: dict[str, Any] = {}
        exec(text, {"G": self._globals}, made)
        found: Callable[[Locals], tuple[Any, ...]] = made["fetch"]
        return found


_STEP = re.compile(r"(?:\.\w+|\[(?:'[^']*'|\w+)\])$")


def _variable(source: str, known: dict[str, str], lines: list[str]) -> str:
    """A variable that holds `source`: modules on the way to several weights are looked up once."""
    if source not in known:
        step = _STEP.search(source)
        base = source[: step.start()] if step else ""
        is_chain = step is not None and base not in ("", "L", "G") and base.count("(") == base.count(")")
        value = _variable(base, known, lines) + source[len(base) :] if is_chain else source
        known[source] = f"v{len(known)}"
        lines.append(f"{known[source]} = {value}")
    return known[source]


def _binder(function: types.FunctionType) -> Callable[..., Locals]:
    """A function of the same parameters and defaults that returns what its frame would begin with."""
    code = function.__code__
    positional, keywords = code.co_argcount, code.co_kwonlyargcount
    names = list(code.co_varnames[: positional + keywords])
    rest = list(code.co_varnames[positional + keywords :])
    first_default = positional - len(function.__defaults__ or ())
    parameters = [name + ("=None" if i >= first_default else "") for i, name in enumerate(names[:positional])]
    if code.co_posonlyargcount:
        parameters.insert(code.co_posonlyargcount, "/")
    if code.co_flags & 0x04:
        parameters.append(f"*{rest.pop(0)}")
    elif keywords:
        parameters.append("*")
    has_default = function.__kwdefaults__ or {}
    parameters += [name + ("=None" if name in has_default else "") for name in names[positional:]]
    if code.co_flags & 0x08:
        parameters.append(f"**{rest.pop(0)}")
    made: dict[str, Any] = {}
    exec(f"def bind({', '.join(parameters)}):\n    return locals()", {}, made)
    bind = made["bind"]
    bind.__defaults__, bind.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    cells = function.__closure__ or ()
    if not cells:
        return bind  # type: ignore[no-any-return]

    def bind_all(*args: Any, **kwargs: Any) -> Locals:
        frame: Locals = bind(*args, **kwargs)
        for name, cell in zip(code.co_freevars, cells, strict=True):
            frame[name] = cell.cell_contents
        return frame

    return bind_all


def _guards_of(guarded: GuardedCall, function: types.FunctionType, frame: Locals) -> Any:
    """The guards that Dynamo holds before it runs `guarded` for `frame`; None where the function is several graphs.

    One function may have graphs of several backends, as of an earlier configuration, whose guards hold as well.
    """
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list, innermost_fn

    for entry in _debug_get_cache_entry_list(function.__code__):
        names = [name for name in entry.code.co_names if name.startswith(("__compiled_fn", "__resume_at"))]
        compiled = [innermost_fn(function.__globals__[name]) for name in names if name in function.__globals__]
        if compiled == [guarded] and entry.guard_manager.check(frame):
            return entry.guard_manager
    return None


def _outside(paths: Sequence[str]) -> Callable[[Any], bool]:
    return lambda manager: not _is_below(manager.get_source(), paths)


def _is_below(source: str, paths: Sequence[str]) -> bool:
    """Whether a source of Dynamo's lies in a module at one of the `paths` (`blocks.3`) of the frame's own module."""
    if not source.startswith("L['self']"):
        return False
    path = ".".join(re.findall(r"_modules(?:'\])?\['([^']+)'\]", source)) + "."
    return any(path.startswith(f"{region}.") for region in paths)


def _rebuilder(outputs: Sequence[Any], result: Any) -> Callable[[Sequence[Any]], Any] | None:
    """Makes of the graph's outputs what the forward returns, if that is those and constants alone."""
    leaves, spec = pytree.tree_flatten(result)
    positions: list[int | None] = []
    for leaf in leaves:
        found = next((i for i, output in enumerate(outputs) if output is leaf), None)
        if found is None and leaf is not None:
            return None
        positions.append(found)
    if type(result) is tuple and len(leaves) == len(result) and None not in positions:
        order = [i for i in positions if i is not None]
        return lambda given: tuple(given[i] for i in order)
    return lambda given: pytree.tree_unflatten([None if i is None else given[i] for i in positions], spec)


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, int | float | bool) and one == other)
