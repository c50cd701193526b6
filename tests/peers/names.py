"""The public names of cache-dit with their arguments, as data: `python -m tests.peers.names` writes them anew.

The page docs/from-cache-dit.md has a verdict on each of them.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import types
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded" / "cache_dit_names.json"

# Arguments that cache-dit takes as **kwargs and reads by name.
HIDDEN = {
    "enable_cache": ["enable_taylorseer", "enable_encoder_taylorseer", "taylorseer_cache_type", "taylorseer_order"],
    "refresh_context": ["cache_config", "calibrator_config", "verbose"],
}


def recorded() -> dict[str, list[str]]:
    """Every public name of the recorded version, with its arguments, fields, members or methods."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))["names"]


def names_of(package: types.ModuleType) -> dict[str, list[str]]:
    """The same for an installed version. Submodules are left out: what they export is in the package itself."""
    found = {name: value for name, value in vars(package).items() if not name.startswith("_")}
    return {
        name: [*_parts(value), *HIDDEN.get(name, ())]
        for name, value in sorted(found.items())
        if not isinstance(value, types.ModuleType)
    }


def _parts(value: Any) -> list[str]:
    if isinstance(value, enum.Enum) or not callable(value):
        return []
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        return list(value.__members__)
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parts = [name for name, given in inspect.signature(value).parameters.items() if given.kind not in variable]
    if inspect.isclass(value):
        parts += [name for name in vars(value) if not name.startswith("_")]
    return parts


def main() -> None:
    """Writes the names of the installed version."""
    import cache_dit

    content = {"version": cache_dit.__version__, "names": names_of(cache_dit)}
    RECORDED.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
