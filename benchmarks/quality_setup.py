"""The pipeline of the quality benchmark, its calls, and the conversion of its results to images.

The default is the digits model of examples/digits. Another pipeline is given as `module:factory`, a function that
returns a pipeline and a list of keyword arguments for it, or a `Setup`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits" / "model.py"
NUM_STEPS = 28


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
        images: Converts the output of the pipeline to float32 [B, C, H, W] from 0 to 1.
        accuracy: Returns, for the images of all calls, [N, C, H, W], the share that shows what was requested; None if
            this cannot be measured.
    """

    pipe: Any
    calls: list[dict[str, Any]]
    images: Callable[[Any], Tensor] = images_of
    accuracy: Callable[[Tensor], float] | None = None
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


def load_setup(name: str, num_images: int, batch: int) -> Setup:
    """Returns the setup with this name: "digits" or `module:factory`.

    Raises:
        ValueError: The name has neither form.
    """
    if name == "digits":
        return digits(num_images, batch)
    module, colon, factory = name.partition(":")
    if not (module and colon and factory):
        raise ValueError(f"--pipeline must be 'digits' or module:factory, got {name!r}")
    sys.path.insert(0, "")
    made = getattr(importlib.import_module(module), factory)()
    return made if isinstance(made, Setup) else Setup(*made)


def digits(num_images: int, batch: int, num_steps: int = NUM_STEPS, seed: int = 0) -> Setup:
    """Returns a setup that generates the ten digits in rotation. The seed of batch i is `seed` + i."""
    model = digits_model()
    pipe = model.build_pipeline(model.load_transformer())
    pipe.set_progress_bar_config(disable=True)
    asked = torch.arange(num_images) % model.NUM_CLASSES
    calls = []
    for number, part in enumerate(asked.split(batch)):
        tokens, pooled = model.class_conditioning(part)
        calls.append(
            {
                "prompt_embeds": tokens,
                "pooled_prompt_embeds": pooled,
                "height": model.PIPELINE_SIDE,
                "width": model.PIPELINE_SIDE,
                "num_inference_steps": num_steps,
                "generator": torch.Generator().manual_seed(seed + number),
                "output_type": "latent",
                "return_dict": False,
            }
        )

    def images(output: Any) -> Tensor:
        pixels: Tensor = model.unpatchify(output[0])
        return pixels.clamp(-1, 1)[:, None] / 2 + 0.5

    return Setup(pipe, calls, images, DigitsRead(asked))


class DigitsRead:
    """Computes the share of images in which a classifier, trained on scikit-learn's digits, finds the requested class.

    Args:
        asked: The requested classes, [N].
    """

    def __init__(self, asked: Tensor) -> None:
        from sklearn.datasets import load_digits
        from sklearn.svm import SVC

        data = load_digits()
        self._asked = asked.numpy()
        self._reader = SVC(gamma=0.001).fit(data.data, data.target)  # The settings of scikit-learn's own example.

    def __call__(self, images: Tensor) -> float:
        read = self._reader.predict(16 * images.flatten(1).numpy())  # The data has grey levels 0 to 16.
        return float((read == self._asked[: len(read)]).mean())


def digits_model() -> ModuleType:
    """Imports examples/digits/model.py, which is in no package."""
    name = "examples_digits_model"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, DIGITS)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
