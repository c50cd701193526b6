"""Prepares a captured graph for the analysis, in order, and plans it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import PatternError, cut
from cachedit_fx.passes.analysis.make_plan import make_plan
from cachedit_fx.passes.observer import Observer
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.transforms.drop_numpy_calls import drop_numpy_calls
from cachedit_fx.passes.transforms.functionalize_writes import functionalize_writes
from cachedit_fx.passes.transforms.hoist_symbols import hoist_symbols
from cachedit_fx.passes.transforms.inline_checkpoints import inline_checkpoints
from cachedit_fx.passes.transforms.narrow_contexts import narrow_contexts
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.mismatch import Mismatch, MismatchError

TIDYING: tuple[Callable[[fx.GraphModule], object], ...] = (
    drop_numpy_calls,  # What nothing reads needs no place.
    hoist_symbols,  # Before the others: no later pass has to ask whether a value is one.
    narrow_contexts,  # Before anything moves: a node belongs to the context that it was made in.
    functionalize_writes,  # Last: it asks who else sees a value, and the passes before change that.
)


def plan_graph(
    gm: fx.GraphModule, config: CacheConfig, declared: Declaration | None = None, observer: Observer | None = None
) -> Plan | tuple[Mismatch, ...]:
    """The plan for a graph whose inputs are labelled, or why it has none, nearest miss first. Compiles nothing.

    Raises:
        PatternError: The graph contradicts what was declared.
    """
    declared, observer = declared or Declaration(), observer or Observer()
    observer.graph("captured", gm)
    inline_checkpoints(gm)  # A functor gets a graph that reads like the model's code.
    observer.graph("inline-checkpoints", gm)
    gm = _apply_functor(gm, declared)
    observer.graph("apply-functor", gm)
    for tidy in TIDYING:
        tidy(gm)
        observer.graph(tidy.__name__.replace("_", "-"), gm)
    try:
        found: Plan | tuple[Mismatch, ...] = make_plan(gm, config, declared, observer)
    except MismatchError as error:
        found = error.mismatches
    observer.planned(found)
    return found


def _apply_functor(gm: fx.GraphModule, declared: Declaration) -> fx.GraphModule:
    if declared.functor is None:
        return gm
    name = type(declared.functor).__name__
    before = _inputs(gm)
    try:
        gm = declared.functor.apply(gm)
        gm.graph.lint()
    except Exception as error:
        raise PatternError(
            f"cachedit_fx: patch functor `{name}` failed on the captured graph: {type(error).__name__}: "
            f"{cut(error)}\n"
            "What to do: correct its apply; a graph that lacks what it looks for it has to hand back as it is."
        ) from error
    if _inputs(gm) != before:
        raise PatternError(
            f"cachedit_fx: patch functor `{name}` must leave the graph's inputs as they are, in number and order.\n"
            f"  expected: the {len(before)} that were captured\n"
            f"  found:    {_changed(before, _inputs(gm))}\n"
            "What to do: let its apply make values from the inputs that there are."
        )
    return gm


def _changed(before: Sequence[str], after: Sequence[str]) -> str:
    """`1 added (mask)`: how the inputs of a graph differ."""
    changes = {"added": [n for n in after if n not in before], "gone": [n for n in before if n not in after]}
    said = [f"{len(names)} {how} ({cut(', '.join(names))})" for how, names in changes.items() if names]
    return ", ".join(said) or "another order"


def _inputs(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
