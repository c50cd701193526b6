"""The pipeline of the quality benchmark, its calls, and the conversion of its results to images.

Those of the trained models are made by `quality_models`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality_solvers import LEVELS, Solvers

NUM_STEPS = 28  # Of calls that do not say it.


def images_of(output: Any) -> Tensor:
    """Returns the images in the output of a pipeline, float32 [B, ...]. NumPy arrays and PIL images are from 0 to 1.

    Raises:
        ValueError: The output contains no tensor, arrays or PIL images.
    """
    found = getattr(output, "images", None)
    found = getattr(output, "frames", output) if found is None else found
    found = found[0] if isinstance(found, tuple) else found
    if isinstance(found, Tensor):
        return found.float()
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found).float().movedim(-1, -3)
    if isinstance(found, list) and found and hasattr(found[0], "convert"):
        return torch.from_numpy(np.stack([np.asarray(each) for each in found])).movedim(-1, -3).float() / 255
    raise ValueError(f"a pipeline must return a tensor, an array or a list of pictures, got {type(found).__name__}")


@dataclass(frozen=True)
class Setup:
    """A pipeline and its calls.

    Attributes:
        pipe: The pipeline, neither cached nor compiled.
        calls: The keyword arguments of each call, which generates a batch. A generator among them is reset to its
            current state before every run.
        images: Converts the output of the pipeline to float32 [B, ..., C, H, W] from 0 to 1. A video is one image.
        accuracy: Returns, for the images of all calls, [N, ..., C, H, W], the share that shows what was requested; None
            if this cannot be measured.
        solvers: The schedulers to compare with, as functions of the pipeline's own scheduler.
        is_guided: Whether every step has two calls of the model, one for each guidance branch.
    """

    pipe: Any
    calls: list[dict[str, Any]]
    images: Callable[[Any], Tensor] = images_of
    accuracy: Callable[[Tensor], float] | None = None
    solvers: Solvers = field(default_factory=lambda: LEVELS)
    is_guided: bool = False
    _states: list[Tensor | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_states", [_state_of(call) for call in self.calls])

    @property
    def num_steps(self) -> int:
        return int(self.calls[0].get("num_inference_steps", NUM_STEPS))

    def generate(self, number: int, changed: Mapping[str, Any] | None = None) -> Tensor:
        """Returns the images of call `number` with the arguments in `changed`, from the same noise every time."""
        call, state = self.calls[number], self._states[number]
        if state is not None:
            call["generator"].set_state(state)
        with torch.no_grad():
            return self.images(self.pipe(**call | dict(changed or {})))


def _state_of(call: Mapping[str, Any]) -> Tensor | None:
    generator = call.get("generator")
    return generator.get_state() if isinstance(generator, torch.Generator) else None
