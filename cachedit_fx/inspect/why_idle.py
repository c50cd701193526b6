"""States in one sentence why a generation reused nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from cachedit_fx.runtime.stats import CacheStats

# Reason of a decision to compute, other than the diff (see `policies.decide`) -> why nothing was reused.
_WHY = {
    "mask": "the steps mask requires that all of them are computed (steps_computation_mask)",
    "max-cached": "max_cached_steps allows no reused step",
    "max-continuous": "max_continuous_cached_steps allows no reused step",
    "threshold-zero": "residual_diff_threshold is 0 or less",
    "nothing-stored": (
        "no cached value had the shape that the next step needed. This happens if windows or tiles of several sizes "
        "share a prompt"
    ),
    "timestep-still": (
        "the timestep did not change within a session. A model without a timestep input reuses only inside "
        "cachedit_fx.session(key)"
    ),
    "nan": (
        "the steps could not be compared with the previous ones. This happens if windows or tiles share a prompt and "
        "their number changes from step to step. Call the model for each window inside cachedit_fx.session(key)"
    ),
    "decider-compute": "the decider decided to compute all of them",
    "ranks-differ": (
        "another rank that runs the same blocks had to compute, or was in another state, for example because the cache "
        "is not enabled in the same way on all ranks"
    ),
    "length-unknown": (
        "the number of steps of the generation is not known outside of a pipeline, and start_percent, end_percent or "
        "final_compute_steps needs it. Give num_inference_steps"
    ),
    "before-start": "all of them are before start_percent or after end_percent",
    "after-end": "all of them are before start_percent or after end_percent",
    "final": "all of them are among the last final_compute_steps",
    "ratios-end": "they are beyond the end of magnitude_ratios",
}

_ABOVE = ("diff-above", "budget-above", "ratios-above")  # Reasons of steps whose diff reached the threshold.


def why_none_reused(module: str, stats: Sequence[CacheStats]) -> str:
    """Returns why no step of a transformer was reused; empty if a step was reused or no step ran.

    Args:
        module: The name of the transformer, as in `CacheStats.module`.
        stats: The statistics of one generation, or of all generations.
    """
    of_module = [entry for entry in stats if entry.module == module]
    total = sum(entry.num_steps for entry in of_module)
    if not total or any(entry.cached_steps for entry in of_module):
        return ""
    head = f"{module + ': ' if module else ''}0 of {total} steps were reused: "
    if all(entry.num_steps == 1 for entry in of_module):
        return head + _of_single_steps(len(of_module))
    counted = Counter(reason for entry in of_module for reason in entry.decisions)
    warmup = counted.pop("warmup", 0)
    if not counted:
        return head + f"all of them are warm-up steps (max_warmup_steps); {warmup} steps are too few"
    (reason, _), *_ = counted.most_common(1)
    compared = [(value, step, entry) for entry in of_module for step, value in entry.compared.items()]
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
        f"each of {num_sessions} sessions had a single step, and {first}. A session continues while the prompt is the "
        "same tensor and the timestep changes in one direction"
    )
