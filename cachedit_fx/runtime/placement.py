"""Weights that are on the device only while a piece reads them: what the hooks of an offloaded model do, per piece.

During a call of an offloaded model, a stand-in without memory is in the place of every offloaded weight. Dynamo checks
and passes the stand-ins. A piece replaces those among its arguments by the weights, which it first brings to the
device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from cachedit_fx.runtime.model_call import current_call


class WeightUnit(Protocol):
    """Weights that are moved together.

    Attributes:
        device: The device that computes.
        stays_for_call: Whether the weights remain on the device until the end of the call.
        makes_new_tensors: Whether the module holds other tensor objects after `offload`. The former ones are put back.
    """

    stays_for_call: bool
    makes_new_tensors: bool

    @property
    def device(self) -> torch.device: ...

    def onload(self) -> None:
        """Brings the weights to the device, where the module finds them."""

    def offload(self) -> None:
        """Undoes `onload`."""


@dataclass(slots=True)
class Place:
    """The place of one weight in its module.

    Attributes:
        holder: The dictionary that holds the weight (`module._parameters` or `module._buffers`).
        weight: What it holds while the weights of the unit are offloaded.
    """

    unit: WeightUnit
    holder: dict[str, Any]
    name: str
    weight: torch.Tensor
    stand_in: torch.Tensor


@dataclass(slots=True, eq=False)
class Placement:
    """The offloaded weights of one model. Used by one call at a time.

    Attributes:
        num_onloads: How many units have been brought to the device so far.
        most_bytes: The most bytes of weights that were on the device at a time.
        most_bytes_of_hooks: The same for the hooks alone, which bring one unit at a time, besides those that stay.
    """

    num_onloads: int = 0
    most_bytes: int = 0
    most_bytes_of_hooks: int = 0
    _places: dict[int, Place] = field(default_factory=dict)  # By the identity of the stand-in.
    _places_of: dict[WeightUnit, list[Place]] = field(default_factory=dict)
    _onloaded: dict[WeightUnit, None] = field(default_factory=dict)
    # Stand-ins of earlier calls. They remain the same objects, so that everything that Dynamo checks remains the same.
    _stand_ins: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    @contextlib.contextmanager
    def stand_ins(self, weights: Iterable[tuple[WeightUnit, dict[str, Any], str]]) -> Iterator[None]:
        """Replaces weights by stand-ins in the block. At its end, all weights are offloaded, and in their places.

        Args:
            weights: The unit, the holder and the name of every weight.
        """
        try:
            with torch.inference_mode(False):
                for unit, holder, name in weights:
                    self._replace(unit, holder, name)
            yield
        finally:
            self._end()

    def is_stand_in(self, value: object) -> bool:
        """Whether `value` is in the place of an offloaded weight."""
        place = self._places.get(id(value))
        return place is not None and place.stand_in is value

    def weights_for(self, args: tuple[Any, ...]) -> list[Any]:
        """The arguments of a piece, with the weights on the device in place of their stand-ins.

        Weights that the piece does not read are offloaded first, unless they stay for the whole call.
        """
        places = [self._places.get(id(arg)) if isinstance(arg, torch.Tensor) else None for arg in args]
        needed = dict.fromkeys(place.unit for place in places if place is not None)
        if needed:
            for unit in [*self._onloaded]:
                if unit not in needed and not unit.stays_for_call:
                    self._offload(unit)
            for unit in needed:
                if unit not in self._onloaded:
                    self._onload(unit)
            self._measure()
        return [arg if place is None else _weight_at(place) for arg, place in zip(args, places, strict=True)]

    def without_stand_ins(self, output: Any) -> Any:
        """The output of the model, with the weights in it in place of their stand-ins."""
        if not any(map(self.is_stand_in, pytree.tree_leaves(output))):
            return output
        return pytree.tree_map(lambda leaf: self._places[id(leaf)].weight if self.is_stand_in(leaf) else leaf, output)

    def _replace(self, unit: WeightUnit, holder: dict[str, Any], name: str) -> None:
        weight, key = holder[name], (id(holder), name)
        stand_in = self._stand_ins.get(key)
        if stand_in is None or not _fits(stand_in, weight, unit.device):
            stand_in = self._stand_ins[key] = _stand_in_for(weight, unit.device)
        holder[name] = stand_in
        place = self._places[id(stand_in)] = Place(unit, holder, name, weight, stand_in)
        self._places_of.setdefault(unit, []).append(place)

    def _measure(self) -> None:
        on = {unit: sum(place.stand_in.nbytes for place in self._places_of[unit]) for unit in self._onloaded}
        staying = sum(size for unit, size in on.items() if unit.stays_for_call)
        others = [size for unit, size in on.items() if not unit.stays_for_call]
        self.most_bytes = max(self.most_bytes, staying + sum(others))
        self.most_bytes_of_hooks = max(self.most_bytes_of_hooks, staying + max(others, default=0))

    def _onload(self, unit: WeightUnit) -> None:
        self._onloaded[unit] = None
        for place in self._places_of[unit]:
            place.holder[place.name] = place.weight
        self.num_onloads += 1
        unit.onload()

    def _offload(self, unit: WeightUnit) -> None:
        self._onloaded.pop(unit)
        unit.offload()
        for place in self._places_of[unit] if unit.makes_new_tensors else ():
            place.holder[place.name] = place.weight

    def _end(self) -> None:
        for place in self._places.values():
            if place.holder[place.name] is place.stand_in:
                place.holder[place.name] = place.weight
        try:
            with contextlib.ExitStack() as stack:  # All of them, even if one fails.
                for unit in self._onloaded:
                    stack.callback(self._offload, unit)
        finally:
            self._onloaded.clear()
            self._places.clear()
            self._places_of.clear()


class OnloadingPiece:
    """A compiled piece that brings the weights that it reads to the device."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:
        call = current_call()
        assert call is not None and call.placement is not None, "a graph of an offloaded model runs outside of a call"
        return self._run(*call.placement.weights_for(args))


def _stand_in_for(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor with the properties of `weight` on the device, and without memory."""
    made = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device)
    made.untyped_storage().resize_(0)
    if isinstance(weight, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=weight.requires_grad)
    return made.requires_grad_(weight.requires_grad)


def _fits(stand_in: torch.Tensor, weight: torch.Tensor, device: torch.device) -> bool:
    return (
        stand_in.shape == weight.shape
        and stand_in.stride() == weight.stride()
        and stand_in.dtype == weight.dtype
        and stand_in.requires_grad == weight.requires_grad
        and isinstance(stand_in, torch.nn.Parameter) == isinstance(weight, torch.nn.Parameter)
        and stand_in.device.type == device.type
        and device.index in (None, stand_in.device.index)
    )


def _weight_at(place: Place) -> torch.Tensor:
    """The weight that is in the module now, with the strides that the piece was compiled for."""
    found: torch.Tensor = place.holder[place.name]
    if found.stride() == place.stand_in.stride():
        return found
    strides, options = place.stand_in.stride(), dict(dtype=found.dtype, device=found.device)
    return torch.empty_strided(found.shape, strides, **options).copy_(found)  # type: ignore[arg-type]
