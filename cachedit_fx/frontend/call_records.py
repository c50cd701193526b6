"""Records the fast calls of a module, and restores them in another process, where Dynamo does not trace the module.

A record is made by tracing the module once more, with tensors of the recorded kinds. The trace is not compiled.
Restoring it compiles the pieces, for which the inner backend uses its own caches, and makes the guards again
(`guard_records.py`). Weights are found as in every fast call, by the expressions of Dynamo.
"""

from __future__ import annotations

import logging
import threading
import types
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cachedit_fx.errors import cut
from cachedit_fx.forking import released_in_child
from cachedit_fx.frontend.argument_records import ArgumentRecord
from cachedit_fx.frontend.backend import Backend, compile_pieces
from cachedit_fx.frontend.capture import copy_graph
from cachedit_fx.frontend.capture_strategies import CaptureStrategies, signature_of
from cachedit_fx.frontend.fast_dispatch import FastCall, FastDispatcher, OutputMap
from cachedit_fx.frontend.graph_records import CachedGraphRecord, NotSavedError, codes_of
from cachedit_fx.frontend.guard_records import GuardRecord, Tracer, complete_record, restore_guards
from cachedit_fx.frontend.inner_compiler import InnerCompiler
from cachedit_fx.frontend.input_fetcher import Binder, Fetch, path_of
from cachedit_fx.frontend.repeated_blocks import traced_once
from cachedit_fx.frontend.settings import Settings
from cachedit_fx.passes.analysis.runtime_plan import RuntimePlan
from cachedit_fx.passes.manager import Rewritten, rewrite
from cachedit_fx.passes.transforms.flatten import flatten
from cachedit_fx.patterns.pattern_registry import templates
from cachedit_fx.runtime.cached_call import CachedCall
from cachedit_fx.runtime.sources import Sources

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One fast call.

    Attributes:
        signature: That of the calls that it may serve (`signature_of`).
        expressions: Where the inputs of the graph are found.
    """

    signature: Hashable
    guards: GuardRecord
    graph: CachedGraphRecord
    plan: RuntimePlan
    expressions: tuple[str, ...]
    outputs: OutputMap


@dataclass(frozen=True, slots=True)
class ModuleCalls:
    """The fast calls of one module.

    Attributes:
        settings: What determines the graphs besides the code, as `settings_key` returns it.
        weights: As `weights_key` returns it.
    """

    settings: tuple[Any, ...]
    weights: dict[str, str]
    calls: tuple[CallRecord, ...]


def settings_key(settings: Settings) -> tuple[Any, ...]:
    """What determines the graphs of a module besides its code and its inputs, as values that can be pickled."""
    backend = settings.backend()
    return (backend.owner, backend.inner_options, settings.dynamo_arguments, settings.method, templates())


def weights_key(module: nn.Module) -> dict[str, str]:
    """The shape, dtype and device of every weight of a module, as text, by name."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: f"{[*value.shape]} {value.dtype} {value.device}" for name, value in named}


def record_calls(
    module: nn.Module, settings: Settings, dispatcher: FastDispatcher, captured: CaptureStrategies
) -> ModuleCalls:
    """The records of all graphs that the module has used.

    Raises:
        NotSavedError: One of them cannot be recorded. Then none is, because Dynamo treats sizes as dynamic only if it
            has compiled other sizes in the same process.
    """
    calls, missing = dispatcher.fast_calls, dispatcher.why_not_all
    if missing:
        raise NotSavedError(missing)
    if settings.functor is not None:
        raise NotSavedError("it has a patch functor, which may change the module")
    records = tuple(_record_call(module, settings, call, captured) for call in calls)
    return ModuleCalls(settings_key(settings), weights_key(module), records)


