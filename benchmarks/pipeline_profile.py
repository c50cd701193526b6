"""Where the time of a call of cachedit_fx goes: the compiled pieces, and the parts of Python around them."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from benchmarks.pipeline_variants import Ours
from cachedit_fx.runtime.cached_call import Run
from cachedit_fx.runtime.step import StepRun

Milliseconds = dict[str, float]
GENERATIONS = 3
OUTSIDE = "around fast dispatch: the arguments, the check of the region's modules and weights, counting"
PARTS = {
    "_bind": "binding the arguments",
    "_check_first": "guards outside of the region",
    "_check_all": "all guards",
    "_fetch_early": "fetching the inputs of head, reuse branch and tail",
    "_fetch_late": "fetching the other inputs",
    "_front": "Python between the pieces",
    "_reuse": "Python between the pieces",
    "_compute": "Python between the pieces",
    "_rebuild": "making the return value",
}
TOTAL = "a call"
HEAD, REUSE, COMPUTE, TAIL = (f"pieces: {name}" for name in ("head", "reuse branch", "compute branch", "tail"))


class Timers:
    """The CPU time inside of each part, without the parts that it calls.

    Attributes:
        calls: The milliseconds by part, for each call of a transformer.
    """

    def __init__(self) -> None:
        self.calls: list[Milliseconds] = []
        self._inner = [0.0]  # The time inside of other parts, for each part that is running.

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - begin
                self.calls[-1][name] += 1e3 * (took - self._inner.pop())
                self._inner[-1] += took

        return timed

    def call(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Like `part`, but each call begins another entry."""
        timed = self.part(name, function)

        def begin(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(defaultdict(float))
            return timed(*args, **kwargs)

        return begin


def profile_steps(variant: Ours, run: Callable[[], Any], reference: Callable[[], Any]) -> dict[str, Any]:
    """Returns the median milliseconds of each part of a call, for reused and for computed calls.

    Args:
        run: Runs a generation of the variant.
        reference: Runs a generation of the reference, so that both alternate as in the measurement.
    """
    timers = Timers()
    for _ in range(GENERATIONS):
        reference()
        with _timed(variant, timers):
            run()
    served = [call for call in timers.calls if HEAD in call]
    kinds = {
        "reused": [call for call in served if REUSE in call],
        "computed": [call for call in served if REUSE not in call],
    }
    return {"served": len(served), "calls": len(timers.calls)} | {
        kind: _medians(calls) for kind, calls in kinds.items()
    }


def _medians(calls: list[Milliseconds]) -> Milliseconds:
    names = dict.fromkeys((*PARTS.values(), *(name for call in calls for name in call)))
    found = {name: statistics.median(call.get(name, 0.0) for call in calls) for name in names} if calls else {}
    total = statistics.median(sum(call.values()) for call in calls) if calls else 0.0
    return {name: round(value, 4) for name, value in found.items() if value} | {TOTAL: round(total, 4)}


@contextmanager
def _timed(variant: Ours, timers: Timers) -> Iterator[None]:
    """Puts timers into the calls of the transformers of a variant."""
    with ExitStack() as stack:

        def put(owner: Any, attribute: str, name: str, wrap: Any = timers.part) -> None:
            stack.enter_context(mock.patch.object(owner, attribute, wrap(name, getattr(owner, attribute))))

        put(Run, "commit", "committing the step")
        put(StepRun, "decide", "the decision, which reads the probe")
        for module in variant.modules:
            enabled = module._compiled_call_impl
            put(enabled, "_serve", OUTSIDE, timers.call)
            for fast_call in enabled.fast_dispatch._fast_calls:
                put(fast_call.cached_call, "begin", "looking up the session")
                for owner, attribute, name in _pieces(fast_call):
                    put(owner, attribute, name)
                for attribute, name in PARTS.items():
                    put(fast_call, attribute, name)
        yield


def _pieces(fast_call: Any) -> Iterator[tuple[Any, str, str]]:
    """Yields where each compiled piece is stored, and its name."""
    parts = {name: getattr(fast_call, name).__self__ for name in ("_front", "_reuse", "_compute")}
    held = {
        part: {str(node.target): getattr(gm, node.target) for node in gm.graph.nodes if node.op == "call_module"}
        for part, gm in parts.items()
    }
    for part, pieces in held.items():
        for attribute, piece in pieces.items():
            is_tail = part != "_front" and piece in held["_reuse"].values() and piece in held["_compute"].values()
            name = TAIL if is_tail else {"_front": HEAD, "_reuse": REUSE, "_compute": COMPUTE}[part]
            yield parts[part], attribute, name
