"""What the reasons of a run mean, a sentence each."""

from __future__ import annotations

REASONS = {
    "warmup": "One of the first steps, which always compute (max_warmup_steps).",
    "mask": "The steps mask says to compute this step (steps_computation_mask).",
    "mask-static": "The steps mask says to reuse this step, whatever the diff (static policy).",
    "max-cached": "As many steps as are allowed were reused already (max_cached_steps).",
    "max-continuous": "As many steps in a row as are allowed were reused (max_continuous_cached_steps).",
    "accumulated-diff": (
        "The diffs of the steps reused since the last computed one add up to the limit "
        "(max_accumulated_residual_diff_threshold)."
    ),
    "threshold-zero": "The threshold is 0 or less, so nothing is reused (residual_diff_threshold).",
    "threshold-one": "The threshold is 1 or more, so the step is reused without a look at the diff.",
    "nothing-stored": "Nothing was kept that has the shapes of this call.",
    "timestep-still": "The timestep has not moved since the session began, so this may be another generation.",
    "nan": "The diff is not a number, which nothing may be concluded from.",
    "diff-below": "The diff is below the threshold.",
    "diff-above": "The diff is not below the threshold.",
    "budget-below": "The diffs since the last computed step add up to less than the threshold.",
    "budget-above": "The diffs since the last computed step add up to the threshold or more.",
    "ratios-below": "The errors that the magnitudes foretell add up to less than the threshold.",
    "ratios-above": "The errors that the magnitudes foretell add up to the threshold or more.",
    "ratios-end": "The step lies beyond the end of magnitude_ratios.",
    "decider-compute": "The decider said to compute.",
    "decider-reuse": "The decider said to reuse.",
}

BEGINNINGS = {
    "new": "It began because another request, guidance branch or prompt came.",
    "timestep-turned": "It began because the timestep turned back: a new generation.",
    "new-schedule": "It began because the pipeline was called anew.",
    "conditioning-changed": "It began because another prompt was written into the same tensor.",
    "length-reached": "It began because the generation before had all of its steps.",
    "state-dropped": "It goes on with a generation, but what that had kept was dropped (max_state_bytes).",
}


def why(reason: str) -> str:
    """The sentence of a reason; the reason itself where it is a policy's own."""
    return REASONS.get(reason, reason)


def why_began(reason: str) -> str:
    """The sentence of why a session began."""
    return BEGINNINGS.get(reason, reason)
