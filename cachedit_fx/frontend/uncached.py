"""Reasons why a model runs without the cache, and how they are reported: as a warning or as an error."""

from __future__ import annotations

import inspect
import logging
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import NoMatchError, cut
from cachedit_fx.frontend.capture import captured_module
from cachedit_fx.frontend.graph_break import GraphBreak
from cachedit_fx.frontend.layer_hooks import has_sharded_layers, hooks_of
from cachedit_fx.frontend.torch_internals import OptimizedModule, is_resumed
from cachedit_fx.functors.shipped import functor_for
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Mismatch, labelled_lines
from cachedit_fx.runtime.instances import instances_in
from cachedit_fx.runtime.model_call import current_call

log = logging.getLogger(__name__)

BUG = "bug"  # The kind of a reason that has already been reported.
IN_HOOK = "in the hook "  # Is part of Dynamo's reason if a forward hook of the user ends the graph.
_SEE = "See every verdict: cachedit_fx.explain(model, *inputs)"


@dataclass(frozen=True, slots=True)
class WhyUncached:
    """Why calls of a model run without the cache.

    Attributes:
        kind: For example "no-chain" or "in-parts". Reasons of the same kind are reported once for each model.
        reason: One line, for statistics.
        text: The message: what happened, what was expected, what was found, and what to do.
        cure: What to do, without a period; empty if only the message says so.
    """

    kind: str
    reason: str
    text: str
    cure: str = ""


class UncachedGraph:
    """A compiled graph that runs without the cache, and reports this to the running call of the model.

    Args:
        run: The compiled function.
        num_nodes: Number of nodes of the graph. The reason of the largest graph of a call is the reason of the call.
        why: Why it runs without the cache.
    """

    def __init__(self, run: Callable[..., Any], num_nodes: int, why: WhyUncached) -> None:
        self.run, self.num_nodes, self.why = run, num_nodes, why

    def __call__(self, *args: Any) -> Any:
        call = current_call()
        if call is not None:
            call.uncached_graphs.append(self)
        return self.run(*args)


def report_uncached(why: WhyUncached, config: CacheConfig, reported: set[str]) -> None:
    """Logs a warning if this kind of reason is new, or raises an error if the configuration asks for it.

    Args:
        reported: The kinds that have been reported for this model. This one is added.

    Raises:
        NoMatchError: `on_no_match` is "raise".
    """
    if why.kind == BUG:
        return
    if config.on_no_match == "raise":
        raise NoMatchError(why.text)
    if why.kind in reported:
        log.info("%s", why.text)
        return
    reported.add(why.kind)
    log.warning('%s\nMake this an error: options={"on_no_match": "raise"}', why.text)


# Model that was compiled with the bare backend -> kind -> reason.
_bare: Any = WeakIdKeyDictionary()


def report_bare(reasons: Sequence[Mismatch], config: CacheConfig, ended: GraphBreak | None = None) -> None:
    """Reports a graph of `torch.compile(model, backend="cachedit")` that runs without the cache.

    If Dynamo breaks a model up into several graphs, only the first of them is reported by a warning. The others are
    logged at INFO level.

    Args:
        reasons: At least one mismatch, the nearest one first.
        ended: Why Dynamo ended the graph before the model ends.

    Raises:
        NoMatchError: `on_no_match` is "raise".
    """
    captured, model = captured_module(), _called_model()
    model = model if model is not None else captured
    why = why_of(reasons, model)
    if ended is not None and reasons[0].cause is Cause.NO_CHAIN and why.kind == Cause.NO_CHAIN.value:
        why = _with_break(why, ended, type(model).__name__)
    if model is None:  # A function was compiled. Functions are distinguished by the text alone.
        report_uncached(replace(why, kind=why.text), config, _of_functions)
        return
    known: dict[str, str] = _bare.setdefault(model, {})
    is_whole = captured is model and not is_resumed()
    if is_whole:
        for instance in instances_in(model):
            instance.has_cached_graph = False
    reported = {*known} if is_whole or not known else {*known, why.kind}
    report_uncached(why, config, reported)
    known.setdefault(why.kind, why.reason)


def _with_break(why: WhyUncached, ended: GraphBreak, cls: str) -> WhyUncached:
    """The reason for a graph that has no chain, with the place at which Dynamo ended it."""
    cure = cure_of_parts(cls)
    *lines, _, see = why.text.splitlines()
    place = labelled_lines({"ends": f"Dynamo ended the graph at {ended}", "line": ended.line})
    text = "\n".join((*lines, *place, f"What to do: {cure}.", see))
    return replace(why, reason=f"{why.reason}; Dynamo ended the graph at {ended}", text=text, cure=cure)


_of_functions: set[str] = set()


def reasons_of_bare(model: nn.Module) -> list[str]:
    """Why graphs of a model that was compiled with the bare backend run without the cache, one line for each reason."""
    return [*_bare.get(getattr(model, "_orig_mod", model), {}).values()]


