"""Checks that a built wheel is complete and works outside the source tree.

    python .ci/check_wheel.py dist/cachedit_fx-0.1.0-py3-none-any.whl

The wheel is compared with the three source folders, installed alone into a temporary folder, and
every module in it is imported from `/`. Dependencies come from the interpreter that runs this
script; should that one also have an editable install of the package, each imported file is checked
to lie in the temporary folder. Exits with 1 and one line per problem.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Folder in the source tree -> folder in the wheel.
FOLDERS = {"cachedit_fx": "cachedit_fx", "passes": "cachedit_fx/passes", "patterns": "cachedit_fx/patterns"}

# Runs in a fresh process; argv: the folder that the wheel was installed into, then the modules.
PROBE = """
import importlib, sys
from importlib.metadata import distributions
from pathlib import Path

target = Path(sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert Path(module.__file__).resolve().is_relative_to(target), f"{name} came from {module.__file__}"

(dist,) = [d for d in distributions(path=[str(target)]) if d.metadata["Name"] == "cachedit_fx"]
(point,) = dist.entry_points.select(group="torch_dynamo_backends")
assert point.name == "cachedit", point
backend = point.load()
assert callable(backend), f"{point.value} is not callable: {backend!r}"
(script,) = dist.entry_points.select(group="console_scripts")
assert script.name == "cachedit-fx" and callable(script.load()), script

import torch._dynamo
assert "cachedit" in torch._dynamo.list_backends(), "torch.compile does not list the backend"
"""


def source_files() -> dict[str, Path]:
    """What the wheel must hold: path in the wheel -> file in the source tree."""
    files = {}
    for folder, packaged in FOLDERS.items():
        for parent, subfolders, names in os.walk(ROOT / folder):  # Stops at symlinks.
            subfolders[:] = [s for s in subfolders if s != "__pycache__"]
            for name in names:
                path = Path(parent, name)
                files[f"{packaged}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return files


def compare(wheel: Path) -> list[str]:
    """Differences between the wheel and the source folders, one line each."""
    problems = []
    expected = source_files()
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        for name, path in sorted(expected.items()):
            if name not in packed:
                problems.append(f"missing: {path.relative_to(ROOT)} (a folder without __init__.py, or package_data)")
            elif archive.read(name) != path.read_bytes():
                problems.append(f"differs from the source: {path.relative_to(ROOT)}")
    problems += [f"not in the source folders: {name}" for name in sorted(packed - expected.keys())]
    if "cachedit_fx/py.typed" not in packed:
        problems.append("missing: cachedit_fx/py.typed")
    return problems


def modules_of(wheel: Path) -> list[str]:
    """Import names of all modules in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
    return sorted(n.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for n in names)


def probe(wheel: Path) -> list[str]:
    """Installs the wheel alone and imports it from `/`. Returns what went wrong, if anything."""
    modules = modules_of(wheel)
    required = {"cachedit_fx", "cachedit_fx.passes", "cachedit_fx.patterns"}
    if absent := required.difference(modules):
        return [f"no such module in the wheel: {name}" for name in sorted(absent)]
    with tempfile.TemporaryDirectory(prefix="cachedit_fx-wheel-") as temporary:
        target = str(Path(temporary).resolve())
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target]
        subprocess.run([*pip, str(wheel)], check=True)
        run = subprocess.run(
            [sys.executable, "-c", PROBE, target, *modules],
            cwd="/",
            env={**os.environ, "PYTHONPATH": target},
            capture_output=True,
            text=True,
        )
    return [] if run.returncode == 0 else [f"importing the installed wheel failed:\n{run.stderr.rstrip()}"]


def main(arguments: list[str]) -> int:
    """Checks the one wheel named in `arguments`. Returns the exit status."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        print(f"usage: check_wheel.py WHEEL (one existing file), got {arguments}", file=sys.stderr)
        return 2
    wheel = Path(arguments[0]).resolve()
    if problems := compare(wheel) + probe(wheel):
        for problem in problems:
            print(f"{wheel.name}: {problem}", file=sys.stderr)
        return 1
    print(f"{wheel.name}: {len(modules_of(wheel))} modules, complete, imported outside the tree")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
