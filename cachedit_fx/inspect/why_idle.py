"""Why a generation reused nothing, in a sentence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from cachedit_fx.runtime.stats import CacheStats

# Reasons of decisions to compute, besides the diff (see `policies.decide`) -> why nothing was reused.
_WHY = {
    "mask": "the steps mask has every one of them computed (steps_computation_mask)",
    "max-cached": "max_cached_steps allows no reused step",
    "max-continuous": "max_continuous_cached_steps allows no reused step",
    "threshold-zero": "residual_diff_threshold is 0 or less",
    "nothing-stored": (
        "nothing that was kept had the shapes of the next step, as where windows or tiles of several sizes share a "
        "prompt"
    ),
    "timestep-still": (
        "the timestep did not move within a session. A model without a timestep reuses only inside "
        "cachedit_fx.session(key)"
    ),
    "nan": (
        "the steps could not be compared with those before, as where windows or tiles share a prompt and their number "
        "changes from step to step. Name each window's calls: cachedit_fx.session(key)"
    ),
    "decider-compute": "the decider had every one of them computed",
    "ratios-end": "they lie beyond the end of magnitude_ratios",
}

_ABOVE = ("diff-above", "budget-above", "ratios-above")  # Reasons of steps whose diff reached the threshold.


def why_none_reused(module: str, stats: Sequence[CacheStats]) -> str:
    """Why no step of a transformer was reused; empty where one was, or none was made.

    Args:
        module: Its name, as `CacheStats.module` has it.
        stats: Of one generation, or of all.
    """
    mine = [entry for entry in stats if entry.module == module]
    total = sum(entry.num_steps for entry in mine)
    if not total or any(entry.cached_steps for entry in mine):
        return ""
    head = f"{module + ': ' if module else ''}0 of {total} steps were reused: "
    if all(entry.num_steps == 1 for entry in mine):
        return head + _of_single_steps(len(mine))
    counted = Counter(reason for entry in mine for reason in entry.decisions)
    warmup = counted.pop("warmup", 0)
    if not counted:
        return head + f"all of them are warm-up steps (max_warmup_steps); {warmup} steps are too few"
    (reason, _), *_ = counted.most_common(1)
    compared = [(value, step, entry) for entry in mine for step, value in entry.compared.items()]
    smallest = min((found for found in compared if math.isfinite(found[0])), key=lambda found: found[0], default=None)
    if smallest is None or reason not in _ABOVE:
        return head + _WHY.get(reason, f"the decision was {reason!r}")
    value, step, entry = smallest
    limit = f"{entry.thresholds[step]:.3g}" if step in entry.thresholds else "the threshold"
    name = "sum of diffs" if entry.adds_up else "diff"
    return head + f"no {name} was below the threshold of {limit}; the smallest was {value:.3g}, at step {step}"


def _of_single_steps(num_sessions: int) -> str:
    first = "the first step of a session is computed"
    if num_sessions == 1:
        return first
    return (
        f"each of {num_sessions} sessions had a single step, and {first}. A session goes on while the prompt stays the "
        "same tensor and the timestep moves in one direction"
    )
