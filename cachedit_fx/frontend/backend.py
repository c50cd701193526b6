"""What does torch.compile call: the backend named "cachedit"."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cachedit_fx.config.cache_config import CacheConfig, check_together, split_options
from cachedit_fx.errors import PassError, PatternError, cut
from cachedit_fx.frontend.capture import captured_module, copy_graph, forget_examples, sources_of
from cachedit_fx.frontend.inner_compiler import InnerCompiler
from cachedit_fx.frontend.torch_internals import RestartAnalysis, trace_structured_artifact
from cachedit_fx.frontend.uncached import BUG, UncachedGraph, WhyUncached, report_bare, why_of
from cachedit_fx.passes.analysis.dataflow import is_weight
from cachedit_fx.passes.analysis.effects import effect_of
from cachedit_fx.passes.analysis.writes import written_outside
from cachedit_fx.passes.manager import plan_graph
from cachedit_fx.passes.observer import Observer, observer_for
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.region import Region
from cachedit_fx.passes.transforms.insert_conditionals import CachedGraph, cached_examples, insert_conditionals
from cachedit_fx.passes.transforms.split_pieces import Piece, split_pieces
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.mismatch import Mismatch
from cachedit_fx.patterns.nodes import call_text, is_tensor, source_line, value_of
from cachedit_fx.runtime.cached_call import CachedCall
from cachedit_fx.runtime.instances import instance_of_weights
from cachedit_fx.runtime.session import current_call
from cachedit_fx.runtime.shapes import SizeRule, UnknownSizeError
from cachedit_fx.runtime.sources import Sources
from cachedit_fx.runtime.step import RegionPlan

log = logging.getLogger(__name__)
Compiled = Callable[..., Any]


class Backend:
    """`torch.compile(model, backend=Backend(CacheConfig(...)))`: the same as `backend="cachedit"` with options.

    Args:
        config: When to reuse, and how to compile.
        mode: `torch.compile`'s mode for the inner backend.
        options: Inductor's options, for the inner backend.
        declared: What is known of the model's blocks; by default nothing, and the graph tells.
        policy_per_call: Every call brings its policy along (`ModelCall.policy`), so that modules whose configurations
            differ in nothing else share their graphs.

    Attributes:
        captures_data: The graphs are captured with `capture_scalar_outputs` and `capture_dynamic_output_shape_ops` on.

    Raises:
        ConfigError: An option is unknown.
    """

    def __init__(
        self,
        config: CacheConfig | None = None,
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        declared: Declaration | None = None,
        policy_per_call: bool = False,
    ) -> None:
        self.config, self.inner_options = split_options(options or {}, config)
        self.mode = mode
        self.declared = declared or Declaration()
        for override in self.declared.overrides:
            check_together(self.config.override(override))
        self.policy_per_call = policy_per_call
        self.captures_data = False
        self.__name__ = "cachedit"

    def capturing(self, *, data: bool) -> Backend:
        """The same backend for graphs that Dynamo captures in another way: these are shared with no others."""
        other = copy.copy(self)
        other.captures_data = data
        return other

    @property
    def owner(self) -> tuple[Hashable, ...]:
        """Equal for backends that may share their graphs, up to Inductor's options, and their sessions."""
        return (self.config.structure if self.policy_per_call else self.config, self.mode, self.declared)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash((self.owner, self.captures_data, tuple(sorted(self.inner_options))))

    @property
    def _identity(self) -> tuple[object, ...]:
        return (self.owner, self.captures_data, self.inner_options)

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        """Compiles a graph: with the cache if it matches, else as the inner backend alone would. Logs the reason."""
        config, given = split_options(options or {}, self.config)
        compiler = InnerCompiler(config, mode or self.mode, {**self.inner_options, **given})
        copied = copy_graph(gm, example_inputs)
        module = captured_module()
        name = type(module).__name__ if module is not None else "graph"
        observer = observer_for(name, config, self.declared)
        try:
            planned = refusal() or rewrite(copied, config, self.declared, exact=compiler.is_exact, observer=observer)
            observer.finish(copied, planned if isinstance(planned, tuple) else ())
        except PatternError:
            raise
        except Exception as error:
            observer.fail()
            why = _report_bug(error, config)
            return UncachedGraph(compiler(gm, list(example_inputs)), len(gm.graph.nodes), why)
        _trace_artifacts(planned)
        if isinstance(planned, Rewritten):
            owner = self.owner if self.policy_per_call else (config, self.declared)
            try:
                per_call = self.policy_per_call
                return compile_cached_graph(planned, config, compiler, owner, sources_of(gm), policy_per_call=per_call)
            except RestartAnalysis:
                raise  # To Dynamo, which captures the graph anew, as where a number has to be specialised.
            except Exception as error:  # Of the whole graph the inner compiler may make more than of a part.
                why = _report_bug(error, config, "the inner backend failed on a part of the graph")
                return UncachedGraph(compiler(gm, list(example_inputs)), len(gm.graph.nodes), why)
        forget_examples(copied)
        return _compile_uncached(gm, example_inputs, planned, config, compiler)


