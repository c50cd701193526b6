"""Explains the reasons that statistics contain, one sentence each."""

from __future__ import annotations

REASONS = {
    "warmup": "The step is one of the first steps, which are always computed (max_warmup_steps).",
    "mask": "The steps mask requires that this step is computed (steps_computation_mask).",
    "mask-static": "The steps mask allows this step to be reused, and the static policy ignores the diff.",
    "length-unknown": (
        "The number of steps of the generation is not known, and start_percent, end_percent or final_compute_steps "
        "needs it (num_inference_steps)."
    ),
    "before-start": "The step belongs to the first part of the generation, which is computed (start_percent).",
    "after-end": "The step belongs to the last part of the generation, which is computed (end_percent).",
    "final": "The step is one of the last steps, which are computed (final_compute_steps).",
    "max-cached": "The largest allowed number of steps has been reused (max_cached_steps).",
    "max-continuous": "The largest allowed number of consecutive steps has been reused (max_continuous_cached_steps).",
    "accumulated-diff": (
        "The sum of the diffs of the steps reused since the last computed one has reached the limit "
        "(max_accumulated_residual_diff_threshold)."
    ),
    "threshold-zero": "The threshold is 0 or less, so nothing is reused (residual_diff_threshold).",
    "threshold-one": "The threshold is 1 or more, so the step is reused whatever the diff is.",
    "nothing-stored": "There is no cached value with the shapes of this call.",
    "timestep-still": "The timestep has not changed since the session began, so this may be another generation.",
    "nan": "The diff is not a number, so it allows no decision to reuse.",
    "diff-below": "The diff is below the threshold.",
    "diff-above": "The diff is not below the threshold.",
    "budget-below": "The sum of the diffs since the last computed step is below the threshold.",
    "budget-above": "The sum of the diffs since the last computed step is not below the threshold.",
    "ratios-below": "The sum of the errors that magnitude_ratios predict is below the threshold.",
    "ratios-above": "The sum of the errors that magnitude_ratios predict is not below the threshold.",
    "ratios-end": "The step is beyond the end of magnitude_ratios.",
    "decider-compute": "The decider decided to compute.",
    "decider-reuse": "The decider decided to reuse.",
    "guidance": "The first guidance branch computed this step, and this one follows it (guidance_reuse).",
    "guidance-mask": "The first guidance branch computed this step, and the mask requires that all branches do "
    "(guidance_computation_mask).",
    "guidance-continuous": "The largest allowed number of consecutive steps followed the first guidance branch "
    "(max_continuous_guidance_steps).",
    "guidance-above": "The first guidance branch computed this step, and the diff is not below the threshold "
    "(guidance_reuse_threshold).",
    "ranks-differ": "Another rank that runs the same blocks has to compute, or is in another state.",
}

BEGINNINGS = {
    "new": "The session began because of a new request, guidance branch or prompt.",
    "timestep-turned": "The session began because the timestep turned back, which begins a new generation.",
    "new-schedule": "The session began because the pipeline was called again.",
    "conditioning-changed": "The session began because another prompt was written into the same tensor.",
    "length-reached": "The session began because the previous generation had reached its number of steps.",
    "state-dropped": "The session continues a generation whose cached values were dropped (max_state_bytes).",
}


def why(reason: str) -> str:
    """Returns the sentence for the reason of a decision, or the reason itself if a user's policy gave it."""
    return REASONS.get(reason, reason)


def why_began(reason: str) -> str:
    """Returns the sentence for the reason why a session began."""
    return BEGINNINGS.get(reason, reason)
