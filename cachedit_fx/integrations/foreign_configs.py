"""Translates the configurations of other caches for `enable_cache`: those of diffusers, and the objects of cache-dit.

None of these packages is imported. A configuration is recognized by the name of its class and the package of that
class, and read by its attributes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cachedit_fx.config.cache_config import FIELD_NAMES, CacheConfig, DBCacheConfig, DBPruneConfig
from cachedit_fx.config.rules import Magnitude
from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.forecasters.taylorseer import TaylorSeerCalibratorConfig
from cachedit_fx.policies.decider import StepView

log = logging.getLogger(__name__)

_LEGACY = ("enable_taylorseer", "enable_encoder_taylorseer", "taylorseer_cache_type", "taylorseer_order")

# The parts of a configuration of cache-dit that are not about caching, and what does the same.
OTHER_PARTS = {
    "parallelism_config": "call transformer.enable_parallelism(config=ContextParallelConfig(...)) of diffusers",
    "attention_backend": "call transformer.set_attention_backend(...) of diffusers",
    "quantize_config": "quantize the transformer with torchao before enable_cache",
}

# What the caches of diffusers do that have no counterpart here.
_INSIDE = "It reuses parts inside of the blocks, and this cache reuses what whole blocks add."
_REFUSED = {
    "SeaCacheConfig": "It compares filtered latents, and this cache compares what it finds in the graph.",
    "TextKVCacheConfig": "It caches keys and values of the prompt, and this cache reuses what whole blocks add.",
}

# The switches by which a file of cache-dit chooses a calibrator, and what each belongs to.
_SWITCHES = {"enable_taylorseer": "taylorseer", "enable_dmd": "dmd", "enable_foca": "foca"}


@dataclass(frozen=True)
class Interval:
    """The decider of `TaylorSeerCacheConfig`: which steps it computes, from the number of a step alone.

    Attributes:
        interval: The number of steps from one computed step to the next.
        before: The number of first steps that are computed.
        after: The number of the first step from which on all steps are computed; None for no such step.
    """

    interval: int
    before: int
    after: int | None

    def decide(self, step: StepView) -> bool:
        """Whether to compute (diffusers 0.42, `TaylorSeerCacheHook._measure_should_compute`)."""
        is_last = self.after is not None and step.number >= self.after
        return step.number < self.before or is_last or (step.number - self.before - 1) % self.interval == 0


def as_cache_config(given: object) -> CacheConfig | None:
    """The configuration for what `enable_cache` receives as `cache_config`.

    Raises:
        ConfigError: It is not a configuration, or it asks for something that has no counterpart here.
    """
    if given is None or isinstance(given, CacheConfig):
        return given
    package, name = _origin(given)
    if package == "cache_dit":
        return _from_cache_dit(given)
    if package == "diffusers" and name in _FROM_DIFFUSERS:
        return _FROM_DIFFUSERS[name](given)
    if package == "diffusers" and name.endswith("Config"):
        raise ConfigError(
            f"cachedit_fx: cache_config must be a CacheConfig, or one of {', '.join(_FROM_DIFFUSERS)} of diffusers, "
            f"got a {name}.\n"
            f"{_REFUSED.get(name, _INSIDE)}\n"
            "What to do: give a CacheConfig, or enable the cache of diffusers alone: transformer.enable_cache(config)."
        )
    raise ConfigError(f"cachedit_fx: cache_config must be a CacheConfig, got {shown(given)}{_hint(given)}")


def _hint(given: object) -> str:
    """What to write instead of what was given as a configuration."""
    if isinstance(given, Mapping):
        return "; give CacheConfig(**...) with this mapping"
    if isinstance(given, str | os.PathLike):
        return "; for a file, call enable_cache(pipe, **load_configs(path))"
    return "; give CacheConfig(...), or its fields as arguments of enable_cache"


def as_calibrator(given: object) -> object:
    """The `calibrator_config` of `enable_cache`, with an object of cache-dit translated into the mapping of a file."""
    if given is None or _origin(given)[0] != "cache_dit" or not dataclasses.is_dataclass(given):
        return given
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    fields |= fields.pop("calibrator_kwargs", None) or {}
    if not fields.pop("enable_calibrator", True) and not fields.get("enable_encoder_calibrator"):
        return None
    return {"type": fields.pop("calibrator_type"), **fields}


def without_legacy(kwargs: dict[str, Any], calibrator: object) -> object:
    """Removes the former arguments of cache-dit for TaylorSeer from `kwargs`, and returns the calibrator they mean."""
    found = {name: kwargs.pop(name) for name in _LEGACY if name in kwargs}
    if not found:
        return calibrator
    hidden, encoder = (bool(found.get(name)) for name in _LEGACY[:2])
    order = found.get("taylorseer_order", 1)
    log.warning(
        "cachedit_fx: enable_cache's arguments for TaylorSeer (%s) are deprecated, as in cache-dit.\n"
        "What to do: give forecaster=TaylorSeerCalibratorConfig(taylorseer_order=%s) instead.",
        *(", ".join(found), order),
    )
    if calibrator is not None or not (hidden or encoder):
        return calibrator
    return TaylorSeerCalibratorConfig(
        taylorseer_order=order,
        enable_calibrator=hidden,
        enable_encoder_calibrator=encoder,
        calibrator_cache_type=found.get("taylorseer_cache_type", "residual"),
    )


def calibrator_in(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Removes from the fields of a file of cache-dit those of a calibrator, and returns them as its mapping.

    Raises:
        ConfigError: More than one calibrator is enabled.
    """
    switches = {name: bool(fields.pop(name)) for name in _SWITCHES if name in fields}
    settings = {
        name: fields.pop(name)
        for name in list(fields)
        if name.startswith(("enable_encoder_", "taylorseer_", "dmd_")) or name == "calibrator_cache_type"
    }
    enabled = [name for name, is_enabled in switches.items() if is_enabled]
    if len(enabled) > 1:
        raise ConfigError(f"cachedit_fx: a file must enable one calibrator at most, got {' and '.join(enabled)}")
    if not enabled:
        return None
    kind = _SWITCHES[enabled[0]]
    others = ("enable_encoder_", "taylorseer_", "dmd_")
    found = {name: value for name, value in settings.items() if not name.startswith(others) or name.startswith(kind)}
    cache_type = found.pop("taylorseer_cache_type", found.pop("calibrator_cache_type", "residual"))
    encoder = settings.get(f"enable_encoder_{kind}", kind == "dmd")
    return {"type": kind, "enable_encoder_calibrator": encoder, "calibrator_cache_type": cache_type, **found}


