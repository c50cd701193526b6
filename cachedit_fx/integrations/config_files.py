"""Loads configurations from files: `load_configs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from cachedit_fx.config.cache_config import OPTION_NAMES, CacheConfig, CacheType, DBCacheConfig, DBPruneConfig
from cachedit_fx.config.steps_mask import steps_mask
from cachedit_fx.errors import ConfigError, did_you_mean, shown
from cachedit_fx.integrations.block_adapter import with_calibrator
from cachedit_fx.integrations.foreign_configs import OTHER_PARTS, calibrator_in, without_other_parts

_PARTS = ("cache_config", "calibrator_config", "tuned")


def load_configs(path_or_dict: str | PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Reads arguments for `enable_cache(pipe, **load_configs(...))` from a YAML or JSON file, or from a dict.

        cache_config:
          max_warmup_steps: 8
          num_inference_steps: 28
          steps_computation_mask: fast        # a policy of `steps_mask`, or a list of 0 and 1
        calibrator_config:                    # or forecaster, as a field of cache_config
          type: taylorseer
          taylorseer_order: 2

    The fields may also be at the top level, without `cache_config`. The format is that of cache-dit, and so are the
    defaults of fields that are omitted: the result is a `DBCacheConfig`, or a `DBPruneConfig` if `cache_type` is
    "DBPrune". `cache_config` may also contain one mapping of fields for each transformer, by its name. The switches
    `enable_taylorseer`, `enable_dmd` and `enable_foca` of such a file, with their settings, are a `calibrator_config`.
    Parts that are not about caching are left out, with a warning. A file that `tune` saved results in a `CacheConfig`
    instead, and its signature is returned as `tuned_on`.

    Raises:
        ConfigError: The file cannot be read or has another structure, a field is unknown, or its value is not allowed.
        ImportError: The file is YAML, and PyYAML is not installed.
    """
    content = dict(path_or_dict) if isinstance(path_or_dict, Mapping) else _read(Path(path_or_dict))
    calibrator, tuned = content.pop("calibrator_config", None), None
    is_partial = bool(content) and content.keys() <= OTHER_PARTS.keys()
    without_other_parts(content, "a configuration file has")
    if is_partial:
        raise ConfigError(
            "cachedit_fx: a configuration file must have a cache_config, or fields of one, got neither; without one, "
            "omit enable_cache"
        )
    if is_whole := "cache_config" in content:
        _check_parts(content)
        tuned = content.get("tuned")
        content = content["cache_config"] or {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"cachedit_fx: cache_config must be a mapping of fields, got {shown(content)}")
    found: dict[str, Any] = {"cache_config": None}
    if is_whole and is_per_transformer(content):
        found["cache_config"] = {str(n): _config(each, calibrator, tuned is not None) for n, each in content.items()}
    else:
        found["cache_config"] = _config(content, calibrator, tuned is not None)
    if isinstance(tuned, Mapping) and isinstance(tuned.get("signature"), Mapping):
        found["tuned_on"] = tuned["signature"]
    return found


def is_per_transformer(content: Mapping[str, Any]) -> bool:
    """Returns whether a mapping contains the fields of one configuration for each transformer, by its name."""
    fields = [value for name, value in content.items() if name not in OPTION_NAMES]
    return bool(content) and len(fields) == len(content) and all(isinstance(value, Mapping) for value in fields)


def _config(content: Mapping[str, Any], calibrator: object, is_tuned: bool) -> CacheConfig:
    fields = {str(name): value for name, value in content.items()}
    calibrator = calibrator_in(fields) or calibrator
    if isinstance(fields.get("steps_computation_mask"), str):
        total = fields.get("num_inference_steps")
        if total is None:
            raise ConfigError(
                "cachedit_fx: num_inference_steps must be given with "
                f"steps_computation_mask={fields['steps_computation_mask']!r}, got None"
            )
        fields["steps_computation_mask"] = steps_mask(mask_policy=fields["steps_computation_mask"], total_steps=total)
    kind = DBPruneConfig if fields.get("cache_type") == CacheType.DBPrune else DBCacheConfig
    base = CacheConfig() if is_tuned else kind()
    return with_calibrator(base.override(**fields), calibrator)


def _check_parts(content: Mapping[str, Any]) -> None:
    """Raises a `ConfigError` if there is a part that neither this package nor cache-dit has."""
    others = sorted(set(content) - {*_PARTS})
    if others:
        name = others[0]
        belongs = f" Move it into cache_config: {name} is an option." if name in OPTION_NAMES else ""
        raise ConfigError(
            f"cachedit_fx: {name!r} (given {shown(content[name])}) is no part of a configuration file."
            f"{belongs or did_you_mean(name, (*_PARTS, *OTHER_PARTS))}\nAllowed: {', '.join(_PARTS)}."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cachedit_fx: configuration file {str(path)!r} cannot be read: {error.strerror}; pass the path of a YAML "
            "or JSON file"
        ) from error
    try:
        found = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except ValueError as error:
        raise ConfigError(
            f"cachedit_fx: configuration file {str(path)!r} cannot be parsed: expected "
            f"{'JSON' if path.suffix == '.json' else 'YAML (the name of a JSON file must end in .json)'}. "
            f"The error of the parser is:\n{error}"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"cachedit_fx: configuration file {str(path)!r} must contain a mapping, got {shown(found)}")
    return found


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "cachedit_fx: YAML needs PyYAML, which is not installed: pip install pyyaml, or pass a JSON file whose "
            "name ends in .json"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
