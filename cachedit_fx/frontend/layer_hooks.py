"""The hooks that accelerate, diffusers and FSDP put on the layers of a model."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from torch import nn

from cachedit_fx.errors import cut


def hooks_of(module: nn.Module) -> list[str]:
    """The names of the hooks of accelerate and diffusers on the module and its layers, without duplicates.

    For example `AlignDevicesHook` and `layerwise_casting`.
    """
    found: dict[str, None] = {}
    for inner in module.modules():
        held = vars(inner)
        if "_hf_hook" in held:
            found[type(held["_hf_hook"]).__name__] = None
        found |= dict.fromkeys(cut(name) for name in _diffusers_hooks(inner) if name != "cachedit_fx")
    return [*found]


def has_sharded_layers(module: nn.Module) -> bool:
    """Whether `fully_shard` (FSDP2) was applied to layers of the module, and not only to the module as a whole."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return sharded is not None and any(isinstance(inner, sharded) for inner in module.modules() if inner is not module)


def initialize_hooks(module: nn.Module | None) -> None:
    """Initializes what the hooks of diffusers would initialize in the first call, because Dynamo cannot trace that.

    The hooks of context parallelism read the signature of a block when they are first called (`ModuleForwardMetadata`,
    in diffusers 0.35 and later). Without this class, nothing is done.
    """
    for inner in module.modules() if module is not None else ():
        for hook in _diffusers_hooks(inner).values():
            read = getattr(getattr(hook, "module_forward_metadata", None), "_get_parameter_from_args_kwargs", None)
            if read is not None:
                with contextlib.suppress(ValueError):  # There is no such parameter; the signature has been read.
                    read("")


def _diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    hooks: dict[str, Any] = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
    return hooks