def without_other_parts(given: dict[str, Any], what: str) -> None:
    """Removes what is not about caching, and warns once of the parts that are not None.

    Args:
        given: A mapping of arguments or of the parts of a file; it is changed.
        what: The subject of the warning.
    """
    left = [name for name in OTHER_PARTS if given.pop(name, None) is not None]
    if left:
        log.warning(
            "cachedit_fx: %s parts that are not about caching. They are left out.\n  found: %s\nWhat to do: %s.",
            *(what, ", ".join(left), "; ".join(f"for {name}, {OTHER_PARTS[name]}" for name in left)),
        )


def _origin(given: object) -> tuple[str, str]:
    """The package and the name of the class of an object."""
    kind = type(given)
    return kind.__module__.partition(".")[0], kind.__name__


def _from_cache_dit(given: Any) -> CacheConfig:
    """Our configuration with the fields of one of cache-dit; those at the defaults of cache-dit are not given."""
    if not dataclasses.is_dataclass(given):
        raise ConfigError(
            f"cachedit_fx: cache_config must be a CacheConfig or a dataclass of cache-dit, got a {type(given).__name__}"
        )
    kind = DBPruneConfig if hasattr(given, "enable_dynamic_prune_threshold") else DBCacheConfig
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value == default:
            continue
        if field.name not in FIELD_NAMES:
            log.warning(
                "cachedit_fx: %s.%s=%s is ignored: it has no counterpart here.\nWhat to do: remove it.",
                *(type(given).__name__, field.name, shown(value)),
            )
            continue
        fields[field.name] = getattr(value, "value", value)
    return kind(**fields)


def _first_block_cache(given: Any) -> CacheConfig:
    """FirstBlockCache reuses a step if the diff over the first block is at most the threshold."""
    if given.threshold >= 1:
        raise ConfigError(
            f"cachedit_fx: FirstBlockCacheConfig.threshold must be below 1, got {given.threshold}: from 1 on, "
            "residual_diff_threshold reuses every step without measuring."
        )
    return CacheConfig(
        Fn_compute_blocks=1,
        max_warmup_steps=0,
        forecaster=None,
        residual_diff_threshold=_at_most(given.threshold),
    )


def _mag_cache(given: Any) -> CacheConfig:
    """MagCache accumulates the errors that the ratios predict, as `Magnitude` does, from `retention_ratio` on."""
    if given.calibrate or given.mag_ratios is None:
        raise ConfigError(
            "cachedit_fx: MagCacheConfig.calibrate must be False, got True: the ratios are measured by diffusers.\n"
            "What to do: run transformer.enable_cache(config) of diffusers once, and give mag_ratios here."
        )
    return CacheConfig(
        Fn_compute_blocks=0,
        forecaster=None,
        policy=Magnitude([float(ratio) for ratio in given.mag_ratios], _at_most(given.threshold)),
        max_warmup_steps=int(given.retention_ratio * given.num_inference_steps + 0.5),
        max_continuous_cached_steps=given.max_skip_steps,
    )


def _taylorseer_cache(given: Any) -> CacheConfig:
    """The steps and the order of diffusers' TaylorSeer.

    diffusers forecasts the output of every attention and feed-forward layer. Here, the residual of all blocks together
    is forecast, so the outputs differ.
    """
    for name in ("skip_predict_identifiers", "cache_identifiers", "use_lite_mode"):
        if getattr(given, name, None):
            raise ConfigError(
                f"cachedit_fx: TaylorSeerCacheConfig.{name} must be left at its default, got "
                f"{shown(getattr(given, name))}: it chooses layers inside of the blocks, and this cache forecasts what "
                "whole blocks add.\nWhat to do: leave it out, or give Fn_compute_blocks and Bn_compute_blocks."
            )
    return CacheConfig(
        Fn_compute_blocks=0,
        probe="none",
        max_warmup_steps=0,
        decider=Interval(given.cache_interval, given.disable_cache_before_step, given.disable_cache_after_step),
        forecaster=TaylorSeerCalibratorConfig(taylorseer_order=given.max_order),
    )


def _at_most(threshold: float) -> float:
    """The threshold of a strict comparison that equals `<= threshold`."""
    return math.nextafter(threshold, math.inf)


_FROM_DIFFUSERS: Mapping[str, Callable[[Any], CacheConfig]] = {
    "FirstBlockCacheConfig": _first_block_cache,
    "MagCacheConfig": _mag_cache,
    "TaylorSeerCacheConfig": _taylorseer_cache,
}
