"""One step of an exported model: the methods that a cached graph calls, on tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachedit_fx.exporting.state_layout import NUM_DIFFS, RegionLayout, StateLayout
from cachedit_fx.exporting.tensor_branches import Branch, RegionBranches
from cachedit_fx.exporting.tensor_forecast import TensorTimes, is_gap, is_jump, times_of
from cachedit_fx.exporting.tensor_policy import TensorHistory, decide_in_tensors


class TensorStep:
    """The argument `step` of an exported cached graph (see `insert_conditionals.Step`).

    It reads the state before the step from tensors, and collects the state after it. `run_region` takes the place of
    `compute_or_reuse`.

    Args:
        state: The tensors of `StateLayout.specs`, by name.
        threshold: `residual_diff_threshold`, float64 [].

    Attributes:
        next_state: The state after the step, by name; complete after `finish`.
        computes: For each region, whether it computes, bool [].
        diffs: For each region, the residual diff, float64 []; NaN if none is measured.
    """

    def __init__(self, layout: StateLayout, state: Mapping[str, Tensor], threshold: Tensor) -> None:
        self._layout, self._state, self._threshold = layout, state, threshold
        self._timestep: Tensor | None = None
        self._is_gap = torch.zeros_like(threshold, dtype=torch.bool)
        self._is_outdated: list[Tensor] = []
        self.next_state: dict[str, Tensor] = {}
        self.computes: list[Tensor] = []
        self.diffs: list[Tensor] = []

    def before(self, region: int) -> Tensor:
        """The probe of the last computed step (with the rule "budget": of the last step)."""
        return self._of(self._layout.regions[region], "probe")

    def decide(self, region: int, probe_vector: Tensor | None, streams: Sequence[Tensor] = ()) -> Tensor:
        """Whether to compute, bool []."""
        layout = self._layout.regions[region]
        values = [] if probe_vector is None else [*probe_vector.double().unbind()]
        diff = values.pop(0) if layout.probe is not None else torch.full_like(self._threshold, torch.nan)
        if region == 0 and self._layout.remembers_timesteps:
            self._set_timestep(values[0])
        num_steps = self._state["num_steps"]
        counters = (self._of(layout, name) for name in ("num_reused", "num_continuous", "accumulated_diff"))
        history, is_cached = TensorHistory(num_steps, *counters), self._of(layout, "num_values") > 0
        if layout.forecaster is not None:
            diffs = self._of(layout, "diffs")
            has_jump = is_jump(diff, diffs, num_steps.clamp(max=NUM_DIFFS))
            self._is_outdated.append(self._of(layout, "is_outdated") | self._is_gap | has_jump)
        else:
            self._is_outdated.append(torch.zeros_like(is_cached))
        computes, accumulated = decide_in_tensors(layout.config, history, diff, self._threshold, is_cached)
        self.computes.append(computes)
        self.diffs.append(diff)
        self._count(layout, history, computes, accumulated)
        return computes

    def _set_timestep(self, timestep: Tensor) -> None:
        recent = torch.cat((self._state["timesteps"], timestep.view(1)))
        self._is_gap = is_gap(recent, self._state["num_steps"])
        self.next_state["timesteps"] = recent[1:].clone()

    def _count(self, layout: RegionLayout, history: TensorHistory, computes: Tensor, accumulated: Tensor) -> None:
        """Collects everything after the decision that depends on nothing else."""
        number, reused, is_outdated = len(self.diffs) - 1, (~computes).long(), self._is_outdated[-1]
        count, prefix = self._of(layout, "num_values"), layout.prefix
        first = torch.where(is_outdated, 1, (count + 1).clamp(max=layout.depth))
        self.next_state[f"{prefix}num_reused"] = history.num_cached + reused
        self.next_state[f"{prefix}num_continuous"] = (history.num_continuous + 1) * reused
        self.next_state[f"{prefix}accumulated_diff"] = accumulated
        self.next_state[f"{prefix}num_values"] = torch.where(computes, first, count)
        if layout.forecaster is not None:
            positions, diffs = self._of(layout, "positions"), self._of(layout, "diffs")
            shifted = torch.cat((history.num_steps.double().view(1), positions[:-1]))
            self.next_state[f"{prefix}positions"] = torch.where(computes, shifted, positions)
            self.next_state[f"{prefix}is_outdated"] = is_outdated & ~computes
            self.next_state[f"{prefix}diffs"] = torch.cat((diffs[1:], self.diffs[number].view(1)))

    def cached(self, region: int) -> tuple[Tensor, ...]:
        """The newest cached value of every live-out. `run_region` replaces them if they are forecast."""
        layout = self._layout.regions[region]
        return tuple(self._state[layout.names_of(i)[0]] for i in range(len(layout.values)))

    def run_region(
        self, region: int, computes: Tensor, compute: Branch, reuse: Branch, operands: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The live-outs of a region, followed by None for every value to cache, since `next_state` has them."""
        layout = self._layout.regions[region]
        count, times = len(layout.values), self._times(region)
        histories = [[self._state[name] for name in layout.names_of(i)] for i in range(count)]
        verdicts = [self._state[layout.verdict_of(i)] for i in range(count) if layout.covered[i]]
        branches = RegionBranches(layout, compute, reuse)
        given = (computes, ~computes, separated(operands[:-count]), histories, verdicts, tuple(times or ()))
        outputs, histories, verdicts = _cond(computes, branches.compute, branches.reuse, given)
        for i in range(count):
            self.next_state |= zip(layout.names_of(i), histories[i], strict=True)
        names = [layout.verdict_of(i) for i in range(count) if layout.covered[i]]
        self.next_state |= zip(names, verdicts, strict=True)
        return (*outputs, *(None,) * count)

    def _times(self, region: int) -> TensorTimes | None:
        layout = self._layout.regions[region]
        if layout.forecaster is None:
            return None
        return times_of(
            layout.forecaster,
            self._of(layout, "num_values"),
            self._of(layout, "positions"),
            self._state["num_steps"].double(),
            self._is_outdated[region],
            is_static=layout.config.is_static,
        )

    def update(self, region: int, probe: Tensor | None, cached: Sequence[Tensor | None]) -> None:
        """Collects the probe."""
        layout = self._layout.regions[region]
        if probe is None or layout.probe is None:
            return
        if layout.config.decision_rule != "budget":
            probe = torch.where(self.computes[region], probe, self._state[layout.probe.name])
        self.next_state[layout.probe.name] = probe.contiguous()

    def finish(self) -> tuple[Tensor, ...]:
        """The state after the step, in the order of `StateLayout.specs`."""
        self.next_state["num_steps"] = self._state["num_steps"] + 1
        return tuple(self.next_state[spec.name] for spec in self._layout.specs())

    def _of(self, layout: RegionLayout, name: str) -> Tensor:
        return self._state[layout.prefix + name]


def separated(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, of which all but one of those that share their memory are copied: `torch.cond` refuses aliases."""
    found: list[Tensor] = []
    storages: set[int] = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()._cdata
        found.append(tensor.clone() if storage in storages else tensor)
        storages.add(storage)
    return found


def _cond(pred: Tensor, compute: Callable[..., Any], reuse: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    """`torch.cond`, without the trace by Dynamo with which it begins, since `torch.export` traces the branches anyway.

    This makes an export several times as fast. The operands are nested tensors, and the branches use no others.
    """
    flat, structure = pytree.tree_flatten(operands)
    results: list[pytree.TreeSpec] = []

    def with_flat(branch: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            leaves, result = pytree.tree_flatten(branch(*pytree.tree_unflatten(tensors, structure)))
            results.append(result)
            return tuple(leaves)

        return run

    found = torch.ops.higher_order.cond(pred, with_flat(compute), with_flat(reuse), tuple(flat))
    return pytree.tree_unflatten(found, results[0])
