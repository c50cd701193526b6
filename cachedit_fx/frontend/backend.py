"""The backend that `torch.compile` calls: it runs the passes, compiles the pieces and returns a `CachedCall`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cachedit_fx.config.cache_config import CacheConfig, check_together, split_options
from cachedit_fx.errors import PassError, PatternError, cut
from cachedit_fx.frontend.capture import captured_module, copy_graph, forget_examples, sources_of
from cachedit_fx.frontend.compile_progress import compile_progress
from cachedit_fx.frontend.graph_break import break_after
from cachedit_fx.frontend.inner_compiler import InnerCompiler
from cachedit_fx.frontend.torch_internals import RestartAnalysis, trace_structured_artifact
from cachedit_fx.frontend.uncached import (
    BUG,
    UncachedGraph,
    WhyUncached,
    report_bare,
    why_not_without_hooks,
    why_of,
)
from cachedit_fx.frontend.unfit_templates import report_unfit_templates
from cachedit_fx.passes.manager import Rewritten, rewrite
from cachedit_fx.passes.observer import observer_for
from cachedit_fx.passes.piece import Piece
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.mismatch import Mismatch
from cachedit_fx.runtime.cached_call import CachedCall
from cachedit_fx.runtime.instances import instance_of_weights
from cachedit_fx.runtime.model_call import current_call
from cachedit_fx.runtime.placement import OnloadingPiece
from cachedit_fx.runtime.sources import Sources

log = logging.getLogger(__name__)
Compiled = Callable[..., Any]


class RefusedError(Exception):
    """A graph of an offloaded model cannot be cached, so the model has to run with its hooks."""

    def __init__(self, why: WhyUncached) -> None:
        super().__init__(why.reason)
        self.why = why


class Backend:
    """The backend "cachedit" as an object: `torch.compile(model, backend=Backend(CacheConfig(...)))`.

    Args:
        config: When to reuse, and how to compile.
        mode: The mode of the inner backend, as in `torch.compile`.
        options: Options of Inductor, if it is the inner backend.
        declared: What the user declared about the blocks of the model. By default, everything is found in the graph.
        policy_per_call: Whether every call passes its policy (`ModelCall.policy`). Modules whose configurations differ
            only in the policy then share their graphs.

    Attributes:
        captures_data: Whether graphs are captured with `capture_scalar_outputs` and `capture_dynamic_output_shape_ops`.
        is_offloaded: Whether the pieces bring the weights that they read to the device.

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
        self.captures_data = self.is_offloaded = False
        self.__name__ = "cachedit"

    def capturing(self, *, data: bool) -> Backend:
        """A copy of the backend for graphs that are captured with or without data, which share no graphs."""
        other = copy.copy(self)
        other.captures_data = data
        return other

    def offloaded(self) -> Backend:
        """A copy of the backend for a model that is captured without the hooks that move its weights."""
        other = copy.copy(self)
        other.is_offloaded = True
        return other

    @property
    def owner(self) -> tuple[Hashable, ...]:
        """Equal for backends that share their sessions, and their graphs if the options of Inductor are equal, too."""
        return (self.config.structure if self.policy_per_call else self.config, self.mode, self.declared)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash((self.owner, self.captures_data, self.is_offloaded, tuple(sorted(self.inner_options))))

    @property
    def _identity(self) -> tuple[object, ...]:
        return (self.owner, self.captures_data, self.is_offloaded, self.inner_options)

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        """Compiles a graph. If it cannot be cached, logs the reason and compiles it with the inner backend alone.

        Raises:
            RefusedError: It cannot be cached, and the model is offloaded.
        """
        config, given = split_options(options or {}, self.config)
        compiler = InnerCompiler(config, mode or self.mode, {**self.inner_options, **given})
        copied = copy_graph(gm, example_inputs)
        module = captured_module()
        name = type(module).__name__ if module is not None else "graph"
        observer = observer_for(name, config, self.declared)
        try:
            reasons = refusal()
            if reasons:
                observer.refused(reasons)
            planned = reasons or rewrite(copied, config, self.declared, exact=compiler.is_exact, observer=observer)
            observer.finish(copied)
        except PatternError:
            raise
        except Exception as error:
            observer.fail()
            cause = error.__cause__ if isinstance(error, PassError) else None
            why = _report_bug(cause or error, config, "the passes failed" if cause is None else str(error))
            return self._uncached(gm, example_inputs, compiler, why)
        _trace_artifacts(planned)
        if isinstance(planned, Rewritten):
            report_unfit_templates(planned.plan.chain)
            owner = self.owner if self.policy_per_call else (config, self.declared)
            try:
                if self.is_offloaded:
                    _check_offloaded(compiler, module)
                return compile_cached_graph(
                    planned,
                    config,
                    compiler,
                    owner,
                    sources_of(gm),
                    policy_per_call=self.policy_per_call,
                    is_offloaded=self.is_offloaded,
                )
            except (RestartAnalysis, RefusedError):
                raise  # Dynamo captures the graph again, for example because a number has to be specialized.
            except Exception as error:  # The inner backend may be able to compile the whole graph.
                why = _report_bug(error, config, "the inner backend failed on a part of the graph")
                return self._uncached(gm, example_inputs, compiler, why)
        forget_examples(copied)
        if current_call() is None:
            report_bare(planned, config, break_after(gm))
            return compiler(gm, list(example_inputs))
        # If Dynamo breaks the model into several graphs, another one may match. This is known at the end of the call.
        return self._uncached(gm, example_inputs, compiler, why_of(planned, captured_module()))

    def _uncached(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], compiler: InnerCompiler, why: WhyUncached
    ) -> Compiled:
        if self.is_offloaded:
            raise RefusedError(why)
        return UncachedGraph(compiler(gm, list(example_inputs)), len(gm.graph.nodes), why)


def _check_offloaded(compiler: InnerCompiler, module: torch.nn.Module | None) -> None:
    """Refuses what cannot be done with weights that move.

    Raises:
        RefusedError: The inner backend needs weights at fixed addresses.
    """
    if compiler.owns_buffers:
        found = "an inner backend that uses CUDA graphs, for which weights must not move"
        raise RefusedError(why_not_without_hooks(module, found))


def cachedit(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend for `torch.compile(model, backend="cachedit")`, which has an entry point. See `CacheConfig`."""
    return Backend()(gm, example_inputs, mode=mode, options=options)


def refusal() -> tuple[Mismatch, ...]:
    """Reasons not to cache that concern the state of the module, not its graph."""
    module = captured_module()
    if module is not None and module.training:
        return (Mismatch(None, Cause.TRAINING, "a module in eval mode", "training mode"),)
    return ()


def _trace_artifacts(planned: Rewritten | tuple[Mismatch, ...]) -> None:
    """Writes the result of the passes to the structured trace of torch (TORCH_TRACE, read by tlparse), if it is on."""
    if isinstance(planned, tuple):
        trace_structured_artifact("cachedit_fx_mismatch", "string", lambda: "\n".join(map(str, planned)))
        return
    gm = planned.gm
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
    is_offloaded: bool = False,
) -> Compiled:
    """Compiles the pieces of a cached graph. Returns what Dynamo calls instead of the graph that it captured.

    Args:
        owner: Identifies the sessions that the graph may use.
        sources: How Dynamo calls the graph.
        policy_per_call: Whether every call passes its policy.
        is_offloaded: Whether the pieces bring the weights that they read to the device.
    """
    plan, runtime_plan, pieces = rewritten.plan, rewritten.runtime_plan, rewritten.pieces
    compile_pieces(compiler, pieces, type(captured_module() or plan.gm).__name__)
    for segment, call in (call for piece in pieces for call in piece.calls) if is_offloaded else ():
        segment.__dict__[call] = OnloadingPiece(segment.__dict__[call])
    placeholders = [node for node in plan.program.nodes if node.op == "placeholder"]
    _mark_cached(runtime_plan.weights, placeholders, policy_per_call=policy_per_call)
    forget_examples(plan.gm, rewritten.gm, *(piece.gm for piece in pieces))
    log.info("cached: %s; %d pieces, %d of them blocks", plan, len(pieces), sum(bool(p.blocks) for p in pieces))
    if runtime_plan.effect and sources is not None and not sources.reason:
        sources = Sources(reason=f"the forward {runtime_plan.effect}")  # Dynamo has to make every call.
    return CachedCall(
        rewritten.gm,
        owner,
        config,
        runtime_plan,
        policy_per_call=policy_per_call,
        copy_state=compiler.owns_buffers,
        inner=compiler,
        sources=sources,
    )


def compile_pieces(compiler: InnerCompiler, pieces: Sequence[Piece], name: str) -> None:
    """Compiles pieces, and shows on a terminal how many are finished. `name` is the class of the model."""
    with compile_progress(name, len(pieces)) as show:
        for number, piece in enumerate(pieces):
            show(number)
            compiler.compile_piece(piece)


def _mark_cached(weights: Sequence[int | torch.Tensor], placeholders: list[fx.Node], *, policy_per_call: bool) -> None:
    """Records that the module that is being compiled has a cached graph."""
    call = current_call() if policy_per_call else None
    if call is not None and call.instance is not None:
        call.instance.has_cached_graph = True
        return
    examples = [w if isinstance(w, torch.Tensor) else placeholders[w].meta["cachedit_example"] for w in weights]
    instance_of_weights(examples).has_cached_graph = True


def _report_bug(error: BaseException, config: CacheConfig, what: str) -> WhyUncached:
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
