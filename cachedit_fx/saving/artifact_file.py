"""The file that `save_compiled` writes: what is in it, and for which processes it is valid."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch

import cachedit_fx
from cachedit_fx.frontend.torch_internals import inductor_cache_folder

_HEADER, _TORCH, _LIBRARIES, _MODULES = "header.json", "torch", "libraries/", "modules/"


class UnusableFileError(Exception):
    """A file cannot be used. The text states what was found."""


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """The contents of a file.

    Attributes:
        torch: What `torch.compiler.save_cache_artifacts` returns; empty if torch has cached nothing.
        libraries: The C++ libraries of Inductor, by their paths in the folder of its cache.
        modules: For every transformer, by name, its pickled graphs, or "!" and the reason why there are none.
    """

    torch: bytes = b""
    libraries: Mapping[str, bytes] = field(default_factory=dict)
    modules: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes the file as a whole, or leaves what is there.

        Raises:
            OSError: It cannot be written.
        """
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
                file.writestr(_HEADER, json.dumps(valid_for()))
                file.writestr(_TORCH, self.torch)
                for folder, contents in ((_LIBRARIES, self.libraries), (_MODULES, self.modules)):
                    for name, data in contents.items():
                        file.writestr(folder + name, data)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise

    @classmethod
    def read(cls, path: Path) -> ArtifactFile:
        """The contents of a file, after all of it was checked. Nothing is unpickled.

        Raises:
            UnusableFileError: It cannot be read, is damaged, or was written by another kind of process.
        """
        try:
            with zipfile.ZipFile(path) as file:
                _check_header(json.loads(file.read(_HEADER)))
                found = {name: file.read(name) for name in file.namelist()}  # Compares the checksums.
        except (OSError, zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError) as error:
            raise UnusableFileError(f"{type(error).__name__}: {error}") from error
        except Exception as error:  # zlib.error, whose module need not exist.
            if type(error).__module__ != "zlib":
                raise
            raise UnusableFileError(f"{type(error).__name__}: {error}") from error
        libraries, modules = (
            {name.removeprefix(folder): data for name, data in found.items() if name.startswith(folder)}
            for folder in (_LIBRARIES, _MODULES)
        )
        for name in libraries:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UnusableFileError(f"a library outside of the cache: {name}")
        return cls(found.get(_TORCH, b""), libraries, modules)


def _check_header(header: Mapping[str, str]) -> None:
    for name, expected in valid_for().items():
        if header.get(name) != expected:
            raise UnusableFileError(f"{name} {header.get(name)}, expected {expected}")


@functools.cache
def valid_for() -> dict[str, str]:
    """Everything that must be the same in the process that reads the file, as text, by name."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "torch": str(torch.__version__),
        "cachedit_fx": f"{cachedit_fx.__version__} ({_digest_of_package()})",
        "Python": platform.python_version(),
        "processor": _processor(),  # C++ kernels are compiled for its instructions.
        "GPU": gpu,
    }


def _processor() -> str:
    """The model and the instruction sets of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Not Linux.
        return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    sets = found.get("flags") or found.get("Features") or ""
    model = found.get("model name") or found.get("CPU part") or platform.machine()
    return f"{model} ({hashlib.sha256(sets.encode()).hexdigest()[:8]})"


def _digest_of_package() -> str:
    """A digest of the code of this package, of which graphs and decisions are results."""
    root, digest = Path(cachedit_fx.__file__).parent, hashlib.sha256()
    for file in sorted(_python_files(root)):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _python_files(root: Path) -> Iterator[Path]:
    for folder in (root, *(child for child in root.iterdir() if child.is_dir())):  # Some folders are links.
        yield from folder.glob("*.py") if folder is root else folder.rglob("*.py")


def loaded_libraries() -> dict[str, bytes]:
    """The C++ libraries of Inductor's cache that this process uses, by their paths in the folder of the cache.

    torch does not save them. Those that are not kernels are the ones by which Inductor tests the processor.
    """
    folder = inductor_cache_folder()
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # Not Linux. All libraries of the cache are saved.
        maps = None
    found = {}
    for file in sorted(folder.rglob("*.so")):
        if maps is None or str(file) in maps or ".main" not in file.name:
            found[file.relative_to(folder).as_posix()] = file.read_bytes()
    return found


def install_libraries(libraries: Mapping[str, bytes]) -> None:
    """Writes libraries to the folder of Inductor's cache, unless they exist.

    Raises:
        OSError: The folder cannot be written to.
    """
    folder = inductor_cache_folder()
    for name, data in libraries.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=path.parent)  # Other processes may load the file at the same time.
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.chmod(part, 0o755)
            os.replace(part, path)
