"""The two trained models of the quality benchmark: the digits (FLUX) and the clips (Wan, with guidance).

Another pipeline is given as `module:factory`, a function that returns a pipeline and a list of keyword arguments for
it, or a `Setup`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality_setup import Setup
from benchmarks.quality_solvers import STEPS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DIGIT_STEPS, CLIP_STEPS = 28, 20


def digits(num_images: int, batch: int, num_steps: int = DIGIT_STEPS, seed: int = 0) -> Setup:
    """Returns a setup that generates the ten digits in rotation. The seed of batch i is `seed` + i."""
    model = example("digits", "model").model
    pipe = model.build_pipeline(model.load_transformer())
    pipe.set_progress_bar_config(disable=True)
    requested = torch.arange(num_images) % model.NUM_CLASSES
    calls = []
    for number, part in enumerate(requested.split(batch)):
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

    return Setup(pipe, calls, images, DigitsRead(requested))


class DigitsRead:
    """Computes the share of images in which a classifier, trained on scikit-learn's digits, finds the requested class.

    Args:
        requested: The requested classes, [N].
    """

    def __init__(self, requested: Tensor) -> None:
        from sklearn.datasets import load_digits
        from sklearn.svm import SVC

        data = load_digits()
        self._requested = requested.numpy()
        self._reader = SVC(gamma=0.001).fit(data.data, data.target)  # The settings of scikit-learn's own example.

    def __call__(self, images: Tensor) -> float:
        read = self._reader.predict(16 * images.flatten(1).numpy())  # The data has grey levels 0 to 16.
        return float((read == self._requested[: len(read)]).mean())


def clips(num_images: int, batch: int, num_steps: int = CLIP_STEPS, seed: int = 0) -> Setup:
    """Returns a setup that generates clips of random captions. The seed of batch i, and of the captions, is `seed` + i.

    The captions are encoded once, so that the FLOPs are those of the transformer alone.
    """
    modules = example("clips", "model", "captions", "judge")
    model, judge = modules.model, modules.judge
    pipe = model.build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    captions = modules.captions.prompts(num_images, seed + 1)
    calls = []
    for number in range(0, num_images, batch):
        call = model.call_arguments(seed + number // batch, num_steps)
        length = call["max_sequence_length"]
        with torch.no_grad():
            prompt, negative = pipe.encode_prompt(
                captions[number : number + batch], call.pop("negative_prompt"), max_sequence_length=length
            )
        calls.append(call | {"prompt_embeds": prompt, "negative_prompt_embeds": negative})

    def accuracy(frames: Tensor) -> float:
        return float(judge.accuracy(model.clips_of(frames), captions[: len(frames)]))

    return Setup(pipe, calls, accuracy=accuracy, solvers=STEPS, is_guided=True)


MODELS: dict[str, Callable[..., Setup]] = {"digits": digits, "clips": clips}
SIZES = {"digits": (100, 20), "clips": (32, 16)}  # Numbers of images, in all and in a batch.


def size_of(model: str) -> tuple[int, int]:
    """Returns how many images of a model to generate, and how many at once."""
    return SIZES.get(model, SIZES["digits"])


def load_setup(name: str, num_images: int, batch: int) -> Setup:
    """Returns the setup with this name: a key of `MODELS`, or `module:factory`.

    Raises:
        ValueError: The name has neither form.
    """
    if name in MODELS:
        return MODELS[name](num_images, batch)
    module, colon, factory = name.partition(":")
    if not (module and colon and factory):
        raise ValueError(f"--model must be one of {', '.join(map(repr, MODELS))}, or module:factory, got {name!r}")
    sys.path.insert(0, "")
    made = getattr(importlib.import_module(module), factory)()
    return made if isinstance(made, Setup) else Setup(*made)


@cache
def example(folder: str, *names: str) -> SimpleNamespace:
    """Imports scripts of a folder of `examples`, which import each other by their short names.

    The names are removed from `sys.modules` afterwards, because other folders have scripts of the same names.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(EXAMPLES / folder))
    try:
        found = {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(EXAMPLES / folder))
        for name in set(sys.modules) - before:
            if _is_below(sys.modules[name], EXAMPLES / folder):
                del sys.modules[name]
    return SimpleNamespace(**found)


def _is_below(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and folder in Path(file).parents
