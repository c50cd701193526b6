"""The hooks of diffusers and accelerate that move or cast weights around the forward of a layer.

Dynamo cannot capture them. They can be left out of the graph, because everything that they do can be done otherwise:
a cast is an operation of the graph, and weights can be moved before and after each piece (`runtime/placement.py`).
Hooks are recognized by their class. A subclass counts as a hook of other code.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cachedit_fx.errors import cut
from cachedit_fx.runtime.placement import WeightUnit

_ACCELERATE, _REGISTRY = "accelerate.hooks", "diffusers.hooks.hooks"
_GROUPS, _CASTS = "diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting"
_GROUP, _ALIGN, _CAST = (
    (_GROUPS, "GroupOffloadingHook"),
    (_ACCELERATE, "AlignDevicesHook"),
    (_CASTS, "LayerwiseCastingHook"),
)
_MODEL = (_ACCELERATE, "CpuOffload")  # Of `enable_model_cpu_offload`. Brings the whole model to the device.
# These record the order of the groups at the first call, for a stream that loads the next group in advance.
_RECORD_ORDER = ((_GROUPS, "LazyPrefetchGroupOffloadingHook"), (_GROUPS, "LayerExecutionTrackerHook"))
_OWN = "cachedit_fx"  # The name of the hook of `integrations/session_hook.py`, which is not around the forward.
# Their forwards read their weights as attributes, and call no other module.
_CASTABLE = (
    *(nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(slots=True, eq=False)
class GroupUnit:
    """A group of diffusers' group offloading (`ModuleGroup`)."""

    group: Any
    stays_for_call: bool
    makes_new_tensors: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device(self.group.onload_device)

    def onload(self) -> None:
        self.group.onload_()
        if self.group.stream is not None:  # The copies are asynchronous.
            self.group.stream.synchronize()

    def offload(self) -> None:
        self.group.offload_()


@dataclass(slots=True, eq=False)
class AlignUnit:
    """The weights that one `AlignDevicesHook` of accelerate brings to the device."""

    hook: Any
    module: nn.Module
    stays_for_call: bool
    makes_new_tensors: bool = True

    @property
    def device(self) -> torch.device:
        return torch.device(self.hook.execution_device)

    def onload(self) -> None:
        self.hook.pre_forward(self.module)

    def offload(self) -> None:
        self.hook.post_forward(self.module, None)


@dataclass(slots=True)
class WeightHooks:
    """The hooks on a model and its layers.

    Attributes:
        casts: The layers whose weights are cast for each call, with the dtype in which they compute.
        hooked: The modules whose forward has at least one hook that moves weights.
        units: What moves, by the module for whose weights it is responsible. For a group, this includes inner modules.
        loose: The same for weights of a group that are listed one by one, by the identity of the tensor.
        at_model: The hooks around the forward of the model itself, the outermost first. They move its arguments and its
            output.
        others: The names of the hooks that are not known.
        obstacles: Other reasons why the hooks cannot be left out of the graph.
    """

    casts: dict[nn.Module, torch.dtype] = field(default_factory=dict)
    hooked: dict[nn.Module, None] = field(default_factory=dict)
    units: dict[nn.Module, WeightUnit] = field(default_factory=dict)
    loose: dict[int, WeightUnit] = field(default_factory=dict)
    at_model: list[Any] = field(default_factory=list)
    others: dict[str, None] = field(default_factory=dict)
    obstacles: list[str] = field(default_factory=list)

    @property
    def obstacle(self) -> str:
        """Why the hooks cannot be left out of the graph; empty if they can."""
        unknown = [f"hooks that are not known: {', '.join(self.others)}"] if self.others else []
        return "; ".join((*unknown, *self.obstacles))

    @property
    def devices(self) -> set[torch.device]:
        found = {unit.device for unit in (*self.units.values(), *self.loose.values())}
        resident = (h.execution_device for h in self.at_model if _is(h, _ALIGN) and h.execution_device is not None)
        return found | {torch.device(device) for device in resident}

    def weights(self, model: nn.Module) -> Iterator[tuple[WeightUnit, dict[str, Any], str]]:
        """The unit, the holder and the name of every weight that is moved, as `Placement.stand_ins` takes them."""
        for module in _modules_of(model):
            unit = self.units.get(module)
            for holder in (module._parameters, module._buffers):
                if not holder:
                    continue
                for name, weight in [*holder.items()]:
                    found = unit if unit is not None and _moves(unit, module, holder, name) else None
                    found = found or (self.loose.get(id(weight)) if self.loose else None)
                    if weight is not None and found is not None:
                        yield found, holder, name


def find_weight_hooks(model: nn.Module) -> WeightHooks:
    """The hooks on a model and its layers. Changes nothing."""
    found = WeightHooks()
    groups: dict[Any, GroupUnit] = {}
    for module in _modules_of(model):
        held = vars(module)
        registry, aligned = held.get("_diffusers_hook"), held.get("_hf_hook")
        if registry is None and aligned is None:
            continue
        if registry is not None:
            _add_diffusers(found, groups, model, module, registry)
        if aligned is not None:
            _add_accelerate(found, model, module, aligned)
        is_known = module in found.casts or module in found.hooked
        if is_known and plain_forward(module) is None:
            found.obstacles = ["a function around the hooks of a layer"]
    if found.hooked and len(found.devices) > 1:
        found.obstacles.append(f"hooks for several devices ({', '.join(sorted(map(str, found.devices)))})")
    return found


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """The model and the modules in it, each once, in any order. Faster than `nn.Module.modules`: it runs per call."""
    found, todo = {model: None}, [model]
    while todo:
        for child in todo.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                todo.append(child)
    return [*found]