def _called_model() -> nn.Module | None:
    """The innermost model on the stack that `torch.compile` was called with; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _CALLS:
            found = frame.f_locals.get("self")
            if isinstance(found, OptimizedModule):
                return found._orig_mod
            if isinstance(found, nn.Module) and found._compiled_call_impl is not None:
                return found
        frame = frame.f_back
    return None


_CALLS = (nn.Module._wrapped_call_impl.__code__, OptimizedModule.__call__.__code__)


def why_of(reasons: Sequence[Mismatch], model: nn.Module | None) -> WhyUncached:
    """Why one graph runs without the cache.

    Args:
        reasons: At least one mismatch, the nearest one first.
        model: The model that the graph belongs to, if it is known.
    """
    nearest = reasons[0]
    if nearest.cause is Cause.NO_CHAIN and model is not None and has_sharded_layers(model):
        return why_sharded(model)
    fitted = f", {nearest.progress} of {nearest.total} blocks fit" if nearest.total else ""
    verdict = f"Nearest miss: {nearest.template}{fitted};" if nearest.template else "Reason:"
    what = f"this graph of {type(model).__name__}" if model is not None else "this graph"
    if nearest.cause is Cause.NO_TRANSFORMER:
        name = type(model).__name__ if model is not None else "It"
        verdict = (
            f"{name} has no chain of equal transformer blocks; cachedit_fx caches diffusion transformers. {verdict}"
        )
    text = "\n".join(
        (
            f"cachedit_fx: {what} runs without caching.",
            f"{verdict} {nearest.cause.value}:",
            *nearest.lines,
            f"What to do: {nearest.cure}.",
            _SEE,
        )
    )
    return WhyUncached(nearest.cause.value, nearest.reason, text, nearest.cure)


def why_call_uncached(
    module: nn.Module,
    graphs: Sequence[UncachedGraph],
    why_in_parts: str,
    limit_reached: int = 0,
    *,
    line: str = "",
    is_off: bool = False,
) -> WhyUncached:
    """Why a call of an enabled module ran none of its graphs with the cache.

    Args:
        graphs: The graphs that ran. One of them may have run several times.
        why_in_parts: The place and the reason of the first graph break; empty if Dynamo captured the module as one
            graph.
        limit_reached: Dynamo's recompile limit, if the call needed one graph more; otherwise 0.
        line: The line of code at which the first graph ends.
        is_off: Whether Dynamo is known to be turned off.
    """
    if limit_reached:
        return _why_past_limit(module, limit_reached)
    if graphs and not why_in_parts:
        return _with_forward_hooks(max(graphs, key=lambda graph: graph.num_nodes).why, module)
    if has_sharded_layers(module):
        return why_sharded(module)
    name, hooks = type(module).__name__, [] if is_off else hooks_of(module)
    stops = f" (the first graph ends at {why_in_parts})" if why_in_parts else ""
    if graphs:
        found = f"Dynamo captured {len({*graphs})} graphs instead of one{stops}"
        reason = f"Dynamo captured several graphs instead of one{stops}"  # The number may change from call to call.
    else:
        found = reason = f"Dynamo ran no graph of it{stops}"
    around = f"; there are hooks on its layers: {', '.join(hooks)}" if hooks else ""
    cure = _cure(name, hooks, why_in_parts)
    text = "\n".join(
        (
            f"cachedit_fx: {name} runs without caching.",
            "  expected: one graph that contains the whole loop over the blocks",
            f"  found:    {found}",
            *([f"  line:     {line}"] if line else []),
            *([f"  hooks:    {', '.join(hooks)} on its layers"] if hooks else []),
            f"What to do: {cure}.",
            _SEE,
        )
    )
    return WhyUncached("in-parts" if graphs else "no-graph", f"{reason}{around}", text, cure)


def why_not_without_hooks(module: nn.Module | None, found: str) -> WhyUncached:
    """Why a model whose hooks move its weights has to run with these hooks, and therefore without the cache.

    Args:
        found: What stands in the way.
    """
    name, hooks = type(module).__name__, hooks_of(module) if module is not None else []
    names = ", ".join(hooks)
    text = "\n".join(
        (
            f"cachedit_fx: {name} runs without caching.",
            "  expected: a forward that can be one graph if the hooks that move its weights are left out",
            f"  found:    {found}",
            f"  hooks:    {names} on its layers",
            "What to do: remove this obstacle, or use enable_model_cpu_offload(), which moves the model as a whole and "
            "keeps the cache.",
            _SEE,
        )
    )
    return WhyUncached("hooks", f"the hooks on its layers ({names}) cannot be left out of the graph: {found}", text)


def _cure(cls: str, hooks: Sequence[str], why_in_parts: str) -> str:
    if hooks:
        return (
            "remove the hooks from the layers, because Dynamo cannot capture layers with these hooks; to offload the "
            "model, use a mode whose hooks are known (docs/offloading.md)"
        )
    if IN_HOOK in why_in_parts:
        return "remove this hook, or write it so that Dynamo can capture it"
    if why_in_parts:
        return cure_of_parts(cls)
    return (
        "make sure that Dynamo is not turned off (TORCHDYNAMO_DISABLE, torch.compiler.set_stance) and that no "
        "recompile limit is reached (TORCH_LOGS=recompiles)"
    )


def cure_of_parts(cls: str) -> str:
    """How to get one graph of a transformer of this class, which Dynamo breaks up."""
    functor = functor_for(cls)
    if functor is None:
        return (
            "change the code at this place so that Dynamo can capture it, or write a patch functor that replaces it "
            "(docs/functors.md)"
        )
    name = functor.__name__
    return f"use {name}, which makes it one graph: enable_cache(BlockAdapter(..., patch_functor={name}()))"


def _with_forward_hooks(why: WhyUncached, module: nn.Module) -> WhyUncached:
    """The reason for a graph, with the forward hooks that are a part of it."""
    names = ", ".join(forward_hooks_of(module))
    if not names:
        return why
    *lines, see = why.text.splitlines()
    text = "\n".join((*lines, f"Note: the graph includes forward hooks of its layers: {names}.", see))
    return replace(why, reason=f"{why.reason}; the graph includes forward hooks of its layers: {names}", text=text)


def forward_hooks_of(module: nn.Module) -> dict[str, types.CodeType]:
    """The forward hooks that were registered on a module and its layers: their code by their names."""
    hooks = (
        hook for one in module.modules() for hook in (*one._forward_pre_hooks.values(), *one._forward_hooks.values())
    )
    found = {}
    for hook in hooks:
        function = inspect.unwrap(getattr(hook, "__func__", hook))
        if not isinstance(function, types.FunctionType):
            function = type(function).__call__  # An object that can be called.
        if isinstance(function, types.FunctionType):
            found[cut(function.__qualname__)] = function.__code__
    return found


def why_sharded(module: nn.Module) -> WhyUncached:
    """Why a module whose layers are sharded by FSDP2 runs without the cache."""
    reason = "fully_shard was applied to its layers, whose hooks torch runs outside of Dynamo's graphs"
    text = "\n".join(
        (
            f"cachedit_fx: {type(module).__name__} runs without caching.",
            "  expected: one graph that contains the whole loop over the blocks",
            f"  found:    {reason}",
            "What to do: apply fully_shard to the model as a whole only, or use context or tensor parallelism "
            "(docs/distributed.md).",
        )
    )
    return WhyUncached("sharded", reason, text)


def why_another_cache(module: nn.Module) -> WhyUncached:
    """Why a module runs without this package's cache while a cache of diffusers is enabled for it."""
    name = type(module).__name__
    reason = "a cache of diffusers is also enabled for it"
    cure = (
        "call disable_cache() of the model to use the cache of cachedit_fx, or cachedit_fx.disable_cache(model) to use "
        "the cache of diffusers"
    )
    text = "\n".join(
        (
            f"cachedit_fx: {name} runs without the cache of cachedit_fx, and is not compiled.",
            "  expected: one cache at a time",
            f"  found:    {reason}",
            f"What to do: {cure}.",
        )
    )
    return WhyUncached("another-cache", reason, text, cure)


