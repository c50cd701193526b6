"""Saves a tuned configuration to a file and loads it again: `save`, `load_tuned`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import ConfigError
from cachedit_fx.forecasters.forecaster_registry import as_mapping
from cachedit_fx.integrations.config_files import is_per_transformer
from cachedit_fx.integrations.signature import Signature

# The configuration of a single transformer, or of each transformer by its name.
Config = CacheConfig | Mapping[str, CacheConfig]


class Tuned(NamedTuple):
    """A tuned configuration.

    Attributes:
        config: The configuration, for `enable_cache(pipe, config)`.
        signature: What it was tuned on, for `check_signature`.
    """

    config: Config
    signature: Signature


def load_tuned(path: str | PathLike[str]) -> Tuned:
    """Loads a file that `TuneResult.save` wrote.

    Raises:
        ConfigError: The file cannot be read, or was not written by `TuneResult.save`.
        ImportError: The file is YAML, and PyYAML is not installed.
    """
    text = _read(Path(path))
    try:
        found = json.loads(text) if Path(path).suffix == ".json" else _yaml().safe_load(text)
    except ValueError as error:
        raise _no_result(path) from error
    except Exception as error:  # The base class of YAML's errors is not available without PyYAML.
        if type(error).__module__.startswith("yaml"):
            raise _no_result(path) from error
        raise
    if not isinstance(found, Mapping) or not all(isinstance(found.get(n), Mapping) for n in ("cache_config", "tuned")):
        raise _no_result(path)
    fields, signature = found["cache_config"], dict(found["tuned"].get("signature") or {})
    if is_per_transformer(fields):
        return Tuned({name: CacheConfig(**each) for name, each in fields.items()}, signature)
    return Tuned(CacheConfig(**fields), signature)


def save(path: str | PathLike[str], config: Config, tuned: Mapping[str, Any]) -> Path:
    """Writes a configuration to a YAML file, or to a JSON file if the path ends in `.json`.

    Args:
        path: The file to write.
        config: The configuration, or one for each transformer.
        tuned: The signature and the results of the search, as numbers, strings, lists and dicts.

    Raises:
        ImportError: The path does not end in `.json`, and PyYAML is not installed.
    """
    target, content = Path(path), {"cache_config": configs_to(config), "tuned": dict(tuned)}
    if target.suffix == ".json":
        text = json.dumps(content, indent=2) + "\n"
    else:
        text = _yaml().safe_dump(json.loads(json.dumps(content)), sort_keys=False, default_flow_style=None, width=120)
    target.write_text(text, encoding="utf-8")
    return target


def configs_to(config: Config) -> dict[str, Any]:
    """Returns the fields of a configuration, or of each transformer's by its name, as values that JSON can hold."""
    if isinstance(config, CacheConfig):
        return config_to(config)
    return {name: config_to(each) for name, each in config.items()}


def config_to(config: CacheConfig) -> dict[str, Any]:
    """Returns the fields that were given or differ from the defaults of `CacheConfig`, as values that JSON can hold.

    Raises:
        ConfigError: The class of the forecaster is not registered.
    """
    named = dict(config.plain_changes) | {"forecaster": as_mapping(config.forecaster)}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()}
    # JSON treats a member of a string enum as a string, YAML does not.
    return {name: str(value) if isinstance(value, str) else value for name, value in fields.items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cachedit_fx: path must be a file that TuneResult.save wrote, got {str(path)!r}, which cannot be read: "
            f"{error.strerror}"
        ) from error


def _no_result(path: str | PathLike[str]) -> ConfigError:
    return ConfigError(f"cachedit_fx: path must be a file that TuneResult.save wrote, got {str(path)!r}")


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "cachedit_fx: YAML needs PyYAML, which is not installed: pip install pyyaml, or pass a path that ends in "
            ".json"
        ) from error
    return yaml
