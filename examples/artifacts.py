"""Saves what a process has compiled as one file, which other processes load instead of compiling."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

OF_TORCH = "torch"  # The name of what torch saves, in the file.


def save_artifacts(path: Path) -> int:
    """Writes what was compiled in this process, and returns the size of the file in bytes.

    torch saves graphs and GPU kernels. The C++ kernels of a CPU are added from the folder of Inductor's cache.
    """
    saved, folder = torch.compiler.save_cache_artifacts(), Path(cache_dir())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        if saved is not None:  # Nothing is saved with `inner_backend="eager"`.
            file.writestr(OF_TORCH, saved[0])
            for kernel in folder.rglob("*.so"):
                file.write(kernel, kernel.relative_to(folder))
    return path.stat().st_size


def load_artifacts(path: Path) -> None:
    """Makes what `save_artifacts` wrote available to the compiler. Load only files that you trust."""
    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            if name == OF_TORCH:
                torch.compiler.load_cache_artifacts(file.read(name))
            elif not (kernel := Path(cache_dir(), name)).exists():
                kernel.parent.mkdir(parents=True, exist_ok=True)
                part = kernel.with_suffix(f".{os.getpid()}")  # Other processes may load the file at the same time.
                part.write_bytes(file.read(name))
                part.replace(kernel)