def _record_call(module: nn.Module, settings: Settings, call: FastCall, captured: CaptureStrategies) -> CallRecord:
    if call.given is None:
        raise NotSavedError("an argument of its calls is neither a tensor nor a constant")
    backend = settings.backend()
    if _compiler_of(backend).owns_buffers:
        raise NotSavedError("it uses CUDA graphs, for which inputs are marked in Dynamo's trace")
    found: list[CachedGraphRecord] = []
    plans: list[RuntimePlan] = []

    def compile_graph(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> None:
        planned = rewrite(
            copy_graph(gm, example_inputs), backend.config, backend.declared, exact=_compiler_of(backend).is_exact
        )
        if not isinstance(planned, Rewritten) or [*codes_of(planned.gm)] != [*codes_of(call.cached_call.graph)]:
            raise NotSavedError("Dynamo captures another graph now than at the call")
        if any(not isinstance(weight, int) for weight in planned.runtime_plan.weights):
            raise NotSavedError("its graph holds weights")
        found.append(CachedGraphRecord.of(planned.gm, planned.pieces))
        plans.append(planned.runtime_plan)

    args, kwargs = call.given.make()
    function = call.function
    with call.given.context(), captured.settings(), traced_once(module):  # As at the call.
        guards = Tracer(compile_graph)(
            function, (module, *args), kwargs, dynamic=settings.dynamo_arguments.get("dynamic")
        )
        frame = Binder(function)((module, *args), kwargs)
        guards = complete_record(guards, function, frame or {})
    return CallRecord(
        signature_of(args, kwargs), guards, found[0], plans[0], call.cached_call.sources.expressions, call.outputs
    )


class SavedCalls:
    """The saved fast calls of one module, until they are restored.

    Each one is restored at the first call with its signature. If that is impossible, a warning states the reason, and
    Dynamo compiles the module.
    """

    def __init__(self, records: Sequence[CallRecord]) -> None:
        self._records = {record.signature: record for record in records}
        self._lock = released_in_child(threading.Lock())

    def restore(
        self,
        module: nn.Module,
        backend: Backend,
        dispatcher: FastDispatcher,
        given: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> CachedCall | None:
        """Makes the dispatcher serve calls like the given one. Returns the graph; None if there is none for them."""
        if not self._records:
            return None
        signature = signature_of(*given)
        with self._lock:  # Other threads wait, and then find that the graph was restored.
            record = self._records.pop(signature, None)
            if record is None:
                return None
            try:
                call = _restore(record, module, backend, given)
            except Exception as error:
                _warn_not_restored(module, error)
                self._records.clear()  # Dynamo has to see all sizes.
                return None
            dispatcher.add(call)
            return call.cached_call


def _restore(
    record: CallRecord, module: nn.Module, backend: Backend, given: tuple[tuple[Any, ...], dict[str, Any]]
) -> FastCall:
    function = getattr(module.forward, "__func__", None)
    if not isinstance(function, types.FunctionType):
        raise NotSavedError("its forward is not a plain method")
    frame = Binder(function)((module, *given[0]), given[1]) or {}
    guards = restore_guards(record.guards, function, frame)
    paths = [path_of(expression) for expression in record.expressions]
    Fetch(paths, function.__globals__)(frame)
    compiler = _compiler_of(backend)
    gm, pieces = record.graph.load()
    compile_pieces(compiler, pieces, type(module).__name__)
    cached_call = CachedCall(
        gm, backend.owner, backend.config, record.plan, policy_per_call=True, inner=compiler,
        sources=Sources(record.expressions),
    )  # fmt: skip
    flat = flatten(gm)
    assert flat is not None  # It was flat when it was saved.
    recorded = ArgumentRecord.of(*given)
    return FastCall(cached_call, flat, guards, function, paths, record.outputs, given=recorded)


def _compiler_of(backend: Backend) -> InnerCompiler:
    return InnerCompiler(backend.config, backend.mode, backend.inner_options)


def _warn_not_restored(module: nn.Module, error: Exception) -> None:
    why = str(error) if isinstance(error, NotSavedError) else f"{type(error).__name__}: {error}"
    log.warning(
        "cachedit_fx: the saved graphs of this %s are not used, so it is compiled.\n"
        "  found: %s\n"
        "What to do: call cachedit_fx.save_compiled again where this module runs.",
        type(module).__name__,
        cut(why, 160),
        exc_info=log.isEnabledFor(logging.DEBUG),
    )
