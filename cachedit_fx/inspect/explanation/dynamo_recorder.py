"""A backend that runs the passes on every graph, records the results, and compiles nothing."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cachedit_fx.config.cache_config import split_options
from cachedit_fx.frontend.backend import Backend, refusal
from cachedit_fx.frontend.capture import captured_module, copy_graph, forget_examples
from cachedit_fx.frontend.capture_strategies import CaptureStrategy
from cachedit_fx.frontend.graph_break import break_after
from cachedit_fx.frontend.inner_compiler import runs_as_is
from cachedit_fx.frontend.torch_internals import get_code_state
from cachedit_fx.frontend.uncached import UncachedGraph, why_of
from cachedit_fx.inspect.explanation.build import build_report
from cachedit_fx.inspect.explanation.data import BreakReport, GraphReport
from cachedit_fx.inspect.explanation.risks import risks_of
from cachedit_fx.inspect.explanation.trace import Trace
from cachedit_fx.passes.manager import rewrite


class Stop(Exception):
    """Stops a module that was captured whole before it runs."""


@dataclass
class RecordedGraph:
    """The report of one graph, and its graphs by the names that `Explanation.graph` takes."""

    report: GraphReport
    graphs: dict[str, fx.GraphModule]


class DynamoRecorder(Backend):
    """The backend with which `explain` compiles a module.

    Attributes:
        recorded: The graphs that the last capture strategy captured.
        uncached: Those of them that cannot be cached, with the reasons.
        strategy: The current capture strategy. If it captures the module as one graph, the module does not run: `Stop`
            is raised instead.
    """

    def __init__(self, like: Backend, arguments: Collection[str]) -> None:
        self.__dict__.update(like.__dict__)
        self._arguments = arguments
        self.recorded: list[RecordedGraph] = []
        self.uncached: list[UncachedGraph] = []
        self.strategy = CaptureStrategy(whole=True, captures_data=False)

    # Equal backends share compiled graphs, and the graphs of this backend must not be shared. `object.__eq__` would
    # leave the comparison to `Backend.__eq__` of the other one.
    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def begin(self, strategy: CaptureStrategy) -> None:
        """Begins a capture strategy, and discards what an earlier one captured."""
        self.strategy = strategy
        self.recorded.clear()
        self.uncached.clear()

    def capturing(self, *, data: bool) -> DynamoRecorder:
        return self  # All capture strategies share one recorder.

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        config, _ = split_options(options or {}, self.config)
        copied, trace, module = copy_graph(gm, example_inputs), Trace(), captured_module()
        planned = rewrite(copied, config, self.declared, exact=runs_as_is(config.inner_backend), observer=trace)
        reasons = refusal()
        if reasons:
            trace.refused(reasons)
        mismatches = reasons or (planned if isinstance(planned, tuple) else ())
        if mismatches:
            self.uncached.append(UncachedGraph(gm.forward, len(gm.graph.nodes), why_of(mismatches, module)))
        report = build_report(
            copied,
            trace,
            config,
            self.declared,
            cls=type(module).__name__ if module is not None else "",
            number=len(self.recorded),
            break_after=_break_report(gm),
        )
        forget_examples(copied, *(piece.gm for piece in trace.piece_list))
        self.recorded.append(RecordedGraph(report, trace.graphs()))
        return _stop if self.strategy.whole else gm.forward

    def add_risks(self, guards: Sequence[Any]) -> list[bool]:
        """Adds the arguments that the last graph is specialized on to its report.

        This is Dynamo's `guard_filter_fn`; it keeps all guards.
        """
        if self.recorded:
            last = self.recorded[-1]
            last.report = replace(last.report, risks=risks_of(guards, self._arguments))
        return [True] * len(guards)


def _stop(*_: Any) -> Any:
    raise Stop


def _break_report(gm: fx.GraphModule) -> BreakReport | None:
    """Returns why Dynamo ended the graph; None if it is the end of a function."""
    found = break_after(gm)
    return None if found is None else BreakReport(found.reason, found.where, found.line)


@contextlib.contextmanager
def forgotten_sizes() -> Iterator[None]:
    """Discards the sizes that Dynamo observes inside; it would treat them as dynamic in the user's next call."""
    state = get_code_state()
    before = copy.deepcopy(dict(state))
    try:
        yield
    finally:
        state.clear()
        state.update(before)


def isolated() -> dict[str, Any]:
    """Returns arguments of `torch.compile` that separate its cache entries from the user's, if torch has them."""
    return {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
