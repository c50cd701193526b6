"""`save_compiled` and `load_compiled`: what one process has compiled, for other processes."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cachedit_fx.errors import cut
from cachedit_fx.frontend.call_records import ModuleCalls, SavedCalls, record_calls, settings_key, weights_key
from cachedit_fx.frontend.enabled import Enabled, enabled_of
from cachedit_fx.frontend.graph_records import NotSavedError
from cachedit_fx.integrations.adapter_registry import modules_of
from cachedit_fx.saving.artifact_file import ArtifactFile, UnusableFileError, install_libraries, loaded_libraries

log = logging.getLogger(__name__)


def save_compiled(pipe_or_module: Any, path: str | os.PathLike[str]) -> None:
    """Writes what this process has compiled to one file, for other processes of the same kind (see `load_compiled`).

    Call it after a generation of every size that is to be saved. The file contains what torch has cached in this
    process (`torch.compiler.save_cache_artifacts`), the C++ libraries of Inductor, and the cached graphs of every
    transformer with Dynamo's guards. To record the guards, Dynamo traces every graph once more, which takes as long as
    its part of the compilation. No values of weights or inputs are written.

    The graphs of a transformer are saved if fast dispatch serves all of them (`CacheConfig.fast_dispatch`), no size in
    them is dynamic, and they use no CUDA graphs. Otherwise, a warning states the reason. Another process then traces
    the transformer, but Inductor compiles nothing.

    Args:
        pipe_or_module: A pipeline, a transformer, or a `BlockAdapter`, after `enable_cache`.
        path: The file. It is replaced as a whole; if writing fails, the old file remains.

    Raises:
        ConfigError: `pipe_or_module` has no diffusion transformer.
        OSError: The file cannot be written.
    """
    modules = {}
    for name, module in modules_of(pipe_or_module).items():
        try:
            modules[name] = pickle.dumps(_recorded(module))
        except Exception as error:  # The record contains objects of the model's code, for example in its guards.
            _warn_partial(name, module, error)
    saved = torch.compiler.save_cache_artifacts()
    artifacts = ArtifactFile(saved[0], loaded_libraries(), modules) if saved else ArtifactFile(modules=modules)
    artifacts.write(Path(path))


def load_compiled(pipe_or_module: Any, path: str | os.PathLike[str]) -> bool:
    """Uses what `save_compiled` wrote, instead of compiling. Returns whether the file could be used.

    Call it after `enable_cache` with the same arguments, and before the first call. At the first call of a size that
    was saved, the graph is taken from the file, without a trace by Dynamo. The weights are those of this process.

    A graph is used only if everything that determines it is the same: the versions of torch, Python and this package,
    the processor and the GPU, the settings, the source of the code that was traced, the shapes of the weights, and
    everything that Dynamo guards on. If anything differs, or the file is missing or damaged, one warning states the
    reason, and the module is compiled as usual.

    The file contains pickled objects and machine code, which can run anything. Load only files that you trust.

    Args:
        pipe_or_module: A pipeline, a transformer, or a `BlockAdapter`, after `enable_cache`.

    Raises:
        ConfigError: `pipe_or_module` has no diffusion transformer.
    """
    modules = modules_of(pipe_or_module)
    try:
        artifacts = ArtifactFile.read(Path(path))
        install_libraries(artifacts.libraries)
        if artifacts.torch:
            torch.compiler.load_cache_artifacts(artifacts.torch)
    except (UnusableFileError, OSError) as error:
        log.warning(
            "cachedit_fx: the compiled graphs in %s are not used, so everything is compiled.\n"
            "  found: %s\n"
            "What to do: call cachedit_fx.save_compiled in a process of this kind.",
            path,
            cut(error, 160),
        )
        return False
    for name, module in modules.items():
        if name in artifacts.modules:
            _use(name, module, artifacts.modules[name])
    return True


def _recorded(module: nn.Module) -> ModuleCalls:
    enabled = _enabled(module)
    if enabled.part is not None:
        raise NotSavedError("only a submodule of it is cached")
    return record_calls(module, enabled.settings, enabled.fast_dispatch, enabled.compiled)


def _enabled(module: nn.Module) -> Enabled:
    enabled = enabled_of(module)
    if enabled is None:
        raise NotSavedError("enable_cache was not called for it")
    return enabled


def _use(name: str, module: nn.Module, data: bytes) -> None:
    """Gives the saved graphs of a module to it, or warns why they do not fit."""
    try:
        enabled = _enabled(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Of torch, about how it pickles the structure of arguments.
            found: ModuleCalls = pickle.loads(data)
        if found.settings != settings_key(enabled.settings):
            raise NotSavedError("they were saved with other arguments of enable_cache")
        here, there = weights_key(module), found.weights
        differing = [key for key in {**there, **here} if here.get(key) != there.get(key)]
        for key in differing[:1]:
            raise NotSavedError(f"the weight {key} is {here.get(key)}, and was {there.get(key)}")
        enabled.saved = SavedCalls(found.calls)
    except Exception as error:  # Unpickling runs the code of other modules, which may have changed.
        log.warning(
            "cachedit_fx: the saved graphs of %s are not used, so it is compiled.\n"
            "  found: %s\n"
            "What to do: call cachedit_fx.save_compiled again where this module runs.",
            _title(name, module),
            cut(_reason(error), 160),
        )


def _warn_partial(name: str, module: nn.Module, error: Exception) -> None:
    log.warning(
        "cachedit_fx: the graphs of %s are not saved. A process that loads the file traces it with Dynamo.\n"
        "  found: %s\n"
        "What to do: nothing, if that is fast enough. Inductor need not compile again.",
        _title(name, module),
        cut(_reason(error), 160),
        exc_info=log.isEnabledFor(logging.DEBUG),
    )


def _title(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    return kind if name == kind else f"{name} ({kind})"


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, NotSavedError) else f"{type(error).__name__}: {error}"
