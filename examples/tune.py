"""Finds which of 28 steps to compute for a target PSNR on the digits, and applies the result to other digits.

    python examples/tune.py [--target psnr=40] [--budget runs=16] [--out DIR]

The script writes `tuned.yaml`, for `enable_cache(pipe, load_tuned(...).config)`, and `frontier.png`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cachedit_fx import disable_cache, enable_cache
from cachedit_fx.tuning import load_tuned, tune

sys.path.insert(0, str(Path(__file__).parent / "digits"))
from model import PIPELINE_SIDE, build_pipeline, class_conditioning, load_transformer, unpatchify

if TYPE_CHECKING:
    from diffusers import FluxPipeline

PEAK = 2.0  # The range of the images, which are within [-1, 1].


def ten_digits(seed: int, steps: int) -> Callable[[FluxPipeline], Tensor]:
    """Returns a call that generates the ten digits as a batch, [10, 8, 8] in [-1, 1], from the same noise each time."""
    tokens, pooled = class_conditioning(torch.arange(10))

    def call(pipeline: FluxPipeline) -> Tensor:
        latents = pipeline(
            prompt_embeds=tokens,
            pooled_prompt_embeds=pooled,
            height=PIPELINE_SIDE,
            width=PIPELINE_SIDE,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            return_dict=False,
        )[0]
        return unpatchify(latents).clamp(-1, 1)

    return call


def psnr(images: Tensor, references: Tensor) -> float:
    """Returns the PSNR of the mean squared error over all images, in dB."""
    return float(10 * torch.log10(PEAK**2 / (images - references).square().mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="psnr=40", help="psnr=..., rel_l2=... or speedup=...")
    parser.add_argument("--budget", default="runs=16", help="runs=... or seconds=...")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps per image")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the output files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # The tensors are too small for several threads.

    pipeline = build_pipeline(load_transformer())
    pipeline.set_progress_bar_config(disable=True)
    calls = [ten_digits(seed, arguments.steps) for seed in range(2)]
    result = tune(pipeline, calls, target=arguments.target, budget=arguments.budget, peak=PEAK, thresholds=())
    print(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result.plot(arguments.out / "frontier.png")
    path = result.save(arguments.out / "tuned.yaml")

    other = ten_digits(100, arguments.steps)
    reference = other(pipeline)
    enable_cache(pipeline, load_tuned(path).config, inner_backend="eager")
    print(f"ten other digits: PSNR {psnr(other(pipeline), reference):.1f} dB")
    disable_cache(pipeline)
    print(f"written: tuned.yaml and frontier.png in {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
