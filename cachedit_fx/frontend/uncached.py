"""Why a model runs without the cache: as a record, as a warning, or as an error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import NoMatchError, cut
from cachedit_fx.frontend.capture import captured_module, is_resumed
from cachedit_fx.functors.shipped import functor_for
from cachedit_fx.patterns.mismatch import Mismatch
from cachedit_fx.runtime.instances import instances_in
from cachedit_fx.runtime.session import current_call

log = logging.getLogger(__name__)

BUG = "bug"  # The kind that was reported where it happened.
_SEE = "See every verdict: cachedit_fx.explain(model, *inputs)"


@dataclass(frozen=True, slots=True)
class WhyUncached:
    """Why calls of a model run without the cache.

    Attributes:
        kind: Equal for reasons that a user is told of once: `no-chain`, `in-parts`.
        reason: A sentence, for statistics.
        text: What a user reads: what happened, what was expected and found, and what to do.
    """

    kind: str
    reason: str
    text: str


class UncachedGraph:
    """A graph that runs without the cache, and tells the call of the model that it does.

    Args:
        run: What it was compiled to.
        num_nodes: Its size: the largest graph of a call speaks for the call.
    """

    def __init__(self, run: Callable[..., Any], num_nodes: int, why: WhyUncached) -> None:
        self.run, self.num_nodes, self.why = run, num_nodes, why

    def __call__(self, *args: Any) -> Any:
        call = current_call()
        if call is not None:
            call.uncached_graphs.append(self)
        return self.run(*args)


def report_uncached(why: WhyUncached, config: CacheConfig, told: set[str]) -> None:
    """Warns of every kind of reason once, or raises if that is asked for.

    Args:
        told: The kinds that were told of this model before; this one is added.

    Raises:
        NoMatchError: `on_no_match` is "raise".
    """
    if why.kind == BUG:
        return
    if config.on_no_match == "raise":
        raise NoMatchError(why.text)
    if why.kind in told:
        log.info("%s", why.text)
        return
    told.add(why.kind)
    log.warning('%s\nMake this an error: options={"on_no_match": "raise"}', why.text)


# Of the models that torch.compile was given, by the bare backend: kind -> reason.
_bare: Any = WeakIdKeyDictionary()


def report_bare(reasons: Sequence[Mismatch], config: CacheConfig) -> None:
    """Reports a graph of `torch.compile(model, backend="cachedit")` that runs without the cache.

    Where Dynamo breaks a model up into graphs, the first of them speaks for all: its other graphs are logged as
    information, whatever keeps them from being cached.

    Raises:
        NoMatchError: `on_no_match` is "raise".
    """
    captured, model = captured_module(), _called_model()
    model = model if model is not None else captured
    why = why_of(reasons, model)
    if model is None:  # A function: only the text tells it from others.
        report_uncached(replace(why, kind=why.text), config, _of_functions)
        return
    known: dict[str, str] = _bare.setdefault(model, {})
    is_whole = captured is model and not is_resumed()
    if is_whole:
        for instance in instances_in(model):
            instance.has_cached_graph = False
    told = {*known} if is_whole or not known else {*known, why.kind}
    report_uncached(why, config, told)
    known.setdefault(why.kind, why.reason)


_of_functions: set[str] = set()


def reasons_of_bare(model: nn.Module) -> list[str]:
    """Why graphs of a model that the bare backend compiled run without the cache, a sentence each."""
    return [*_bare.get(getattr(model, "_orig_mod", model), {}).values()]


def _called_model() -> nn.Module | None:
    """The model in whose call Dynamo is compiling: the innermost one above that `torch.compile` was given."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _CALLS:
            found = frame.f_locals.get("self")
            if isinstance(found, torch._dynamo.OptimizedModule):
                return found._orig_mod
            if isinstance(found, nn.Module) and found._compiled_call_impl is not None:
                return found
        frame = frame.f_back
    return None


_CALLS = (nn.Module._wrapped_call_impl.__code__, torch._dynamo.OptimizedModule.__call__.__code__)


def why_of(reasons: Sequence[Mismatch], model: nn.Module | None) -> WhyUncached:
    """Why one graph runs without the cache.

    Args:
        reasons: Nearest miss first.
        model: Whose graph it is, if that is known.
    """
    nearest = reasons[0]
    fitted = f", {nearest.progress} of {nearest.total} blocks fit" if nearest.total else ""
    verdict = f"Nearest miss: {nearest.template}{fitted};" if nearest.template else "Reason:"
    what = f"this graph of {type(model).__name__}" if model is not None else "this graph"
    text = "\n".join(
        (
            f"cachedit_fx: {what} runs without caching.",
            f"{verdict} {nearest.cause.value}:",
            *nearest.lines,
            f"What to do: {nearest.cure}.",
            _SEE,
        )
    )
    return WhyUncached(nearest.cause.value, f"{nearest.cause.value}: {nearest.detail}", text)