def _why_past_limit(module: nn.Module, limit: int) -> WhyUncached:
    """Why a call runs without the cache after Dynamo has reached its recompile limit.

    Args:
        limit: Dynamo's `recompile_limit`.
    """
    name, hooks = type(module).__name__, hooks_of(module)
    graphs = f"{limit} graph{'s' * (limit != 1)}"
    reason = f"it needs another graph, but Dynamo compiles at most {graphs} for one function"
    around = f"; there are hooks on its layers: {', '.join(hooks)}" if hooks else ""
    cure = (
        "find out what differs from call to call (TORCH_LOGS=recompiles) and keep it the same, or raise "
        "torch._dynamo.config.recompile_limit before the first call"
    )
    if hooks:
        cure = (
            "remove the hooks from the layers, or keep the same ones registered from step to step; to offload the "
            "model, use a mode whose hooks are known (docs/offloading.md)"
        )
    text = "\n".join(
        (
            f"cachedit_fx: {name} runs without caching if a call needs another graph.",
            f"  expected: at most {graphs} for one function (Dynamo's recompile_limit)",
            "  found:    a call that fits none of the compiled graphs, after the limit was reached",
            *([f"  hooks:    {', '.join(hooks)} on its layers"] if hooks else []),
            f"What to do: {cure}.",
        )
    )
    return WhyUncached("limit", f"{reason}{around}", text, cure)


def why_not_counted(module: nn.Module, method: str) -> WhyUncached:
    """Why a call of a method runs without the cache if another method is cached."""
    name = type(module).__name__
    text = "\n".join(
        (
            f"cachedit_fx: {name}.{method} runs without caching, and is not compiled.",
            "  expected: calls of the model itself: model(...)",
            f"  found:    a call of {method}, which runs the blocks without calling the model",
            f'What to do: use enable_cache(model, method="{method}") to cache this method instead of model(...).',
        )
    )
    reason = f"{method} was called, which runs the blocks without calling the model"
    return WhyUncached(f"method {method}", reason, text)