def _add_diffusers(
    found: WeightHooks, groups: dict[Any, GroupUnit], model: nn.Module, module: nn.Module, registry: Any
) -> None:
    for name in reversed(registry._hook_order):
        hook = registry.hooks[name]
        if name == _OWN:
            continue
        if _is(hook, _CAST) and type(module) in _CASTABLE:
            found.casts[module] = hook.compute_dtype
        elif _is(hook, _GROUP):
            group = hook.group
            if group not in groups:
                unit = groups[group] = GroupUnit(group, stays_for_call=group.onload_leader is model)
                found.units |= {inner: unit for one in group.modules for inner in one.modules()}
                found.loose |= {id(tensor): unit for tensor in (*group.parameters, *group.buffers)}
            found.hooked[module] = None
            if module is model:
                found.at_model.append(hook)
        elif any(_is(hook, kind) for kind in _RECORD_ORDER):
            found.hooked[module] = None
        else:
            found.others[cut(name)] = None


def _add_accelerate(found: WeightHooks, model: nn.Module, module: nn.Module, hook: Any) -> None:
    for one in reversed(hook.hooks) if _is(hook, (_ACCELERATE, "SequentialHook")) else [hook]:
        if module is model and _is(one, _MODEL):
            found.hooked[module] = None
            found.at_model.append(one)
            continue
        if not _is(one, _ALIGN) or one.no_grad or (one.offload and one.execution_device is None):
            found.others[type(one).__name__] = None
            continue
        found.hooked[module] = None
        if one.offload:
            unit = AlignUnit(one, module, stays_for_call=module is model)
            found.units |= dict.fromkeys(module.modules() if one.place_submodules else (module,), unit)
        if module is model:
            found.at_model.append(one)


def _moves(unit: WeightUnit, module: nn.Module, holder: dict[str, Any], name: str) -> bool:
    """Whether the unit moves this tensor of a module. accelerate leaves out some buffers."""
    if not isinstance(unit, AlignUnit) or holder is module._parameters:
        return True
    return bool(unit.hook.offload_buffers) and name not in module._non_persistent_buffers_set


def _is(hook: Any, kind: tuple[str, str]) -> bool:
    return (type(hook).__module__, type(hook).__qualname__) == kind


def plain_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of a module without the hooks around it; None if a hook or function that is not known is there."""
    forward: Any = module.forward
    while isinstance(forward, functools.partial):
        is_known = forward.func is cast_forward or forward.func.__module__ in (_ACCELERATE, _REGISTRY)
        forward = getattr(forward, "__wrapped__", None) if is_known else None  # `functools.update_wrapper` sets it.
    return forward if isinstance(forward, types.MethodType) else None


class _CastWeights:
    """Has the attributes of a layer, with its weights in another dtype."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.layer, name)
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def cast_forward(layer: nn.Module, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """What the layer returns if its weights are cast to `dtype` for the call. Dynamo can capture it."""
    forward: Any = type(layer).forward
    return forward(_CastWeights(layer, dtype), *args, **kwargs)


def with_casts(layer: nn.Module, dtype: torch.dtype) -> functools.partial[Any]:
    """A forward for `layer` that does what its `LayerwiseCastingHook` does, and that Dynamo can capture."""
    made = functools.partial(cast_forward, layer, dtype)
    made.__wrapped__ = types.MethodType(type(layer).forward, layer)  # type: ignore[attr-defined]
    return made


def is_with_casts(forward: object) -> bool:
    return isinstance(forward, functools.partial) and forward.func is cast_forward


def has_only_casts(layer: nn.Module) -> bool:
    """Whether a `LayerwiseCastingHook` is the only hook around the forward of a layer."""
    held = vars(layer)
    names = [name for name in held["_diffusers_hook"]._hook_order if name != _OWN]
    return len(names) == 1 and "_hf_hook" not in held


def before_call(
    model: nn.Module, hook: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any], Any]:
    """Does what a hook at the model does before a call: moves the arguments, and possibly the whole model.

    Returns:
        The arguments, and the device to which the output is returned; None if it remains where it is.
    """
    if _is(hook, _MODEL):
        return *hook.pre_forward(model, *args, **kwargs), None
    tools: Any = sys.modules["accelerate.utils"]  # Both libraries use it.
    if _is(hook, _ALIGN):
        returned_to = tools.find_device([args, kwargs]) if hook.io_same_device else None
        args = tools.send_to_device(args, hook.execution_device)
        return args, tools.send_to_device(kwargs, hook.execution_device, skip_keys=hook.skip_keys), returned_to
    device, left = hook.group.onload_device, hook.config.exclude_kwargs or ()
    moved = tools.send_to_device({name: value for name, value in kwargs.items() if name not in left}, device)
    return tools.send_to_device(args, device), kwargs | moved, None


def after_call(hook: Any, output: Any, device: Any) -> Any:
    """Does what a hook at the model does with its output (see `before_call`)."""
    if device is None:
        return output
    tools: Any = sys.modules["accelerate.utils"]
    return tools.send_to_device(output, device, skip_keys=hook.skip_keys)