def why_call_uncached(module: nn.Module, graphs: Sequence[UncachedGraph], why_in_parts: str) -> WhyUncached:
    """Why a call of an enabled module ran none of its graphs with the cache.

    Args:
        graphs: The graphs that ran; one may have run several times.
        why_in_parts: What Dynamo said where it could not capture the module whole; empty where it could.
    """
    if graphs and not why_in_parts:
        return max(graphs, key=lambda graph: graph.num_nodes).why
    name, hooks = type(module).__name__, hooks_of(module)
    stops = f" (it stops at {why_in_parts})" if why_in_parts else ""
    count = len({*graphs})
    found = f"Dynamo captures it only in {count} graphs{stops}" if graphs else f"Dynamo ran no graph of it{stops}"
    reason = found.replace(f"{count} graphs", "parts")  # Their number may change from call to call.
    around = f"; there are hooks around its layers: {', '.join(hooks)}" if hooks else ""
    text = "\n".join(
        (
            f"cachedit_fx: {name} runs without caching.",
            "  expected: its loop over the blocks whole in one graph",
            f"  found:    {found}",
            *([f"  hooks:    {', '.join(hooks)} around its layers"] if hooks else []),
            f"What to do: {_cure(name, hooks, why_in_parts)}.",
            _SEE,
        )
    )
    return WhyUncached("in-parts" if graphs else "no-graph", f"{reason}{around}", text)


def _cure(cls: str, hooks: Sequence[str], why_in_parts: str) -> str:
    if hooks:
        return (
            "take the hooks off the layers, which Dynamo does not capture with them; to offload, "
            "enable_model_cpu_offload() moves the model as a whole, and leaves it cached"
        )
    if why_in_parts:
        return cure_of_parts(cls)
    return (
        "see that nothing turns Dynamo off (TORCHDYNAMO_DISABLE, torch.compiler.set_stance) and that no limit is "
        "reached (TORCH_LOGS=recompiles)"
    )


def cure_of_parts(cls: str) -> str:
    """What makes one graph of a transformer of this class that Dynamo breaks up."""
    functor = functor_for(cls)
    if functor is None:
        return "a patch functor that replaces what stands there helps (docs/functors.md)"
    name = functor.__name__
    return f"{name} makes it one graph: enable_cache(BlockAdapter(..., patch_functor={name}()))"


def hooks_of(module: nn.Module) -> list[str]:
    """Hooks of accelerate and diffusers around the module and its layers: `AlignDevicesHook`, `layerwise_casting`."""
    found: dict[str, None] = {}
    for inner in module.modules():
        held = vars(inner)
        if "_hf_hook" in held:
            found[type(held["_hf_hook"]).__name__] = None
        names = getattr(held.get("_diffusers_hook"), "hooks", {})
        found |= dict.fromkeys(cut(name) for name in names if name != "cachedit_fx")
    return [*found]


def why_another_cache(module: nn.Module) -> WhyUncached:
    """Why a module runs without our cache while one of diffusers is enabled for it."""
    name = type(module).__name__
    reason = "a cache of diffusers is enabled for it as well"
    text = "\n".join(
        (
            f"cachedit_fx: {name} runs without caching by cachedit_fx, and is not compiled.",
            "  expected: one cache at a time",
            f"  found:    {reason}",
            "What to do: call its disable_cache() to go on with this one, or cachedit_fx.disable_cache(model) to keep "
            "the other.",
        )
    )
    return WhyUncached("another-cache", reason, text)


def why_past_limit(module: nn.Module, limit: int) -> WhyUncached:
    """Why a call runs without the cache that no graph fits, where Dynamo compiles no more of them."""
    name, hooks = type(module).__name__, hooks_of(module)
    reason = f"it needs another graph, and Dynamo compiles at most {limit} of one function"
    around = f"; there are hooks around its layers: {', '.join(hooks)}" if hooks else ""
    cure = (
        "see what differs from call to call (TORCH_LOGS=recompiles) and keep it the same; or raise "
        "torch._dynamo.config.recompile_limit before the first call"
    )
    if hooks:
        cure = (
            "take the hooks off the layers, or let the same ones stay registered from step to step; to offload, "
            "enable_model_cpu_offload() moves the model as a whole, and leaves it cached"
        )
    text = "\n".join(
        (
            f"cachedit_fx: {name} runs without caching where a call needs another graph.",
            f"  expected: at most {limit} graph{'s' * (limit != 1)} of one function (Dynamo's recompile_limit)",
            "  found:    a call that none of them fits, where Dynamo compiles no more",
            *([f"  hooks:    {', '.join(hooks)} around its layers"] if hooks else []),
            f"What to do: {cure}.",
        )
    )
    return WhyUncached("limit", f"{reason}{around}", text)


def why_not_counted(module: nn.Module, method: str) -> WhyUncached:
    """Why a call of another method than the one that is cached runs without the cache."""
    name = type(module).__name__
    text = "\n".join(
        (
            f"cachedit_fx: {name}.{method} runs without caching, and is not compiled.",
            "  expected: calls of the model itself, as in model(...)",
            f"  found:    a call of {method}, which runs the blocks without one",
            f'What to do: enable_cache(model, method="{method}") caches this method in place of the model\'s own call.',
        )
    )
    return WhyUncached(f"method {method}", f"{method} was called, which runs the blocks without model(...)", text)
