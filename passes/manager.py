"""The pass manager: runs the analyses and rewrites over one graph, in one order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import PassError, PatternError
from cachedit_fx.passes.analysis.make_plan import make_plan
from cachedit_fx.passes.analysis.runtime_plan import RuntimePlan, make_runtime_plan
from cachedit_fx.passes.extract import generate_code
from cachedit_fx.passes.graph_pass import GraphAnalysis, GraphPass, PassContext
from cachedit_fx.passes.observer import Observer
from cachedit_fx.passes.piece import Piece
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.transforms.apply_functor import ApplyFunctor
from cachedit_fx.passes.transforms.drop_numpy_calls import DropNumpyCalls
from cachedit_fx.passes.transforms.functionalize_writes import FunctionalizeWrites
from cachedit_fx.passes.transforms.hoist_symbols import HoistSymbols
from cachedit_fx.passes.transforms.inline_checkpoints import InlineCheckpoints
from cachedit_fx.passes.transforms.insert_conditionals import InsertConditionals
from cachedit_fx.passes.transforms.narrow_contexts import NarrowContexts
from cachedit_fx.passes.transforms.split_pieces import SplitPieces
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.mismatch import Mismatch, MismatchError

log = logging.getLogger(__name__)

PassType = type[GraphPass] | type[GraphAnalysis]


class MakePlan(GraphAnalysis):
    """Locates the blocks, matches their templates and cuts the regions."""

    name = "make-plan"

    def __call__(self, graph_module: fx.GraphModule) -> None:
        context = self.context
        context.plan = make_plan(graph_module, context.config, context.declared, context.observer)
        context.observer.planned(context.plan)


class MakeRuntimePlan(GraphAnalysis):
    """Decides, from the plan, everything else that the runtime needs."""

    name = "make-runtime-plan"

    def __call__(self, graph_module: fx.GraphModule) -> None:
        assert self.context.plan is not None
        self.context.runtime_plan = make_runtime_plan(self.context.plan, self.context.config)


PASSES: tuple[PassType, ...] = (
    InlineCheckpoints,  # First, so that a functor gets a graph that corresponds to the code of the model.
    ApplyFunctor,  # Before the other rewrites, so that what a functor adds is rewritten, too.
    DropNumpyCalls,  # Before the others, so that they need not consider nodes that nothing reads.
    HoistSymbols,  # Before the contexts are narrowed, so that the sizes are computed outside of them.
    NarrowContexts,  # Before anything moves, because a node must stay in the context in which it was created.
    FunctionalizeWrites,  # Last before the analysis. It depends on which nodes read a value.
    MakePlan,
    MakeRuntimePlan,  # Before the conditionals, which change the strides of example values.
    InsertConditionals,
    SplitPieces,  # Last, because it splits what the conditionals consist of.
)
TO_PLAN = PASSES[: PASSES.index(MakePlan) + 1]


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The result of all passes: a cached graph, whose pieces are not compiled yet.

    Attributes:
        gm: The cached graph.
        pieces: The pieces that its segments call.
    """

    plan: Plan
    runtime_plan: RuntimePlan
    gm: fx.GraphModule
    pieces: tuple[Piece, ...]


def rewrite(
    gm: fx.GraphModule, config: CacheConfig, declared: Declaration, *, exact: bool, observer: Observer | None = None
) -> Rewritten | tuple[Mismatch, ...]:
    """Runs all passes over a captured graph whose inputs are labeled. Compiles nothing.

    Args:
        exact: Whether the cached graph must round as the captured graph does.

    Returns:
        The cached graph in pieces, or the reasons why there is none, the nearest miss first.

    Raises:
        PatternError: The graph contradicts what was declared, or the patch functor failed.
        PassError: A pass failed.
    """
    context = PassContext(config, declared, exact, observer or Observer())
    gm, mismatches = _run_or_refuse(gm, PASSES, context)
    if mismatches:
        return mismatches
    assert context.plan is not None and context.runtime_plan is not None
    generate_code(gm)
    context.observer.pieces(gm, context.pieces)
    return Rewritten(context.plan, context.runtime_plan, gm, context.pieces)


def plan_graph(
    gm: fx.GraphModule, config: CacheConfig, declared: Declaration | None = None, observer: Observer | None = None
) -> Plan | tuple[Mismatch, ...]:
    """Runs the passes up to the plan, like `rewrite`. Returns the plan, or the reasons why there is none."""
    context = PassContext(config, declared or Declaration(), observer=observer or Observer())
    _, mismatches = _run_or_refuse(gm, TO_PLAN, context)
    if mismatches:
        return mismatches
    assert context.plan is not None
    return context.plan


def _run_or_refuse(
    gm: fx.GraphModule, passes: Sequence[PassType], context: PassContext
) -> tuple[fx.GraphModule, tuple[Mismatch, ...]]:
    """The graph after `passes`; or the graph as it is, and the reasons why it cannot be cached."""
    context.observer.graph("captured", gm)
    try:
        return run_passes(gm, passes, context), ()
    except MismatchError as error:
        context.observer.refused(error.mismatches)
        return gm, error.mismatches


def run_passes(gm: fx.GraphModule, passes: Sequence[PassType], context: PassContext) -> fx.GraphModule:
    """Runs `passes` in order. After each rewrite, lints the graph and notifies the observer.

    Raises:
        MismatchError: An analysis found that the graph cannot be cached.
        PatternError: The graph contradicts what was declared, or the patch functor failed.
        PassError: A pass raised anything else, or left a graph that does not lint.
    """
    for pass_type in passes:
        try:
            gm, modified = _run(pass_type, gm, context)
        except (MismatchError, PatternError):
            raise
        except Exception as error:
            raise PassError(f"the pass {pass_type.name} failed") from error
        if modified is None:
            continue
        log.debug("%s: modified=%s, %d nodes", pass_type.name, modified, len(gm.graph.nodes))
        context.observer.graph(pass_type.name, gm)
    return gm


def _run(pass_type: PassType, gm: fx.GraphModule, context: PassContext) -> tuple[fx.GraphModule, bool | None]:
    """The graph after one pass, and whether the pass modified it; None for an analysis."""
    if issubclass(pass_type, GraphAnalysis):
        pass_type(context)(gm)
        return gm, None
    gm, modified = pass_type(context)(gm)
    for module in (gm, *gm.children()):  # What a pass rewrites: the graph, or the segments that it consists of.
        if isinstance(module, fx.GraphModule):
            module.graph.lint()
    if modified:
        gm.recompile()
    return gm, modified
