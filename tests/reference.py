"""A plain-Python reference of the policy of block caching: the decision of every step of every guidance branch.

It shares no code with `cachedit_fx`: it runs the model eagerly, with blocks skipped by `tests.regions`. The test
passes the generation and the guidance branch of each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tests.regions import Streams, cached, relative_l1

ForecastRule = Callable[[list[tuple[int, Tensor]], int], Tensor]


@dataclass(frozen=True)
class Record:
    """One call of the transformer.

    Attributes:
        guidance_branch: The key that the test passed.
        step: Number of earlier calls of the branch.
        reused: Whether the middle blocks were skipped.
        reason: The reason of the decision, as in `CacheStats.decisions`.
        diff: The residual diff that was compared with the threshold; None if the decision did not depend on it.
        output: The transformer's output.
    """

    guidance_branch: Hashable
    step: int
    reused: bool
    reason: str
    diff: float | None
    output: Tensor


@dataclass
class _GuidanceBranch:
    """The state of one guidance branch of one generation."""

    step: int = 0
    reused: int = 0
    continuous: int = 0
    accumulated: float = 0.0
    first_timestep: float | None = None
    timestep_moved: bool = False
    first_residual: Tensor | None = None
    residuals: Streams = field(default_factory=dict)
    history: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)


class ReferenceCache:
    """Runs `transformer` eagerly with its middle blocks cached, one decision per call.

    A context manager: the `forward`s of the blocks are restored on exit.

    Args:
        transformer: Called with keyword arguments, including `timestep`; returns a tuple, output first.
        blocks: All blocks in execution order, each with the names of what it returns, in order. A
            name is one of the block's parameters; `hidden_states` must be one of them.
        Fn_compute_blocks ... max_accumulated_residual_diff_threshold: As in `CacheConfig`.
        forecaster: Must be None; accepted so that the fields of a configuration can be passed unchanged.
        forecast: Steps and residuals of all computed steps, and the number of a reused step -> the residual to add.
    """

    def __init__(
        self,
        transformer: nn.Module,
        blocks: Iterable[tuple[nn.Module, tuple[str, ...]]],
        *,
        Fn_compute_blocks: int,
        Bn_compute_blocks: int = 0,
        residual_diff_threshold: float,
        max_warmup_steps: int,
        warmup_interval: int = 1,
        max_cached_steps: int = -1,
        max_continuous_cached_steps: int = -1,
        max_accumulated_residual_diff_threshold: float | None = None,
        forecaster: None = None,
        forecast: ForecastRule = lambda history, step: history[-1][1],
    ) -> None:
        self.transformer = transformer
        self.blocks = list(blocks)
        self.since = self.blocks[0][0]
        self.skipped = self.blocks[Fn_compute_blocks : len(self.blocks) - Bn_compute_blocks]
        assert Fn_compute_blocks >= 1 and self.skipped
        self.threshold = residual_diff_threshold
        self.warmup = range(0, max_warmup_steps, warmup_interval)
        self.max_cached = max_cached_steps
        self.max_continuous = max_continuous_cached_steps
        self.max_accumulated = max_accumulated_residual_diff_threshold
        self.forecast = forecast
        self.records: list[Record] = []
        self._guidance_branches: dict[Hashable, _GuidanceBranch] = {}

    def __enter__(self) -> ReferenceCache:
        self._cached = cached(self)
        self._cached.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._cached.__exit__(None, None, None)

    def __call__(self, guidance_branch: Hashable, **inputs: Any) -> Tensor:
        """The transformer's output for the next step of `guidance_branch`."""
        state = self._state = self._guidance_branches.setdefault(guidance_branch, _GuidanceBranch())
        timestep = inputs["timestep"].flatten()[0].item()
        if state.first_timestep is None:
            state.first_timestep = timestep
        state.timestep_moved |= timestep != state.first_timestep
        # Call the class's forward, because `stand_in_for_forward` may have replaced that of the instance.
        output = type(self.transformer).forward(self.transformer, **inputs)[0]
        self.records.append(Record(guidance_branch, state.step, self._reuse, self._reason, self._diff, output))
        state.step += 1
        if self._reuse:
            state.reused += 1
            state.continuous += 1
            state.accumulated += self._diff or 0.0
        else:
            state.continuous = 0
            state.accumulated = 0.0
        return output

    def of(self, guidance_branch: Hashable) -> list[Record]:
        """The calls of one branch, in order."""
        return [record for record in self.records if record.guidance_branch == guidance_branch]

    def stand_in_for_forward(self, next_guidance_branch: Callable[[], Hashable]) -> Callable[..., tuple[Tensor]]:
        """A `forward` for a transformer that is called by a pipeline.

        Args:
            next_guidance_branch: Called once per call of the transformer; returns its guidance branch.
        """

        def forward(**inputs: Any) -> tuple[Tensor]:
            return (self(next_guidance_branch(), **inputs),)

        return forward

    def chain(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        return self.skipped

    def reuses(self, streams: Streams, probe: Tensor) -> bool:
        state = self._state
        self._diff: float | None = None
        self._reason = self._why_not_probed(streams) or self._compare_probe(probe, state.first_residual)
        self._reuse = self._reason in ("threshold-one", "diff-below")
        if not self._reuse:
            state.first_residual = probe
        return self._reuse

    def note(self, entered: Streams, left: Streams) -> None:
        self._state.residuals = {name: left[name] - entered[name] for name in left}
        for name, residual in self._state.residuals.items():
            self._state.history.setdefault(name, []).append((self._state.step, residual))

    def supply(self, entered: Streams) -> Streams:
        step, history = self._state.step, self._state.history
        return {name: entered[name] + self.forecast(history[name], step) for name in history}

    def _why_not_probed(self, streams: Streams) -> str | None:
        """The reason of a decision that does not depend on the diff, or None."""
        state = self._state
        if state.step in self.warmup:
            return "warmup"
        if state.reused >= self.max_cached >= 0:
            return "max-cached"
        if state.continuous >= self.max_continuous >= 0:
            return "max-continuous"
        if self.max_accumulated is not None and state.accumulated >= self.max_accumulated:
            return "accumulated-diff"
        if self.threshold <= 0:
            return "threshold-zero"
        if not state.residuals:
            return "nothing-stored"
        if any(state.residuals[name].shape != now.shape for name, now in streams.items()):
            return "shape-changed"
        if not state.timestep_moved:
            return "timestep-still"
        if self.threshold >= 1:
            return "threshold-one"
        return None

    def _compare_probe(self, now: Tensor, before: Tensor) -> str:
        self._diff = relative_l1(now, before)
        if math.isnan(self._diff):
            return "nan"
        return "diff-below" if self._diff < self.threshold else "diff-above"
