"""Skips blocks by hand whose streams are parameters of their forwards, and a reference of several regions.

It shares no code with `cachedit_fx`: it replaces the `forward` of every block of a region and runs the model eagerly.
`Span` makes the decisions of a region with a function, for one generation and one guidance branch;
`tests.reference.ReferenceCache` implements the whole policy, for several generations and guidance branches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
from torch import Tensor, nn

from cachedit_fx.inspect import CacheStats

Streams = dict[str, Tensor]
Decide = Callable[[int, float | None], bool]


class Region(Protocol):
    """Blocks that run or are skipped together.

    Attributes:
        since: The block whose input is subtracted from the probe; None to probe the input of the region itself.
    """

    since: nn.Module | None

    def chain(self) -> Sequence[tuple[nn.Module, tuple[str, ...]]]:
        """The blocks in execution order, each with the names of what it returns, in order. It takes the same names."""

    def reuses(self, streams: Streams, probe: Tensor) -> bool:
        """Whether this step skips the blocks. Called once per step with the streams that enter the first block."""

    def note(self, entered: Streams, left: Streams) -> None:
        """Records the streams before and after the blocks at a computed step."""

    def supply(self, entered: Streams) -> Streams:
        """The streams after the blocks at a reused step."""


def relative_l1(now: Tensor, before: Tensor) -> float:
    """mean|now - before| / mean|before|, in float32."""
    now, before = now.float(), before.float()
    return ((now - before).abs().mean() / before.abs().mean()).item()


def threshold(limit: float, *, warmup: int = 1) -> Decide:
    """Computes the warm-up steps and later steps whose diff is not below `limit`."""
    return lambda step, diff: step < warmup or diff is None or not diff < limit


def at_steps(computed: Sequence[int]) -> Decide:
    """Computes the given steps regardless of the diff."""
    return lambda step, _diff: step in computed


@dataclass
class Span:
    """A region whose decisions a function makes.

    Attributes:
        blocks: In execution order; each returns the streams that it took.
        returns: Names of what a block returns, in order. They are also parameters of the block.
        decide: Step and residual diff -> whether to compute. The diff is None before the first computed step.
        since: As in `Region`.
        reused: For each step so far whether it was reused.
        diffs: For each step the residual diff; None at the first.
    """

    blocks: Sequence[nn.Module]
    returns: tuple[str, ...]
    decide: Decide
    since: nn.Module | None = None
    reused: list[bool] = field(default_factory=list)
    diffs: list[float | None] = field(default_factory=list)
    last_probe: Tensor | None = None
    residuals: Streams = field(default_factory=dict)

    def chain(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        return [(block, self.returns) for block in self.blocks]

    def reuses(self, streams: Streams, probe: Tensor) -> bool:
        diff = None if self.last_probe is None else relative_l1(probe, self.last_probe)
        computes = self.decide(len(self.reused), diff)
        self.reused.append(not computes)
        self.diffs.append(diff)
        if computes:
            self.last_probe = probe.clone()
        return not computes

    def note(self, entered: Streams, left: Streams) -> None:
        self.residuals = {name: left[name] - entered[name] for name in left}

    def supply(self, entered: Streams) -> Streams:
        return {name: stream + self.residuals[name] for name, stream in entered.items()}

    @property
    def cached_steps(self) -> list[int]:
        return [step for step, reused in enumerate(self.reused) if reused]


@contextmanager
def cached(*regions: Region) -> Iterator[None]:
    """Inside the context the blocks of `regions` are skipped according to the regions' decisions."""
    originals: list[nn.Module] = []
    try:
        for region in regions:
            stand_in = _StandIn(region)
            for block in stand_in.blocks:
                block.forward = stand_in.around(block)
                originals.append(block)
        yield
    finally:
        for block in originals:
            block.__dict__.pop("forward", None)  # Restores the class's forward.


class _StandIn:
    """Replacements of the forwards of a region's blocks and of the block `since`."""

    def __init__(self, region: Region) -> None:
        self.region, self.names = region, dict(region.chain())
        self.first, *_ = self.names
        *_, self.last = self.names
        self.blocks = dict.fromkeys((*self.names, *filter(None, (region.since,))))

    def around(self, block: nn.Module) -> Callable[..., Any]:
        original, signature = block.forward, inspect.signature(block.forward)
        names = self.names.get(block, ("hidden_states",))

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            streams = {name: given[name] for name in names}
            if block is self.region.since:
                self.start = streams["hidden_states"]
            if block is self.first:
                hidden, self.entered = streams["hidden_states"], streams
                self.is_reused = self.region.reuses(
                    streams, hidden if self.region.since is None else hidden - self.start
                )
            if block in self.names and self.is_reused:
                streams = self.region.supply(self.entered) if block is self.last else streams
                return tuple(streams[name] for name in names) if len(names) > 1 else streams[names[0]]
            result = original(*args, **kwargs)
            if block is self.last:
                left = dict(zip(names, result if isinstance(result, tuple) else (result,), strict=True))
                self.region.note(self.entered, left)
            return result

        forward.__signature__ = signature  # type: ignore[attr-defined]  # A block may be wrapped twice.
        return forward


def runs(model: nn.Module, spans: Sequence[Span], calls: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The outputs of one generation: the model is called with each of `calls` in turn, cached by `spans`."""
    with cached(*spans):
        return [type(model).forward(model, **call)[0] for call in calls]


def assert_diffs(stats: CacheStats, span: Span, skipped: Sequence[int] = (0,)) -> None:
    """Asserts that `stats` has the diffs of `span` at all steps except `skipped`."""
    diffs = {step: diff for step, diff in enumerate(span.diffs) if step not in skipped}
    # Means over a few hundred float32 elements; their quotient is computed in float32 here and in float64 there.
    assert stats.residual_diffs == pytest.approx(diffs, rel=1e-5)
