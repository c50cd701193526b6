"""A tuned configuration as a file, and back: `save`, `load_tuned`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import ConfigError
from cachedit_fx.forecasters.forecaster_registry import as_mapping
from cachedit_fx.integrations.signature import Signature


class Tuned(NamedTuple):
    """A configuration, and what it was tuned on: for `enable_cache(pipe, config)` and `check_signature`."""

    config: CacheConfig
    signature: Signature


def load_tuned(path: str | PathLike[str]) -> Tuned:
    """Reads what `TuneResult.save` wrote.

    Raises:
        ConfigError: The file cannot be read, or is not one of these.
        ImportError: A YAML file, and PyYAML is not installed.
    """
    text = _read(Path(path))
    try:
        known = json.loads(text) if Path(path).suffix == ".json" else _yaml().safe_load(text)
    except ValueError as error:
        raise _no_result(path) from error
    except Exception as error:  # YAML's own errors have no base class that is known without it.
        if type(error).__module__.startswith("yaml"):
            raise _no_result(path) from error
        raise
    if not isinstance(known, Mapping) or not all(isinstance(known.get(n), Mapping) for n in ("cache_config", "tuned")):
        raise _no_result(path)
    return Tuned(CacheConfig(**known["cache_config"]), dict(known["tuned"].get("signature") or {}))


def save(path: str | PathLike[str], config: CacheConfig, tuned: Mapping[str, Any]) -> Path:
    """Writes YAML, or JSON where the name ends so.

    Args:
        tuned: The signature, and what was found, of numbers, strings, lists and dicts.

    Raises:
        ImportError: Not a JSON file, and PyYAML is not installed.
    """
    target, content = Path(path), {"cache_config": config_to(config), "tuned": dict(tuned)}
    if target.suffix == ".json":
        text = json.dumps(content, indent=2) + "\n"
    else:
        text = _yaml().safe_dump(json.loads(json.dumps(content)), sort_keys=False, default_flow_style=None, width=120)
    target.write_text(text, encoding="utf-8")
    return target


def config_to(config: CacheConfig) -> dict[str, Any]:
    """What differs from the defaults of `CacheConfig` or was given, of what JSON holds.

    Raises:
        ConfigError: The forecaster's class has no name.
    """
    named = dict(config.plain_changes) | {"forecaster": as_mapping(config.forecaster)}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()}
    # A member of an enum is a str to JSON, but nothing that YAML knows.
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
    return ConfigError(f"cachedit_fx: path must be a file that TuneResult.save wrote, got {str(path)!r}, which is not")


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "cachedit_fx: YAML needs PyYAML, which is not installed: pip install pyyaml; or give a path that ends in "
            ".json"
        ) from error
    return yaml
