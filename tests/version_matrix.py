"""Runs the fast tests on every version of Python and of torch that is supported and to be had here.

    python -m tests.version_matrix [--python 3.12] [--torch 2.12.1] [arguments of pytest]

Interpreters are looked up in PATH and in pyenv's folder; torch is installed by pip as it is configured here. A build of
torch that requires CUDA packages (gigabytes) is not installed: name an index or a folder with CPU builds to pip
(PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS). Every combination that is left out is printed with its reason. The environments
are in `.matrix` and are used again. Exits with 1 if tests failed or if no combination could run.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".matrix"
PYTHONS = ("3.11", "3.12", "3.13")
TORCHES = ("2.11.0", "2.12.1", "2.13.0")
FAST = ("-m", "not slow", "-q", "-n", "auto", "--maxprocesses", "8", "--dist", "loadgroup")
OF_CUDA = re.compile(r"(nvidia|cuda|triton)[\w-]*", re.IGNORECASE)


@dataclass(frozen=True)
class Result:
    """One line of the table. `is_failed` is False for what was left out."""

    python: str
    torch: str
    text: str
    ran: bool = False
    is_failed: bool = False


class LeftOut(Exception):
    """Why a combination does not run."""


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], text=True, cwd=ROOT, check=False, **options)


@functools.cache
def interpreter(python: str) -> Path:
    """The interpreter of a version, one that runs (a shim of pyenv may not)."""
    candidates = [shutil.which(f"python{python}"), *Path.home().glob(f".pyenv/versions/{python}.*/bin/python3")]
    for candidate in filter(None, candidates):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        if run(candidate, "-c", code, capture_output=True).stdout.strip() == python:
            return Path(candidate)
    raise LeftOut(f"no Python {python} in PATH or in ~/.pyenv/versions")


def check_build(python: str, torch: str) -> None:
    """Checks that pip has a build of torch without CUDA. Reads the metadata of the wheel only, if the index allows it.

    Raises:
        LeftOut: It has none.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ("--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--use-feature=fast-deps")
        where = ("--target", folder, "--python-version", python, "--only-binary=:all:", "--report", "-")
        found = run(sys.executable, "-m", "pip", "install", *options, *where, f"torch=={torch}", capture_output=True)
    if found.returncode:
        raise LeftOut(f"pip finds no torch {torch} for Python {python}")
    needs_cuda(json.loads(found.stdout))


def needs_cuda(report: dict[str, Any]) -> None:
    """Checks the report of `pip install --dry-run` about torch.

    Raises:
        LeftOut: The wheel requires CUDA packages on this platform.
    """
    (item,) = report["install"]
    for requirement in item["metadata"].get("requires_dist", ()):
        is_here = 'platform_system == "Linux"' not in requirement or sys.platform == "linux"
        match = OF_CUDA.match(requirement)
        if match and is_here and "extra ==" not in requirement:
            raise LeftOut(f"pip finds only a build that requires {match[0]}: {item['download_info']['url'][-60:]}")


def environment(python: str, torch: str) -> Path:
    """The interpreter of an environment with this torch and everything that the tests need."""
    if python == "{}.{}".format(*sys.version_info) and installed_version("torch").partition("+")[0] == torch:
        return Path(sys.executable)
    base = interpreter(python)
    folder = FOLDER / f"python-{python}-torch-{torch}"
    found, stamp = folder / "bin" / "python", folder / ".installed"
    if stamp.exists():
        return found
    check_build(python, torch)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(re.sub(r"(?m)^torch==.*$", f"torch=={torch}", pins), encoding="utf-8")
    pip = (found, "-m", "pip", "install", "--quiet", "-c", constraints)
    for step in (
        (base, "-m", "venv", folder),
        (*pip, "setuptools", "wheel", f"torch=={torch}"),
        (*pip, "--no-build-isolation", "-e", ".[test,quantization]"),
    ):
        if run(*step).returncode:
            raise LeftOut("the environment could not be built (see above)")
    stamp.touch()
    return found


def tried(python: str, torch: str, arguments: Sequence[str]) -> Result:
    """Runs the tests on one combination."""
    print(f"== Python {python}, torch {torch}", flush=True)
    try:
        found = environment(python, torch)
    except LeftOut as why:
        print(f"left out: {why}", flush=True)
        return Result(python, torch, f"left out: {why}")
    tests = run(found, "-m", "pytest", *FAST, *arguments, stdout=subprocess.PIPE)
    lines = tests.stdout.strip().splitlines()
    print("\n".join(lines[-20:]), flush=True)
    text = lines[-1].strip("= ") if lines else f"pytest ended with {tests.returncode}"
    return Result(python, torch, text, ran=True, is_failed=tests.returncode != 0)


def table(results: Sequence[Result]) -> str:
    rows = [("Python", "torch", "result"), *((one.python, one.torch, one.text) for one in results)]
    return "\n".join(f"{python:8}{torch:10}{text}" for python, torch, text in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only this version; may be given twice")
    parser.add_argument("--torch", action="append", choices=TORCHES, help="only this version; may be given twice")
    chosen, arguments = parser.parse_known_args()
    results = [
        tried(python, torch, arguments) for python in chosen.python or PYTHONS for torch in chosen.torch or TORCHES
    ]
    print(f"\n{table(results)}")
    return int(any(one.is_failed for one in results) or not any(one.ran for one in results))


if __name__ == "__main__":
    sys.exit(main())
