"""What values a field of `CacheConfig` may have, and what one field asks of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cachedit_fx.errors import ConfigError, did_you_mean, shown
from cachedit_fx.forecasters.forecaster import Forecaster
from cachedit_fx.forecasters.forecaster_registry import forecaster_from

if TYPE_CHECKING:
    from cachedit_fx.config.cache_config import CacheConfig

CACHE_TYPES = ("DBCache", "DBPrune")
_COUNTS = {"Fn_compute_blocks": 0, "Bn_compute_blocks": 0, "max_warmup_steps": 0, "warmup_interval": 1}
_LIMITS = {"max_cached_steps": -1, "max_continuous_cached_steps": -1}
_OPTIONAL_COUNTS = {"num_inference_steps": 1, "force_refresh_step_hint": 1, "max_state_bytes": 0}
_NUMBERS = ("residual_diff_threshold", "dynamic_prune_threshold_relax_ratio")
_OPTIONAL_NUMBERS = ("max_accumulated_residual_diff_threshold", "max_dynamic_prune_threshold")
_SWITCHES = (
    *("cfg_compute_first", "cfg_diff_compute_separate", "enable_dynamic_prune_threshold"),
    *("fast_dispatch", "shadow"),
)
_CHOICES = {
    "cache_type": CACHE_TYPES,
    "steps_computation_policy": ("dynamic", "static"),
    "force_refresh_step_policy": ("once", "repeat"),
    "on_no_match": ("fallback", "raise"),
    "regions": ("merged", "per_list"),
    "compile_blocks": ("once", "inline"),
    "reach": ("blocks", "output"),
    "probe": ("fn_residual", "modulated_input", "timestep", "none"),
    "batch_decision": ("mean", "any"),
    "decision_rule": ("threshold", "budget"),
}


def as_forecaster(field: str, value: object) -> Forecaster | None:
    """A forecaster as it may be given: itself, or the mapping that a file has in its place.

    Raises:
        ConfigError: It is neither, or the mapping names no forecaster.
    """
    if value is None or isinstance(value, Forecaster):
        return value
    if isinstance(value, Mapping | str):
        return forecaster_from(value)
    hint = f"; give {value.__name__}()" if isinstance(value, type) and issubclass(value, Forecaster) else ""
    raise ConfigError(
        f"cachedit_fx: {field} must be None, a Forecaster, or the name or mapping of one, got {shown(value)}{hint}"
    )


def check_fields(config: CacheConfig) -> None:
    """Every field on its own.

    Raises:
        ConfigError: One has a value that it cannot have.
    """
    for name, least in (_COUNTS | _LIMITS).items():
        _check_int(name, getattr(config, name), least=least)
    for name, least in _OPTIONAL_COUNTS.items():
        if getattr(config, name) is not None:
            _check_int(name, getattr(config, name), least=least)
    for name in (*_NUMBERS, *(n for n in _OPTIONAL_NUMBERS if getattr(config, n) is not None)):
        _check_float(name, getattr(config, name))
    for name in (*_SWITCHES, *(("enable_separate_cfg",) if config.enable_separate_cfg is not None else ())):
        _check_choice(name, getattr(config, name), (True, False))
    for name, allowed in _CHOICES.items():
        _check_choice(name, getattr(config, name), allowed)
    if config.steps_computation_mask is not None:
        _check_list("steps_computation_mask", config.steps_computation_mask, "0 and 1", lambda m: m in (0, 1), least=1)
    _check_list("non_prune_block_ids", config.non_prune_block_ids, "ints >= 0", lambda i: isinstance(i, int) and i >= 0)
    _check_list("rescale_coefficients", config.rescale_coefficients, "finite numbers", _is_finite)
    _check_list("magnitude_ratios", config.magnitude_ratios, "numbers > 0", lambda r: _is_finite(r) and r > 0)
    _check_decider(config.decider)
    _check_inner_backend(config.inner_backend)
    if config.debug_dir is not None and not (isinstance(config.debug_dir, str) and config.debug_dir):
        raise ConfigError(f"cachedit_fx: debug_dir must be the path of a folder, got {shown(config.debug_dir)}")
    if config.mode is not None:
        from torch._inductor import list_mode_options

        _check_choice("mode", config.mode, ("default", *sorted(list_mode_options())))


def check_together(config: CacheConfig) -> None:
    """What one field asks of the others; a partial configuration need not satisfy it.

    Raises:
        ConfigError: Nothing is left to look at and nothing decides without looking, or two fields exclude each other.
    """
    _check_probe(config)
    if config.rescale_coefficients and config.decision_rule != "budget":
        raise ConfigError(
            f"cachedit_fx: rescale_coefficients must be () unless decision_rule='budget' adds diffs up, got "
            f"{shown(config.rescale_coefficients)} with decision_rule={config.decision_rule!r}"
        )
    if config.reach == "output" and (config.Bn_compute_blocks or config.cache_type == "DBPrune"):
        raise ConfigError(
            "cachedit_fx: reach='output' leaves out all up to the output, so Bn_compute_blocks must be 0 and "
            f"cache_type 'DBCache', got {config.Bn_compute_blocks} and {str(config.cache_type)!r}"
        )


def _check_probe(config: CacheConfig) -> None:
    is_pruning = config.cache_type == "DBPrune"
    if is_pruning and config.probe != "fn_residual":
        raise ConfigError(
            "cachedit_fx: probe must be 'fn_residual' with cache_type='DBPrune', which looks at the input of every "
            f"block, got {config.probe!r}"
        )
    if config.probe == "none" and not config.is_static and config.decider is None:
        raise ConfigError(
            "cachedit_fx: probe='none' leaves nothing to look at, so it needs steps_computation_mask and "
            f"steps_computation_policy='static', or a decider, got mask {shown(config.steps_computation_mask)} and "
            f"policy {config.steps_computation_policy!r}"
        )
    if (config.probe == "timestep") != bool(config.magnitude_ratios) or (
        config.probe == "timestep" and config.decision_rule != "budget"
    ):
        raise ConfigError(
            "cachedit_fx: probe='timestep', magnitude_ratios and decision_rule='budget' need each other, got "
            f"probe={config.probe!r}, magnitude_ratios={shown(config.magnitude_ratios)} and "
            f"decision_rule={config.decision_rule!r}.\n"
            "What to do: give all three, or neither of the first two."
        )
    if config.Fn_compute_blocks == 0 and config.probe == "fn_residual" and not config.is_static and not is_pruning:
        raise ConfigError(
            "cachedit_fx: Fn_compute_blocks=0 leaves nothing to look at, so it needs steps_computation_mask and "
            f"steps_computation_policy='static', got mask {shown(config.steps_computation_mask)} and policy "
            f"{config.steps_computation_policy!r}.\n"
            "What to do: set both, or Fn_compute_blocks=1 to look at the first block, or probe='modulated_input' to "
            "look at its input."
        )


def _check_int(field: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"cachedit_fx: {field} must be an int >= {least}, got {shown(value)}")


def _check_float(field: str, value: object) -> None:
    if not _is_finite(value):
        raise ConfigError(f"cachedit_fx: {field} must be a finite number, got {shown(value)}")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_list(field: str, value: object, of: str, is_allowed: Callable[[Any], bool], *, least: int = 0) -> None:
    if not isinstance(value, tuple) or len(value) < least or not all(map(is_allowed, value)):
        raise ConfigError(f"cachedit_fx: {field} must be a list of {of}, got {shown(value)}")


def _check_choice(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if any(value == known and isinstance(value, type(known) | str) for known in allowed):
        return
    hint = did_you_mean(value, allowed)
    raise ConfigError(f"cachedit_fx: {field} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}.{hint}")


def _check_decider(value: object) -> None:
    if value is None:
        return
    decides = not isinstance(value, type) and callable(getattr(value, "decide", None))
    if not decides or type(value).__hash__ is None:
        raise ConfigError(
            f"cachedit_fx: decider must be a hashable object with a method decide(step), or None, got {shown(value)}"
        )


def _check_inner_backend(value: object) -> None:
    from torch._dynamo.backends.registry import list_backends

    allowed = [name for name in list_backends(exclude_tags=()) if name != "cachedit"]
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(
            "cachedit_fx: inner_backend must be the name of a torch.compile backend but 'cachedit', as 'inductor', "
            f"'aot_eager' or 'eager', got {shown(value)}.{did_you_mean(value, allowed)}\n"
            "See all names: torch.compiler.list_backends(exclude_tags=())"
        )
