"""What one field of a configuration asks of the others."""

from __future__ import annotations

from cachedit_fx.config.fields import Fields
from cachedit_fx.errors import ConfigError, shown


def check_together(config: Fields) -> None:
    """What one field asks of the others; a partial configuration need not satisfy it.

    Raises:
        ConfigError: Nothing is measured and nothing decides without it, or two fields exclude each other.
    """
    _check_probe(config)
    if config.rescale_coefficients and config.decision_rule != "budget":
        raise ConfigError(
            f"cachedit_fx: rescale_coefficients must be () unless decision_rule='budget', got "
            f"{shown(config.rescale_coefficients)} with decision_rule={config.decision_rule!r}.\n"
            "What to do: give policy=Budget(coefficients=...) instead of both."
        )
    if config.start_percent >= config.end_percent:
        raise ConfigError(
            f"cachedit_fx: start_percent must be below end_percent, which is {config.end_percent:g}, got "
            f"{config.start_percent:g}: steps are reused between the two."
        )
    if config.reach == "output" and (config.Bn_compute_blocks or config.cache_type == "DBPrune"):
        raise ConfigError(
            "cachedit_fx: reach='output' skips everything up to the output, so Bn_compute_blocks must be 0 and "
            f"cache_type 'DBCache', got {config.Bn_compute_blocks} and {str(config.cache_type)!r}.\n"
            "What to do: change these two, or set reach='blocks'."
        )
    if config.guidance_reuse != "off":
        _check_guidance(config)


def _check_guidance(config: Fields) -> None:
    if config.cache_device is not None:
        raise ConfigError(
            "cachedit_fx: cache_device must be None with guidance_reuse='difference', which adds cached values of two "
            f"guidance branches on the device, got {config.cache_device!r}.\n"
            "What to do: leave out one of the two."
        )
    if config.enable_separate_cfg is False:
        raise ConfigError(
            "cachedit_fx: enable_separate_cfg must be True or None with guidance_reuse='difference', which needs one "
            "call of the model per guidance branch, got False."
        )
    if config.guidance_reuse_threshold is not None and (config.probe in ("none", "timestep") or config.is_static):
        raise ConfigError(
            "cachedit_fx: guidance_reuse_threshold must be None where nothing is measured, got "
            f"{shown(config.guidance_reuse_threshold)} with {_unmeasured(config)}.\n"
            "What to do: limit the steps by max_continuous_guidance_steps or guidance_computation_mask."
        )


def _unmeasured(config: Fields) -> str:
    return "steps_computation_policy='static'" if config.is_static else f"probe={config.probe!r}"


def _check_probe(config: Fields) -> None:
    is_pruning = config.cache_type == "DBPrune"
    if is_pruning and config.probe != "fn_residual":
        raise ConfigError(
            "cachedit_fx: probe must be 'fn_residual' with cache_type='DBPrune', which measures the input of every "
            f"block, got {config.probe!r}."
        )
    if config.probe == "none" and not config.is_static and config.decider is None:
        raise ConfigError(f"cachedit_fx: probe='none' measures nothing, so it needs {_mask(config, ', or a decider')}")
    if (config.probe == "timestep") != bool(config.magnitude_ratios) or (
        config.probe == "timestep" and config.decision_rule != "budget"
    ):
        raise ConfigError(
            "cachedit_fx: probe='timestep', magnitude_ratios and decision_rule='budget' need each other, got "
            f"probe={config.probe!r}, magnitude_ratios={shown(config.magnitude_ratios)} and "
            f"decision_rule={config.decision_rule!r}.\n"
            "What to do: give policy=Magnitude(ratios=...) instead of all three, or neither probe nor magnitude_ratios."
        )
    if config.Fn_compute_blocks == 0 and config.probe == "fn_residual" and not config.is_static and not is_pruning:
        raise ConfigError(
            f"cachedit_fx: Fn_compute_blocks=0 leaves no residual to measure, so it needs {_mask(config)}\n"
            "What to do: set both, or set Fn_compute_blocks=1 to measure the residual over the first block, or "
            "probe='modulated_input' to measure its input."
        )


def _mask(config: Fields, or_else: str = "") -> str:
    """That a static mask is needed, and what was given."""
    return (
        f"steps_computation_mask and steps_computation_policy='static'{or_else}, got "
        f"{shown(config.steps_computation_mask)} and {config.steps_computation_policy!r}."
    )
