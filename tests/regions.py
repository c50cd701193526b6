"""A plain-Python reference of any number of regions, each with a decision of its own.

It shares no code with what it stands for: it replaces the `forward` of every block that it is told of and runs the
model eagerly, one generation and one guidance branch at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor, nn

from cachedit_fx import CacheStats

Decide = Callable[[int, float | None], bool]


def relative_l1(now: Tensor, before: Tensor) -> float:
    """mean|now - before| / mean|before|, in float32."""
    now, before = now.float(), before.float()
    return ((now - before).abs().mean() / before.abs().mean()).item()


def threshold(limit: float, *, warmup: int = 1) -> Decide:
    """Computes the first steps, and later ones whose diff is not below `limit`."""
    return lambda step, diff: step < warmup or diff is None or not diff < limit


def at_steps(computed: Sequence[int]) -> Decide:
    """Computes these steps, whatever the diff."""
    return lambda step, _diff: step in computed


@dataclass
class Span:
    """Blocks that are run or skipped together.

    Attributes:
        blocks: In execution order; each returns the streams that it took.
        returns: Names of what a block returns, in order; they are parameters of it too.
        decide: Step and diff -> whether to compute. The diff is None as long as nothing was computed.
        since: The block whose input is taken off what is looked at; None to look at the input of the span as it is.
        reused: Whether each step so far was reused.
        diffs: What was looked at against that of the last computed step; None at the first.
    """

    blocks: Sequence[nn.Module]
    returns: tuple[str, ...]
    decide: Decide
    since: nn.Module | None = None
    reused: list[bool] = field(default_factory=list)
    diffs: list[float | None] = field(default_factory=list)
    last_probe: Tensor | None = None
    entered: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)
    start: Tensor | None = None

    def enter(self, streams: dict[str, Tensor]) -> None:
        """Decides about this step."""
        probe = streams["hidden_states"]
        if self.since is not None:
            assert self.start is not None
            probe = probe - self.start
        diff = None if self.last_probe is None else relative_l1(probe, self.last_probe)
        computes = self.decide(len(self.reused), diff)
        self.reused.append(not computes)
        self.diffs.append(diff)
        self.entered = streams
        if computes:
            self.last_probe = probe.clone()

    @property
    def cached_steps(self) -> list[int]:
        return [step for step, reused in enumerate(self.reused) if reused]


@contextmanager
def cached(*spans: Span) -> Iterator[None]:
    """Lets the blocks of `spans` be skipped as they decide, until the block is left."""
    originals: list[nn.Module] = []
    try:
        for span in spans:
            for block in dict.fromkeys((*span.blocks, *filter(None, (span.since,)))):
                block.forward = _around(span, block, block.forward)
                originals.append(block)
        yield
    finally:
        for block in originals:
            block.__dict__.pop("forward", None)  # The class's own shows again.


def _around(span: Span, block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        streams = {name: given[name] for name in span.returns}
        if block is span.since:
            span.start = streams["hidden_states"]
        if block is span.blocks[0]:
            span.enter(streams)
        if all(block is not own for own in span.blocks):
            return original(*args, **kwargs)
        is_last = block is span.blocks[-1]
        if not span.reused[-1]:
            result = original(*args, **kwargs)
            if is_last:
                left = dict(zip(span.returns, result if isinstance(result, tuple) else (result,), strict=True))
                span.residuals = {name: left[name] - span.entered[name] for name in span.returns}
            return result
        if is_last:
            streams = {name: stream + span.residuals[name] for name, stream in span.entered.items()}
        return tuple(streams[name] for name in span.returns) if len(span.returns) > 1 else streams[span.returns[0]]

    forward.__signature__ = signature  # type: ignore[attr-defined]  # A block may be wrapped twice.
    return forward


def runs(model: nn.Module, spans: Sequence[Span], calls: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The outputs of one generation: the model called with each of `calls` in turn, cached by `spans`."""
    with cached(*spans):
        return [type(model).forward(model, **call)[0] for call in calls]


def assert_diffs(stats: CacheStats, span: Span, skipped: Sequence[int] = (0,)) -> None:
    """The same was looked at, at every step but those that were not."""
    diffs = {step: diff for step, diff in enumerate(span.diffs) if step not in skipped}
    # Means over a few hundred float32; one is divided by the other in float32 here and in float64 there.
    assert stats.residual_diffs == pytest.approx(diffs, rel=1e-5)
