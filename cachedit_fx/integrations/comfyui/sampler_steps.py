"""Decides by the steps of a sampler: `start_percent`, `end_percent`, `final_compute_steps` and the mask of a policy.

A sampler of ComfyUI may call the model more than once per step, at noise levels (sigmas) between those of its steps, so
that the calls that a session counts are not the steps of the sampler. The sigma of a call shows its step.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.config.steps_mask import steps_mask
from cachedit_fx.errors import ConfigError
from cachedit_fx.policies.decider import Decider, StepView

log = logging.getLogger(__name__)


class _CallSigma:
    """The sigma of a call of the model. It is read from the device when a decision first needs it."""

    def __init__(self, given: torch.Tensor) -> None:
        self._given = given
        self._value: float | None = None

    @property
    def value(self) -> float:
        if self._value is None:
            self._value = float(self._given.max())
        return self._value


_call_sigma: ContextVar[_CallSigma | None] = ContextVar("cachedit_fx_comfyui_sigma", default=None)


@contextlib.contextmanager
def at_sigma(given: Any) -> Iterator[None]:
    """Makes the sigma of the calls in the block known: a tensor with one number per sample, or something else."""
    is_sigma = isinstance(given, torch.Tensor) and given.numel() > 0
    token = _call_sigma.set(_CallSigma(given) if is_sigma else None)
    try:
        yield
    finally:
        _call_sigma.reset(token)


@dataclass(frozen=True)
class SamplerSteps:
    """A `Decider` for one run of a sampler. A step whose place in the run is not known is computed.

    Attributes:
        start_sigma: Steps above it are computed.
        end_sigma: Steps that are not above it are computed.
        sigmas: The sigmas of the steps, in descending order; empty if they are not known.
        mask: 1 for a step of the sampler that is computed, 0 for one that is reused; None to decide by `otherwise`.
        final_compute_steps: The number of steps at the end of the run that are computed.
        otherwise: Decides about all other steps; None for the rule of the configuration.
    """

    start_sigma: float = float("-inf")
    end_sigma: float = float("inf")
    sigmas: tuple[float, ...] = ()
    mask: tuple[int, ...] | None = None
    final_compute_steps: int = 0
    otherwise: Decider | None = None

    def decide(self, step: StepView) -> bool | None:
        sigma = _call_sigma.get()
        if sigma is None or not self.end_sigma < sigma.value <= self.start_sigma:
            return True
        if self.mask is not None or self.final_compute_steps:
            index = self._index_of(sigma.value)
            if index is None or index >= len(self.sigmas) - self.final_compute_steps:
                return True
            if self.mask is not None:
                return bool(self.mask[index])
        return self.otherwise.decide(step) if self.otherwise is not None else None

    def _index_of(self, sigma: float) -> int | None:
        """The step of the sampler that makes a call at `sigma`; None if it is not known."""
        return max(sum(of_step >= sigma for of_step in self.sigmas) - 1, 0) if self.sigmas else None


@dataclass(frozen=True)
class StepLimits:
    """The limits of a configuration that refer to the steps of a sampler.

    Attributes:
        mask_policy: The `mask_policy` of `steps_mask`; None for no mask.
    """

    start_percent: float
    end_percent: float
    final_compute_steps: int
    mask_policy: str | None
    otherwise: Decider | None

    @staticmethod
    def of(config: CacheConfig, mask_policy: str | None) -> StepLimits | None:
        """The limits of a configuration; None if it has none."""
        start, end, final = config.start_percent, config.end_percent, config.final_compute_steps
        if not start and end >= 1 and not final and mask_policy is None:
            return None
        if mask_policy is not None:
            steps_mask(total_steps=28, mask_policy=mask_policy)  # Checks the name.
        return StepLimits(start, end, final, mask_policy, config.decider)

    def within(self, config: CacheConfig, decider: SamplerSteps | None = None) -> CacheConfig:
        """The configuration with a decider in place of these limits; without one, every step is computed."""
        decider = decider or SamplerSteps()
        return config.override(start_percent=0.0, end_percent=1.0, final_compute_steps=0, decider=decider)

    def decider_for(self, model_sampling: Any, sample_sigmas: Any) -> SamplerSteps:
        """The decider for one run of a sampler.

        Args:
            model_sampling: The `model_sampling` of the model, whose `percent_to_sigma` defines the percentages.
            sample_sigmas: The sigmas of the steps and the last one, [steps + 1]; None if they are not known.
        """
        sigmas = tuple(sample_sigmas.tolist()[:-1]) if isinstance(sample_sigmas, torch.Tensor) else ()
        if any(one <= following for one, following in itertools.pairwise(sigmas)):
            sigmas = ()  # A sampler that adds noise.
        decider = SamplerSteps(float("inf"), 0.0, sigmas, None, self.final_compute_steps, self.otherwise)
        if self.start_percent > 0:
            decider = replace(decider, start_sigma=float(model_sampling.percent_to_sigma(self.start_percent)))
        if self.end_percent < 1:
            decider = replace(decider, end_sigma=float(model_sampling.percent_to_sigma(self.end_percent)))
        return decider if self.mask_policy is None else replace(decider, mask=self._mask(len(sigmas)))

    def _mask(self, num_steps: int) -> tuple[int, ...]:
        assert self.mask_policy is not None
        if not num_steps:
            return ()
        try:
            return tuple(steps_mask(total_steps=num_steps, mask_policy=self.mask_policy))
        except ConfigError:
            log.warning(
                "cachedit_fx: a run of a sampler has %d steps, for which there is no mask, so that every step of it is "
                "computed.\n  mask: %s\n"
                "What to do: give the sampler 4, 6, or at least 8 steps, or decide by a threshold.",
                num_steps,
                self.mask_policy,
            )
            return (1,) * num_steps
