"""Checks what a release needs: the version in all places, and the wheel in a new environment.

    python .ci/check_release.py dist/cachedit_fx-0.1.0-py3-none-any.whl [--final]

The version of `_version.py` must be a semantic version, the newest one in CHANGELOG.md, and that of the wheel; with
`--final`, the changelog must have its date. The wheel is installed into a new environment, without its dependencies,
which come from the interpreter that runs this script. There, in an empty folder, a model is cached, the commands of the
package run, and its folder of nodes for ComfyUI is loaded through a link. Exits with 1 and one line per problem.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEMANTIC = re.compile(r"\d+\.\d+\.\d+(-[0-9A-Za-z.]+)?")
HEADING = re.compile(r"^## \[([^\]]+)\](?: - (\S+))?$", re.MULTILINE)

# Runs in the new environment, in an empty folder; argv: the folder that everything must come from.
TRIAL = """
import importlib.metadata, importlib.util, subprocess, sys
from pathlib import Path

import torch
from torch import nn

import cachedit_fx
from cachedit_fx.integrations import comfyui

environment = Path(sys.argv[1]).resolve()
assert Path(cachedit_fx.__file__).resolve().is_relative_to(environment), cachedit_fx.__file__
assert cachedit_fx.__version__ == importlib.metadata.version("cachedit_fx")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, hidden_states):
        return hidden_states + self.linear(self.norm(hidden_states))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, hidden_states, timestep):
        hidden_states = hidden_states + self.embed(timestep[:, None])[:, None]
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


model = Model().eval()
options = {"inner_backend": "eager", "residual_diff_threshold": 1.0, "max_warmup_steps": 1}
compiled = torch.compile(model, backend="cachedit", options=options)
with torch.no_grad():
    for t in (3.0, 2.0, 1.0):
        compiled(torch.ones(1, 4, 8), torch.tensor([t]))
assert cachedit_fx.is_cached(model) and cachedit_fx.summary(model, logging=False)[0].cached_steps == [1, 2]

link = Path("custom_nodes")
link.symlink_to(comfyui.__path__[0])
spec = importlib.util.spec_from_file_location("custom_nodes", link / "__init__.py")
node = importlib.util.module_from_spec(spec)
spec.loader.exec_module(node)
assert "CacheditCompile" in node.NODE_CLASS_MAPPINGS

for command in ([sys.executable, "-m", "cachedit_fx", "--help"], *(
    [str(Path(sys.executable).with_name(point.name)), "--help"]
    for point in importlib.metadata.distribution("cachedit_fx").entry_points.select(group="console_scripts")
)):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
"""


def version_problems(version: str, changelog: str, *, is_final: bool) -> list[str]:
    """What contradicts the version, one line each."""
    problems = []
    if not SEMANTIC.fullmatch(version):
        problems.append(f"_version.py: {version!r} is not MAJOR.MINOR.PATCH")
    headings = [(name, date) for name, date in HEADING.findall(changelog) if name != "Unreleased"]
    newest, date = headings[0] if headings else ("", "")
    if newest != version:
        problems.append(f"CHANGELOG.md: the newest version is {newest or 'missing'}, _version.py has {version}")
    elif not re.fullmatch(r"\d{4}-\d\d-\d\d", date) and (is_final or date != "unreleased"):
        problems.append(f"CHANGELOG.md: {newest} has no date (YYYY-MM-DD), found {date or 'nothing'}")
    return problems


def own_version() -> str:
    """The version in the source tree."""
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "cachedit_fx" / "_version.py").read_text(encoding="utf-8"))
    return found[1] if found else ""


def version_of(wheel: Path) -> str:
    """The version in the metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())["Version"]


def try_wheel(wheel: Path) -> list[str]:
    """Installs the wheel into a new environment and uses it there. Returns what went wrong, if anything."""
    with tempfile.TemporaryDirectory(prefix="cachedit_fx-release-") as temporary:
        environment, empty = Path(temporary, "venv").resolve(), Path(temporary, "empty")
        empty.mkdir()
        venv.create(environment, with_pip=False)
        python = str(environment / "bin" / "python")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*pip, str(wheel)], check=True)
        # A folder that a .pth file names is searched last, and its own .pth files (editable packages) are not read.
        packages = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
        Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        command = [python, "-I", "-c", TRIAL, str(environment)]
        run = subprocess.run(command, cwd=empty, capture_output=True, text=True)
    return [] if run.returncode == 0 else [f"using the installed wheel failed:\n{run.stderr.rstrip()}"]


def main(arguments: list[str]) -> int:
    """Checks the one wheel named in `arguments`. Returns the exit status."""
    paths = [one for one in arguments if one != "--final"]
    if len(paths) != 1 or not Path(paths[0]).is_file():
        print(f"usage: check_release.py WHEEL [--final] (one existing file), got {arguments}", file=sys.stderr)
        return 2
    wheel, version = Path(paths[0]).resolve(), own_version()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    problems = version_problems(version, changelog, is_final="--final" in arguments)
    if version_of(wheel) != version:
        problems.append(f"{wheel.name}: has version {version_of(wheel)}, _version.py has {version}")
    problems += try_wheel(wheel)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{wheel.name}: version {version}, tried in a new environment")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
