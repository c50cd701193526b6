"""What `doctor` finds out about an installation: versions, devices, and whether caching works."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cachedit_fx import _version
from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import cut
from cachedit_fx.frontend.inner_compiler import InnerCompiler
from cachedit_fx.frontend.torch_internals import dynamo_settings, is_tested_version, tested_versions
from cachedit_fx.shell.small_model import why_not_cached

_PACKAGES = ("diffusers", "transformers", "accelerate")
_FOR_REPORTS = {"jinja2": "pages of explain and report", "matplotlib": "charts", "yaml": "YAML files"}
_INSTALLED_BY = {"yaml": "pyyaml"}
_TURN_OFF = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
_EXPLAINED = {
    "TORCHDYNAMO_SUPPRESS_ERRORS": "a model that cannot be compiled runs without the cache, and no error says so",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "every process compiles every model again",
}
_SET_BY_TORCH = ("TORCHINDUCTOR_CACHE_DIR",)  # Inductor sets it itself.
_LEAST_RECOMPILE_LIMIT = 8  # The default of Dynamo.


@dataclass(frozen=True)
class Check:
    """One result.

    Attributes:
        kind: "ok"; "note" for something that may matter; "problem" if models run without the cache, or not at all.
        text: What was found, in one line.
        cure: What to do; empty if there is nothing to do.
    """

    kind: str
    text: str
    cure: str = ""

    def to_dict(self) -> dict[str, str]:
        """All fields, as JSON can store them."""
        return asdict(self)


def versions() -> dict[str, str | None]:
    """The versions by package; None for a package that is not installed."""
    found = {
        "cachedit_fx": _version.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    return found | {name: _installed(name) for name in _PACKAGES}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """The CPU, and every accelerator with its name, memory in bytes, capability and versions."""
    found: list[dict[str, Any]] = [{"device": "cpu", "name": platform.machine(), "cores": os.cpu_count()}]
    if torch.cuda.is_available():
        software = {"cuda": torch.version.cuda, "hip": torch.version.hip, "driver": _driver()}
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            capability = f"{facts.major}.{facts.minor}"
            found.append(
                {"device": f"cuda:{index}", "name": facts.name, "bytes": facts.total_memory, "capability": capability}
                | {name: version for name, version in software.items() if version}
            )
    elif torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        found.append({"device": str(kind), "name": str(kind)})
    return found


def _driver() -> str:
    """The version of NVIDIA's driver; empty if `nvidia-smi` does not tell."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        ran = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout.partition("\n")[0].strip()


def checks() -> Iterator[Check]:
    """Everything that is checked, in a few seconds."""
    yield _torch_version()
    yield from _settings()
    yield inner_compiler("cpu")
    if torch.accelerator.is_available():
        yield inner_compiler(str(torch.accelerator.current_accelerator()))
    yield caching()
    for module, purpose in _FOR_REPORTS.items():
        if importlib.util.find_spec(module) is None:
            package = _INSTALLED_BY.get(module, module)
            yield Check("note", f"{package} is not installed, which {purpose} need", f"pip install {package}")


def _torch_version() -> Check:
    if is_tested_version():
        return Check("ok", f"The tests of cachedit_fx ran with torch {tested_versions()}")
    text = f"The tests of cachedit_fx ran with torch {tested_versions()}, and not with {torch.__version__}"
    return Check("note", text, "compare a computed step with the model without the cache once")


def _settings() -> Iterator[Check]:
    """Environment variables and settings of Dynamo that have an effect on compiled models."""
    settings, is_off = dynamo_settings(), False
    for name in _TURN_OFF:
        if os.environ.get(name, "") not in ("", "0"):
            is_off = True
            yield Check("problem", f"{name}={os.environ[name]}: torch.compile is turned off", f"unset {name}")
    if settings["disable"] and not is_off:
        yield Check("problem", "torch._dynamo.config.disable is True: torch.compile is turned off", "set it to False")
    if settings["recompile_limit"] < _LEAST_RECOMPILE_LIMIT:
        text = (
            f"torch._dynamo.config.recompile_limit is {settings['recompile_limit']}: a model that is called with more "
            "sizes than this runs without the cache"
        )
        yield Check("note", text, f"set it to {_LEAST_RECOMPILE_LIMIT}")
    prefixes = ("TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_COMPILE")
    known = {*_TURN_OFF, *_SET_BY_TORCH}
    for name in sorted(name for name in os.environ if name.startswith(prefixes) and name not in known):
        yield Check("note", f"{name}={os.environ[name]}: {_EXPLAINED.get(name, 'it changes how models are compiled')}")


def inner_compiler(device: str) -> Check:
    """Whether Inductor, the inner backend by default, compiles and runs a function on a device."""
    start = time.perf_counter()
    offset = time.time() % 1  # A new number each time, so that no cache on disk holds the compiled code.

    def function(x: Tensor) -> Tensor:
        return torch.tanh(x) + offset

    x = torch.arange(8.0, device=device)
    gm = fx.symbolic_trace(function)
    try:
        found = InnerCompiler(CacheConfig(), None, {})(gm, [x])(x)
    except Exception as error:
        cure = (
            "install a C++ compiler, such as g++, or name one in the variable CXX"
            if "compiler" in str(error).lower()
            else 'see the whole error by torch.compile(function); inner_backend="aot_eager" works without Inductor'
        )
        return Check("problem", f"Inductor does not compile for {device}: {_reason(error)}", cure)
    found = found[0] if isinstance(found, list | tuple) else found
    if not torch.allclose(found, function(x), atol=1e-4):
        return Check("problem", f"Inductor compiles for {device}, but the result is wrong", "reinstall torch")
    return Check("ok", f"Inductor compiles for {device} ({time.perf_counter() - start:.1f} s)")


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return cut(lines[0] if lines else type(error).__name__, 160)


def caching() -> Check:
    """Whether a small transformer is cached on the CPU: capture, guards and reuse, without Inductor."""
    start = time.perf_counter()
    try:
        reason = why_not_cached()
    except Exception as error:
        reason = f"{type(error).__name__}: {_reason(error)}"
    if reason:
        return Check("problem", f"A small transformer is not cached: {cut(reason, 160)}", "correct the problems above")
    return Check("ok", f"A small transformer is cached and reuses steps ({time.perf_counter() - start:.1f} s)")
