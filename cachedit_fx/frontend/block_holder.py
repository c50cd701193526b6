"""Finds the submodule to cache if a model as a whole has no chain, for example because it calls a transformer twice."""

from __future__ import annotations

from torch import nn

from cachedit_fx.patterns.cause import Cause

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

# Kinds of reasons that do not depend on how a model is divided.
_OF_STATE = {Cause.TRAINING.value, Cause.GRADIENTS.value, Cause.EMPTY.value}


def can_be_divided(kind: str) -> bool:
    """Whether a model that is uncached for this kind of reason (`WhyUncached.kind`) may have a part that is cached."""
    return kind in {cause.value for cause in Cause} - _OF_STATE


def block_holder(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The path and the module inside `module` that holds a list of blocks and most of the weights.

    If there are several, it is the outermost one; None if there is none.
    """
    total = _num_weights(module)
    for path, inner in module.named_modules():
        if inner is module or isinstance(inner, _CONTAINERS):
            continue
        has_list = any(isinstance(child, _CONTAINERS) and len(child) > 1 for child in inner.children())
        if has_list and 2 * _num_weights(inner) > total:
            return path, inner
    return None


def _num_weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
