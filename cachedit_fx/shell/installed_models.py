"""Which transformer classes of diffusers are installed, and which of them the tests of this package ran."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "tested_models.json"  # Written by `make models`.


@dataclass(frozen=True)
class InstalledModels:
    """The transformer classes of the installed diffusers.

    Attributes:
        tested_with: The version of diffusers that the tests ran with.
        cached: The installed classes that were tested, all of which are cached -> what that takes; empty for nothing.
        uncached: The installed classes that are not cached -> the reason.
        untested: The other installed classes.
    """

    tested_with: str
    cached: dict[str, str]
    uncached: dict[str, str]
    untested: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can store them."""
        return asdict(self)


def installed_models() -> InstalledModels | None:
    """Compares the installed diffusers with the table of tested classes; None if diffusers is not installed.

    diffusers is not imported: its classes are found in its source files.
    """
    spec = importlib.util.find_spec("diffusers")
    if spec is None or not spec.submodule_search_locations:
        return None
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    models: dict[str, str] = table["models"]
    reasons: dict[str, str] = table["uncached"]
    found = sorted(_classes(Path(spec.submodule_search_locations[0]) / "models", models))
    cached = {name: models[name] for name in found if name in models}
    uncached = {name: reasons[name] for name in found if name in reasons}
    untested = [name for name in found if name not in models and name not in reasons]
    return InstalledModels(table["diffusers"], cached, uncached, untested)


def _classes(folder: Path, tested: dict[str, str]) -> Iterator[str]:
    """The models in `transformers/`, and those in other folders that were tested."""
    for file in folder.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        is_transformer = file.parent.name == "transformers"
        if not is_transformer and not any(f"class {name}(" in text for name in tested):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and (node.name in tested or (is_transformer and _is_model(node))):
                yield node.name


def _is_model(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).rpartition(".")[2] == "ModelMixin" for base in node.bases)
