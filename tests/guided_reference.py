"""A plain-Python reference of guidance reuse, for two guidance branches. It shares no code with `cachedit_fx`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tests.reference import Record, ReferenceCache
from tests.regions import Streams, relative_l1

HIDDEN = "hidden_states"


class GuidedReference(ReferenceCache):
    """`ReferenceCache`, whose second guidance branch adds the residual of the first one and their difference.

    Args:
        first_of: Second branch -> the first branch of the same step.
        max_continuous_guidance_steps, guidance_computation_mask, guidance_reuse_threshold: As in `CacheConfig`.
    """

    def __init__(
        self,
        *args: Any,
        first_of: Mapping[Hashable, Hashable],
        max_continuous_guidance_steps: int = -1,
        guidance_computation_mask: Sequence[int] = (),
        guidance_reuse_threshold: float | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(*args, **fields)
        self.first_of = dict(first_of)
        self.max_guided = max_continuous_guidance_steps
        self.mask = tuple(guidance_computation_mask)
        self.guided_below = guidance_reuse_threshold
        if self.mask:
            leading = (*self.mask, 0).index(0)
            self.guided_from = min(fields["max_warmup_steps"], leading)
        else:
            self.guided_from = fields["max_warmup_steps"]
        # Of every branch: its last residual, its difference from the first branch at the last step that both computed,
        # and how many steps in a row used the difference.
        self.last: dict[Hashable, Tensor] = {}
        self.difference: dict[Hashable, Tensor | None] = {}
        self.num_guided: dict[Hashable, int] = {}

    def __call__(self, guidance_branch: Hashable, **inputs: Any) -> Tensor:
        self.branch = guidance_branch
        self.is_guided = False
        output = super().__call__(guidance_branch, **inputs)
        state = self._state
        if self.is_guided:
            state.continuous, state.accumulated = 0, 0.0
            self.num_guided[guidance_branch] += 1
        elif not self._reuse:
            self.num_guided[guidance_branch] = 0
        if self.is_guided or not self._reuse:
            self.last[guidance_branch] = state.residuals[HIDDEN]
        if not self._reuse:
            first = self._record_of_first(state.step - 1)
            computed = first is not None and not first.reused
            of_first = self.last[self.first_of[guidance_branch]] if computed else None
            self.difference[guidance_branch] = self.last[guidance_branch] - of_first if computed else None
        return output

    def reuses(self, streams: Streams, probe: Tensor) -> bool:
        state, first = self._state, self._record_of_first(self._state.step)
        if first is None:
            return super().reuses(streams, probe)
        if first.reused:
            self._first_diff = first.diff
            return self._with_diff_of_first(streams, probe)
        difference = self.difference.get(self.branch)
        if state.step < self.guided_from or not state.timestep_moved or difference is None:
            return super().reuses(streams, probe)
        diff = relative_l1(probe, state.first_residual)
        self._diff = None
        if state.step < len(self.mask) and self.mask[state.step]:
            self._reason = "guidance-mask"
        elif self.num_guided[self.branch] >= self.max_guided >= 0:
            self._reason = "guidance-continuous"
        elif self.guided_below is not None and not diff < self.guided_below:
            self._reason, self._diff = "guidance-above", diff
        else:
            self._reason, self._diff = "guidance", None if self.guided_below is None else diff
        self._reuse = self.is_guided = self._reason == "guidance"
        state.first_residual = probe
        return self._reuse

    def supply(self, entered: Streams) -> Streams:
        if not self.is_guided:
            return super().supply(entered)
        state, now = self._state, self.last[self.first_of[self.branch]]
        residual = now + self.difference[self.branch]
        state.residuals = {**state.residuals, HIDDEN: residual}
        state.history[HIDDEN].append((state.step, residual))
        # The other streams are not used after the blocks.
        return {name: entered[name] + state.residuals[name] for name in state.residuals}

    def _record_of_first(self, step: int) -> Record | None:
        """What the first branch did at this step; None if this is the first branch."""
        return next((r for r in self.of(self.first_of.get(self.branch)) if r.step == step), None)

    def _with_diff_of_first(self, streams: Streams, probe: Tensor) -> bool:
        self._diff = None
        self._reason = self._why_not_probed(streams)
        if self._reason is None:
            self._diff = self._first_diff
            self._reason = "diff-below" if self._diff < self.threshold else "diff-above"
        self._reuse = self._reason in ("threshold-one", "diff-below")
        if not self._reuse:
            self._state.first_residual = probe
        return self._reuse
