"""What `tune` found: the quality of a configuration, the points of the frontier, and the alternatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.tuning.saved import Config
from cachedit_fx.tuning.targets import Target

_LEAST_DB, _LEAST_RATIO = 0.5, 1.01  # Smaller differences in quality and in speed do not count.
_SHORT_NAMES = {
    "UniPCMultistepScheduler": "UniPC",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "FlowMatchEulerDiscreteScheduler": "Euler",
    "FlowMatchHeunDiscreteScheduler": "Heun",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "DEISMultistepScheduler": "DEIS",
    "DDIMScheduler": "DDIM",
}


@dataclass(frozen=True)
class Quality:
    """The quality and the speed of a configuration.

    Attributes:
        psnr: The mean over the images of the PSNR of each against the uncached one, in dB.
        rel_l2: The mean over the images of the relative L2 distance of each, dimensionless.
        speedup: The speed-up of a whole generation, computed from the times without the cache.
        share_computed: The share of the steps that are computed. If reused steps run blocks too, the share of the
            model's time. For an alternative, the share of the steps of the given calls.
    """

    psnr: float
    rel_l2: float
    speedup: float
    share_computed: float

    def __str__(self) -> str:
        return (
            f"PSNR {self.psnr:.1f} dB, relative L2 {self.rel_l2:.3g}, {self.speedup:.2f} times as fast, "
            f"{self.share_computed:.0%} computed"
        )


@dataclass(frozen=True)
class Point:
    """A configuration and its quality.

    Attributes:
        config: The configuration, as `TuneResult.config`.
        quality: Its quality.
        is_measured: Whether the quality was measured. If not, it is predicted, and its `rel_l2` is NaN.
        is_reached: Whether it was measured and the target is reached, including the margin.
    """

    config: Config
    quality: Quality
    is_measured: bool
    is_reached: bool = False

    @property
    def name(self) -> str:
        return f"cache, {steps_of(self.config)}"

    @property
    def computed(self) -> tuple[int, int] | None:
        """The number of computed steps and of all steps; None for a threshold."""
        return _computed(self.config)


@dataclass(frozen=True)
class Alternative:
    """Fewer steps, with the pipeline's scheduler or another one, without or with the cache.

    Attributes:
        scheduler: The name of the class of the scheduler.
        scheduler_config: Its configuration; empty if the scheduler has none.
        num_inference_steps: The number of steps.
        config: The configuration of the cache; None without the cache.
        quality: The measured quality, against the same reference as that of all other configurations: the given calls
            with their number of steps and the scheduler of the pipeline. With the cache, the schedule was simulated.
        is_reached: Whether the target is reached, including the margin.
    """

    scheduler: str
    scheduler_config: Mapping[str, Any]
    num_inference_steps: int
    config: Config | None
    quality: Quality
    is_reached: bool

    @property
    def solver(self) -> str:
        """The usual name of the scheduler's method, or else the name of the class."""
        return _SHORT_NAMES.get(self.scheduler, self.scheduler)

    @property
    def computed(self) -> tuple[int, int] | None:
        """The number of computed steps and of all steps with the cache; None without it."""
        return None if self.config is None else _computed(self.config)

    @property
    def name(self) -> str:
        cache = "no cache" if self.config is None else f"cache, {steps_of(self.config)}"
        return f"{self.solver}, {self.num_inference_steps} steps, {cache}"


def steps_of(config: Config) -> str:
    """Returns which steps a configuration computes, in a few words."""
    found, guided = _computed(config), _num_guided(config)
    if found is None:
        return f"threshold {_configs_of(config)[0].residual_diff_threshold:g}"
    and_guided = f", {guided} of them guided" if guided else ""
    return f"{found[0]} of {found[1]} steps computed{and_guided}"


def _computed(config: Config) -> tuple[int, int] | None:
    masks = [each.steps_computation_mask for each in _configs_of(config) if each.is_static]
    steps = [step for mask in masks for step in mask or ()]
    return (sum(steps), len(steps)) if steps else None


def _num_guided(config: Config) -> int:
    """Returns the number of computed steps at which the second guidance branch is guided by the first."""
    masks = [each.guidance_computation_mask for each in _configs_of(config)]
    return sum(1 - step for mask in masks for step in mask or ())


def _configs_of(config: Config) -> list[CacheConfig]:
    return [config] if isinstance(config, CacheConfig) else [*config.values()]


def verdict(target: Target, cached: Quality, is_reached: bool, alternatives: Sequence[Alternative]) -> str:
    """Returns one sentence that compares the best alternative with the cached configuration."""
    best = best_of(target, alternatives)
    if best is None:
        return ""
    found = best.quality
    if best.config is None:
        with_cache = "and no cache"
    else:
        with_cache = f"and the cache ({steps_of(best.config)})"
    reaches = (
        f"{best.solver} with {best.num_inference_steps} steps {with_cache} reaches {found.psnr:.1f} dB at "
        f"{found.speedup:.2f} times the speed"
    )
    if not is_better(target, best, cached, is_reached):
        return f"No alternative is better than the cached configuration. The best one: {reaches}."
    if not is_reached:
        return f"{reaches}. The cached configuration does not reach the target."
    if target.kind == "speedup":
        return f"{reaches}, with a better quality than the cached configuration ({cached.psnr:.1f} dB)."
    if found.speedup > _LEAST_RATIO * cached.speedup:
        return f"{reaches}, faster than the cached configuration ({cached.speedup:.2f} times)."
    return f"{reaches}, as fast as the cached configuration, with a better quality ({cached.psnr:.1f} dB)."


def best_of(target: Target, alternatives: Sequence[Alternative]) -> Alternative | None:
    """Returns the best alternative: one that reaches the target, or else the one with the highest PSNR."""
    reached = [each for each in alternatives if each.is_reached]
    if not reached or target.kind == "speedup":
        return max(reached or alternatives, key=lambda each: each.quality.psnr, default=None)
    return max(reached, key=lambda each: (each.quality.speedup, each.quality.psnr))


def is_better(target: Target, alternative: Alternative, cached: Quality, is_reached: bool) -> bool:
    """Returns whether an alternative reaches the target and is better than the cached configuration."""
    if not alternative.is_reached or not is_reached:
        return alternative.is_reached
    is_finer = alternative.quality.psnr > cached.psnr + _LEAST_DB
    if target.kind == "speedup":
        return is_finer
    ratio = alternative.quality.speedup / cached.speedup
    return ratio > _LEAST_RATIO or (ratio > 1 / _LEAST_RATIO and is_finer)