def cachedit(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend `torch.compile(model, backend="cachedit")` finds by its entry point. See `CacheConfig`."""
    return Backend()(gm, example_inputs, mode=mode, options=options)


def refusal() -> tuple[Mismatch, ...]:
    """Reasons that lie in how the module is run, not in its graph."""
    module = captured_module()
    if module is not None and module.training:
        return (Mismatch(None, Cause.TRAINING, "a module in eval mode", "training mode"),)
    return ()


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A cached graph, cut into pieces that are still to be compiled.

    Attributes:
        weights: Of every block a weight, to tell module instances apart: its position among the arguments, or itself.
    """

    plan: Plan
    cached_graph: CachedGraph
    pieces: list[Piece]
    regions: list[RegionPlan]
    weights: tuple[int | torch.Tensor, ...]


def rewrite(
    gm: fx.GraphModule, config: CacheConfig, declared: Declaration, *, exact: bool, observer: Observer | None = None
) -> Rewritten | tuple[Mismatch, ...]:
    """The cached graph in pieces, or why there is none, nearest miss first. Compiles nothing.

    Args:
        exact: Do nothing that changes rounding.

    Raises:
        PatternError: The graph contradicts what was declared.
    """
    observer = observer or Observer()
    plan = plan_graph(gm, config, declared, observer)
    if not isinstance(plan, Plan):
        return plan
    placeholders = [node for node in plan.program.nodes if node.op == "placeholder"]
    try:
        regions = [_region_plan(region, placeholders) for region in plan.regions]
    except UnknownSizeError as error:
        expected = "streams whose sizes follow from those of the inputs"
        return (Mismatch(None, Cause.DYNAMIC, expected, f"a size ({error.symbols}) that depends on data"),)
    written = (
        written_outside(plan.program, [*plan.program.nodes_in(0, len(plan.program.nodes))]) if config.shadow else None
    )
    if written is not None:
        expected = "a graph that may run twice on the same inputs (shadow=True)"
        found, where = f"`{call_text(written)}`", source_line(written)
        return (Mismatch(None, Cause.IN_PLACE, expected, found, node=written.name, where=where),)
    cached_graph = insert_conditionals(
        plan.gm,
        plan.program,
        plan.regions,
        plan.timestep,
        checksummed=_written_unnoticed(plan.conditioning),
        same_strides=not exact,
        observed=config.shadow,
    )
    observer.rewritten(cached_graph)
    weights = _find_weights(plan, placeholders)
    pieces = split_pieces(_segments(cached_graph), share_blocks=config.compile_blocks == "once", free_strides=not exact)
    observer.pieces(cached_graph, pieces)
    return Rewritten(plan, cached_graph, pieces, regions, weights)


def _written_unnoticed(conditioning: fx.Node | None) -> fx.Node | None:
    """The conditioning, if it may be written in place without a count of that, as inference tensors may."""
    if conditioning is None or not is_tensor(conditioning):
        return None
    example = conditioning.meta.get("cachedit_example", value_of(conditioning))
    is_inference = torch.is_inference_mode_enabled() or example.is_inference()
    return conditioning if is_inference else None


def _trace_artifacts(planned: Rewritten | tuple[Mismatch, ...]) -> None:
    """Hands what was decided to torch's structured trace (TORCH_TRACE, read by tlparse), if that is on."""
    if isinstance(planned, tuple):
        trace_structured_artifact("cachedit_fx_mismatch", "string", lambda: "\n".join(map(str, planned)))
        return
    gm = planned.cached_graph.gm
    trace_structured_artifact("cachedit_fx_plan", "string", lambda: str(planned.plan))
    trace_structured_artifact("cachedit_fx_cached_graph", "string", lambda: gm.print_readable(print_output=False))


def compile_cached_graph(
    rewritten: Rewritten,
    config: CacheConfig,
    compiler: InnerCompiler,
    owner: Hashable,
    sources: Sources | None = None,
    *,
    policy_per_call: bool,
) -> Compiled:
    """Compiles the pieces of a cached graph; returns what Dynamo is to call in place of its graph.

    Args:
        owner: Sessions of another owner are none of its own.
        sources: How Dynamo calls the graph.
        policy_per_call: Every call brings its policy along.
    """
    plan, pieces = rewritten.plan, rewritten.pieces
    for piece in pieces:
        compiler.compile_piece(piece)
    placeholders = [node for node in plan.program.nodes if node.op == "placeholder"]
    _mark_cached(rewritten.weights, placeholders, policy_per_call=policy_per_call)
    forget_examples(plan.gm, rewritten.cached_graph.gm, *(piece.gm for piece in pieces))
    log.info("cached: %s; %d pieces, %d of them blocks", plan, len(pieces), sum(bool(p.blocks) for p in pieces))
    return CachedCall(
        rewritten.cached_graph.gm,
        owner,
        config,
        rewritten.regions,
        weights=rewritten.weights,
        conditioning=placeholders.index(plan.conditioning) if plan.conditioning is not None else None,
        has_timestep=plan.timestep is not None,
        num_checksums=rewritten.cached_graph.num_checksums,
        policy_per_call=policy_per_call,
        copy_state=compiler.owns_buffers,
        inner=compiler,
        sources=_and_effects(sources, plan),
        region_paths=_paths_of_regions(plan),
        number=_number_of_regions(plan),
    )


def _and_effects(sources: Sources | None, plan: Plan) -> Sources | None:
    """The same, for Dynamo alone where the graph has effects."""
    effect = effect_of(plan.program) if sources is not None and not sources.reason else ""
    return Sources(reason=f"the forward {effect}") if effect else sources


def _number_of_regions(plan: Plan) -> int:
    """Equal for graphs whose regions run the same operations on values of the same names."""
    nodes = (node for region in plan.regions for node in region.nodes)
    return hash(tuple((node.op, str(node.target), str(node.args), str(node.kwargs)) for node in nodes))


def _paths_of_regions(plan: Plan) -> list[str]:
    """Modules of the blocks that run inside a region, whole: none of their work is done before it."""
    blocks = [(match.blocks, block) for match in plan.chain for block in match.blocks.blocks]
    hoisted = {node.meta.get("cachedit_block") for region in plan.regions for node in region.hoisted}
    numbers = [i for region in plan.regions for i in range(region.first, region.last) if i not in hoisted]
    found = []
    for of, block in (blocks[i] for i in numbers):
        # Where lists take turns, a block is one of each, at the same place in its list.
        place = block.path.removeprefix(of.path)
        found += [block.path, *(other + place for other in of.alternates)]
    return found


def _segments(cached_graph: CachedGraph) -> list[fx.GraphModule]:
    return [module for _, module in cached_graph.gm.named_children() if isinstance(module, fx.GraphModule)]


def _region_plan(region: Region, placeholders: list[fx.Node]) -> RegionPlan:
    examples = cached_examples(region)
    measured = (*[False] * (region.probed_at is not None), *(pair.is_measured for pair in region.live_outs))
    return RegionPlan(
        name=region.name,
        overrides=region.overrides,
        has_probe=region.probed_at is not None,
        sizes=SizeRule([t for t, is_measured in zip(examples, measured, strict=True) if not is_measured], placeholders),
        measured=measured,
        dtypes=tuple(tensor.dtype for tensor in examples),
        device=examples[-1].device,
        roles=tuple(pair.role for pair in region.live_outs),
    )


def _find_weights(plan: Plan, placeholders: list[fx.Node]) -> tuple[int | torch.Tensor, ...]:
    """The first weight of every block: an argument of the graph, or held by it where Dynamo specialised on the module.

    Parameters and buffers alike: the weights of quantised layers are often buffers.
    """
    nodes = plan.program.nodes
    blocks = [block for match in plan.chain for block in match.blocks.blocks]
    found = [_first_weight(plan, nodes[block.start : block.end]) for block in blocks]
    known = [weight for weight in found if weight is not None]
    if not known:
        return (torch.empty(0),)  # A chain without weights: all its instances are one.
    return tuple(w if isinstance(w, torch.Tensor) else placeholders.index(w) for w in known)


def _first_weight(plan: Plan, nodes: Sequence[fx.Node]) -> fx.Node | torch.Tensor | None:
    for arg in (arg for node in nodes for arg in node.all_input_nodes):
        # Numbers that a module holds are tensors without dimensions, made anew at every call.
        if arg.op == "placeholder" and is_tensor(arg) and is_weight(arg) and value_of(arg).dim():
            return arg
        held = getattr(plan.gm, str(arg.target), None) if arg.op == "get_attr" else None
        if isinstance(held, torch.Tensor):
            return held
    return None


def _mark_cached(weights: Sequence[int | torch.Tensor], placeholders: list[fx.Node], *, policy_per_call: bool) -> None:
    """Notes that the module that is being compiled is cached."""
    call = current_call() if policy_per_call else None
    if call is not None and call.instance is not None:
        call.instance.has_cached_graph = True
        return
    examples = [w if isinstance(w, torch.Tensor) else placeholders[w].meta["cachedit_example"] for w in weights]
    instance_of_weights(examples).has_cached_graph = True


def _compile_uncached(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    reasons: tuple[Mismatch, ...],
    config: CacheConfig,
    compiler: InnerCompiler,
) -> Compiled:
    if current_call() is None:
        report_bare(reasons, config)
        return compiler(gm, list(example_inputs))
    # Where Dynamo breaks a model up, one of its graphs may still match: the end of the model's call tells.
    why = why_of(reasons, captured_module())
    return UncachedGraph(compiler(gm, list(example_inputs)), len(gm.graph.nodes), why)


def _report_bug(error: Exception, config: CacheConfig, what: str = "a pass failed") -> WhyUncached:
    message = "\n".join(
        (
            "cachedit_fx: this graph runs without caching, because of a bug in cachedit_fx.",
            f"What happened: {what} ({type(error).__name__}: {cut(error, 160)}).",
            'What to do: please report it with the traceback, and with the folder that options={"debug_dir": "dumps"} '
            "writes.",
        )
    )
    if config.on_no_match == "raise":
        raise PassError(message) from error
    log.warning("%s", message, exc_info=error)
    reason = f"because of a bug in cachedit_fx ({what}: {type(error).__name__})"
    return WhyUncached(BUG, reason, message)
