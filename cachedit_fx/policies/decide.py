"""Decides whether a step computes or reuses: first the checks that hold under every rule, then the rule.

The order of the checks is that of cache-dit. Two things differ: the accumulated limit counts the steps that were reused
since the last computed step, and a step whose residual diff is NaN is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from cachedit_fx.config.cache_config import DEFAULT_WARMUP_STEPS, CacheConfig
from cachedit_fx.policies.budget import by_budget, rescaled
from cachedit_fx.policies.decider import StepView, ask
from cachedit_fx.policies.history import Decision, History
from cachedit_fx.policies.magnitude import by_magnitude
from cachedit_fx.policies.position import Progress, must_compute
from cachedit_fx.policies.threshold import by_threshold, relaxed_threshold


def decide(
    config: CacheConfig,
    history: History,
    diff: float,
    *,
    is_cached: bool,
    earlier: Sequence[float] = (),
    timestep: float | None = None,
    region: str = "",
    progress: Progress | None = None,
) -> Decision:
    """The decision for one region at one step.

    Args:
        diff: The residual diff, dimensionless, >= 0 or NaN.
        is_cached: Whether there are cached values with the shapes of this call.
        earlier: The residual diffs of the previous regions at the same step, for a dynamic prune threshold.
        timestep, region: What a decider is shown of the step.
        progress: The place of the step in its generation; by default the number of the step in the session, of
            `num_inference_steps`.

    Raises:
        ConfigError: The answer of a decider is not True, False or None.
    """
    threshold = relaxed_threshold(config, earlier)
    progress = progress or Progress(history.number, config.num_inference_steps)
    answer = None
    if config.decider is not None:
        diff = diff if is_cached else math.nan
        view = StepView(region, history.number, progress.length, timestep, diff, threshold, is_cached, history)
        answer = ask(config.decider, view)
    if answer:
        return _by_decider(Decision(True, "decider-compute"), config, history, diff)
    forbidden = _forbidden(config, history, threshold, progress) if answer is None else None
    if forbidden is not None:
        return Decision(True, forbidden)
    if not is_cached:
        return Decision(True, "nothing-stored")
    if not history.has_moved:
        # Generations of one step that share a prompt cannot be distinguished from this, so the step is computed.
        return Decision(True, "timestep-still")
    if answer is not None:
        return _by_decider(Decision(False, "decider-reuse"), config, history, diff)
    if config.is_static:
        return Decision(False, "mask-static")
    return _by_rule(config, threshold, history, diff)


def decide_unread(
    config: CacheConfig,
    history: History,
    *,
    is_cached: bool,
    earlier: Sequence[float] = (),
    progress: Progress | None = None,
) -> Decision | None:
    """The decision, if it depends neither on the residual diff nor on the timestep; None if it does."""
    if config.decider is not None:
        return None
    threshold = relaxed_threshold(config, earlier)
    is_open = is_cached and history.has_moved and _reads_diff(config, threshold)
    progress = progress or Progress(history.number, config.num_inference_steps)
    if is_open and _forbidden(config, history, threshold, progress) is None:
        return None
    return decide(config, history, math.nan, is_cached=is_cached, earlier=earlier, progress=progress)


def computes_anyway(
    config: CacheConfig, history: History, *, is_cached: bool, progress: Progress | None = None
) -> bool:
    """Whether the first region of a step computes, also if it turns out that its residual diff is unknown, because the
    step is of another session.
    """
    threshold = config.residual_diff_threshold
    progress = progress or Progress(history.number, config.num_inference_steps)
    if is_cached and _forbidden(config, history, threshold, progress) is None:
        return False
    return config.decider is None and _reads_diff(config, threshold)


def _reads_diff(config: CacheConfig, threshold: float) -> bool:
    """Whether a step is only reused if its residual diff is known, without a decider."""
    if config.is_static:
        return False
    return threshold < 1 if config.decision_rule == "threshold" else config.probe != "timestep"


def decision_terms(
    config: CacheConfig,
    history: History,
    *,
    is_cached: bool,
    earlier: Sequence[float] = (),
    progress: Progress | None = None,
) -> tuple[object, ...] | None:
    """What `decide` depends on besides the residual diff and the timestep: numbers, strings and tuples of these.

    None if the step is computed whatever they are. With a decider, the terms do not determine the answer.
    """
    threshold = relaxed_threshold(config, earlier)
    has_decider = config.decider is not None
    progress = progress or Progress(history.number, config.num_inference_steps)
    if not is_cached or (not has_decider and _forbidden(config, history, threshold, progress) is not None):
        return None
    rule = (config.decision_rule, config.probe == "timestep", config.is_static, has_decider, threshold)
    position = (history.number, history.num_continuous) if config.magnitude_ratios else ()
    factors = (config.rescale_coefficients, config.magnitude_ratios)
    return (*rule, *position, tuple(map(tuple, (factor or () for factor in factors))), history.accumulated_diff)


def _by_decider(decision: Decision, config: CacheConfig, history: History, diff: float) -> Decision:
    """The decision of a decider, with the residual diff that it was shown if that was measured."""
    if diff != diff:
        return decision
    total = history.accumulated_diff + rescaled(config.rescale_coefficients, diff)
    return replace(decision, probed=True, accumulated=total)


def _by_rule(config: CacheConfig, threshold: float, history: History, diff: float) -> Decision:
    if config.decision_rule == "threshold":
        return by_threshold(threshold, history, diff)
    if config.probe == "timestep":
        return by_magnitude(config.magnitude_ratios, threshold, history)
    return by_budget(config.rescale_coefficients, threshold, history, diff)


def _forbidden(config: CacheConfig, history: History, threshold: float, progress: Progress) -> str | None:
    """The reason why this step must be computed, whatever its residual diff is; None if it may be reused."""
    step, mask = history.num_steps, config.steps_computation_mask
    if step < num_warmup_steps(config, progress) and step % config.warmup_interval == 0:
        return "warmup"
    if mask is not None and step < len(mask) and mask[step]:
        return "mask"
    place = must_compute(config, progress)
    if place is not None:
        return place
    if config.is_static:
        return None
    if history.num_cached >= config.max_cached_steps >= 0:
        return "max-cached"
    if history.num_continuous >= config.max_continuous_cached_steps >= 0:
        return "max-continuous"
    cap = config.max_accumulated_residual_diff_threshold
    if cap is not None and history.accumulated_diff >= cap > 0:
        return "accumulated-diff"
    return "threshold-zero" if threshold <= 0 else None


def num_warmup_steps(config: CacheConfig, progress: Progress | None = None) -> int:
    """The number of steps that are warm-up. With a mask, no more than the 1s that it begins with."""
    most, mask = max_warmup_steps(config, progress), config.steps_computation_mask
    return most if mask is None else min(most, (*mask, 0).index(0))


def max_warmup_steps(config: CacheConfig, progress: Progress | None = None) -> int:
    """The limit on warm-up steps: the configured one, or else the number of early steps, at most 8."""
    if config.max_warmup_steps is not None:
        return config.max_warmup_steps
    early = progress.num_early if progress is not None else None
    return DEFAULT_WARMUP_STEPS if early is None else min(early, DEFAULT_WARMUP_STEPS)
