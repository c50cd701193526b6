"""Imports go one way: no modules import each other, and no package imports one above it. One file uses Dynamo."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

PACKAGE = Path(__file__).parent.parent / "cachedit_fx"

# From the bottom to the top. Packages of the same level must not import each other either.
PACKAGE_LEVELS = (
    ("_version", "errors", "forking"),
    ("forecasters", "figure"),
    ("config",),
    ("patterns", "policies"),
    ("flops",),
    ("passes",),
    ("functors", "runtime"),
    ("frontend", "cache_factory"),
    ("integrations",),
    ("saving", "tuning"),
    ("inspect",),
    ("exporting", "testing", "shell"),
    ("__main__",),
)
LEVELS = {package: level for level, packages in enumerate(PACKAGE_LEVELS) for package in packages}


def modules() -> dict[str, Path]:
    """Every module by its name, except `cachedit_fx` itself, which exports from all packages."""
    files = [file for folder in (PACKAGE, *PACKAGE.iterdir()) if folder.is_dir() for file in folder.rglob("*.py")]
    names = {".".join(("cachedit_fx", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items() if name != "cachedit_fx.__init__"}


def imports(file: Path) -> Iterator[str]:
    """The imports of a module, including those inside functions and for type checkers."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


@pytest.fixture(scope="module")
def graph() -> networkx.DiGraph:
    found = modules()
    edges = [(name, other) for name, file in found.items() for other in imports(file) if other in found]
    made = networkx.DiGraph(edge for edge in edges if edge[0] != edge[1])
    assert len(made) > 120
    return made


def test_no_modules_import_each_other(graph: networkx.DiGraph):
    assert [sorted(found) for found in networkx.strongly_connected_components(graph) if len(found) > 1] == []


def test_every_package_imports_only_from_packages_below_it(graph: networkx.DiGraph):
    packages = [(one.split(".")[1], other.split(".")[1], one, other) for one, other in graph.edges]
    upwards = [
        (one, other) for package, below, one, other in packages if package != below and LEVELS[package] <= LEVELS[below]
    ]
    assert upwards == []


# Private to torch: Dynamo, Inductor, the modules below them, and the names in `torch` that refer to them.
PRIVATE = ("torch._dynamo", "torch._inductor", "torch._guards", "torch._C._dynamo", "torch._TorchCompile")
MAY_USE_THEM = {
    "cachedit_fx.frontend.torch_internals": PRIVATE,
    "cachedit_fx.frontend.trace_internals": PRIVATE,
    "cachedit_fx.frontend.guard_records": PRIVATE,  # The names that only saved guards need.
    # These two are below `frontend`. The documentation of `torch.compile` names the functions that they use.
    "cachedit_fx.config.cache_config": ("torch._inductor.list_options",),
    "cachedit_fx.config.values": ("torch._inductor.list_mode_options",),
}


def names_used(file: Path) -> Iterator[str]:
    """The imports of a module, including those for types, and every dotted name in it: `torch._dynamo.config`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def private_names(name: str, file: Path) -> set[str]:
    """The private names that a module uses without permission."""
    allowed = MAY_USE_THEM.get(name, ())
    found = {used for used in names_used(file) if used.startswith(PRIVATE)}
    return {used for used in found if not used.startswith(allowed) and not any(one.startswith(used) for one in allowed)}


def test_only_the_modules_for_it_use_the_private_names_of_dynamo_and_inductor():
    found = {name: used for name, file in modules().items() if (used := private_names(name, file))}
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo.config",
        "from torch import _dynamo",
        "from torch._dynamo import exc",
        "def f():\n    from torch._inductor import config",
        "limit = torch._dynamo.config.recompile_limit",
        "version = torch._C._dynamo.guards.dict_version",
        "inductor = torch._TorchCompileInductorWrapper",
        "from torch._guards import Source",
    ],
)
def test_a_use_of_a_private_name_is_found(line: str, tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text(f"{line}\n", encoding="utf-8")
    assert private_names("cachedit_fx.runtime.step", file)
    assert not private_names("cachedit_fx.frontend.torch_internals", file)


def test_every_exception_for_a_private_name_is_needed():
    config = [(name, part) for name, parts in MAY_USE_THEM.items() if parts is not PRIVATE for part in parts]
    for name, part in config:
        assert part in {*names_used(modules()[name])}, name


def test_every_package_documents_its_content():
    packages = [folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()]
    assert {folder.name for folder in packages} <= LEVELS.keys()
    for folder in packages:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder.name


def test_no_model_is_special_cased_outside_its_functor():
    """Code for a specific model belongs in its functor."""
    others = [file for name, file in modules().items() if not name.startswith("cachedit_fx.functors.")]
    assert [file for file in others if "HiDream" in file.read_text(encoding="utf-8")] == [
        PACKAGE / "cache_factory" / "patch_functors" / "__init__.py"
    ]


def test_every_lock_is_released_in_a_forked_process():
    code = "".join(file.read_text(encoding="utf-8") for file in modules().values())
    locks = re.findall(r"(\w+\()?threading\.R?Lock\(\)", code)
    assert len(locks) >= 8 and {*locks} == {"released_in_child("}


def test_no_two_files_have_one_name():
    names = [file.name for file in modules().values() if file.name != "__init__.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []
