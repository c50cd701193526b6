"""Runs the given calls repeatedly, with the same noise each time, and converts their results to tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachedit_fx.errors import ConfigError, shown

Given = Mapping[str, Any] | Callable[[Any], Any]


@dataclass(frozen=True)
class Call:
    """One call of the pipeline. It can run any number of times, each time from the same random state.

    Attributes:
        given: The arguments of the pipeline, or a function of the pipeline.
        seed: The seed of torch's global generators, for calls without a generator among their arguments.
        states: The initial states of the generators among the arguments.
    """

    given: Given
    seed: int
    states: tuple[tuple[torch.Generator, Tensor], ...] = ()

    def run(self, pipe: Any) -> Tensor:
        """Runs the call and returns its images as a float32 tensor on the CPU, [images, ...].

        Raises:
            ConfigError: The result of the pipeline contains no images.
        """
        for generator, state in self.states:
            generator.set_state(state)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.seed)
            if callable(self.given):
                return as_tensor(self.given(pipe))
            arguments = dict(self.given)
            if callable(arguments.get("generator")):
                arguments["generator"] = arguments["generator"]()
            return as_tensor(pipe(**arguments))


def calls_of(given: Any) -> tuple[Call, ...]:
    """Returns one `Call` per entry of the list.

    Raises:
        ConfigError: `given` is not a list of dicts and functions, or is empty.
    """
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    if not is_list or not given or not all(isinstance(call, Mapping) or callable(call) for call in given):
        raise ConfigError(
            "cachedit_fx: calls must be a non-empty list of dicts of the pipeline's arguments, or of functions of the "
            f"pipeline, got {shown(given)}"
        )
    return tuple(Call(call, seed, _states(call)) for seed, call in enumerate(given))


def _states(call: Given) -> tuple[tuple[torch.Generator, Tensor], ...]:
    values = call.values() if isinstance(call, Mapping) else ()
    flat = [each for value in values for each in (value if isinstance(value, list | tuple) else [value])]
    return tuple((each, each.get_state()) for each in flat if isinstance(each, torch.Generator))


def as_tensor(returned: Any) -> Tensor:
    """Converts the first value that a pipeline returned to a float32 tensor on the CPU.

    The value may be a tensor, an array, or nested lists of images. 8-bit pixels are scaled to [0, 1].

    Raises:
        ConfigError: The value is none of these, or the images differ in size.
    """
    found = returned
    if isinstance(found, tuple) or hasattr(found, "to_tuple"):
        found = found[0]
    try:
        tensor = found.detach().cpu() if isinstance(found, Tensor) else torch.from_numpy(np.array(_arrays(found)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "cachedit_fx: a call must return a tensor, an array or images of one size as its first value, got "
            f"{shown(returned)}"
        ) from error
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()


def _arrays(found: Any) -> Any:
    if isinstance(found, list | tuple):
        return [_arrays(each) for each in found]
    return found.detach().float().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
