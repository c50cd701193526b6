"""Finds the fastest configuration that reaches a PSNR on the digits, and applies it to other digits.

    python examples/tune.py [--at-least psnr=40] [--budget runs=24] [--choose] [--out DIR]
    python examples/tune.py --target best --at-least speedup=3

The script writes `tuned.yaml`, for `enable_cache(pipe, load_tuned(...).config)`, and `frontier.png`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachedit_fx.tuning import tune

sys.path.insert(0, str(Path(__file__).parent / "digits"))
from model import PIPELINE_SIDE, build_pipeline, class_conditioning, load_transformer

PEAK = 2.0  # The range of the images, which are within [-1, 1].


def ten_digits(seed: int, steps: int) -> dict[str, Any]:
    """Returns the arguments of a call that generates the ten digits as a batch, always from the same noise.

    The latents of this pipeline are the pixels of the images.
    """
    tokens, pooled = class_conditioning(torch.arange(10))
    return dict(
        prompt_embeds=tokens,
        pooled_prompt_embeds=pooled,
        height=PIPELINE_SIDE,
        width=PIPELINE_SIDE,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_dict=False,
    )


def psnr(images: Tensor, references: Tensor) -> float:
    """Returns the mean over the images of the PSNR of each, in dB."""
    errors = (images - references).square().flatten(1).mean(1)
    return float((10 * torch.log10(PEAK**2 / errors)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="fastest", help="fastest, or best for the best quality at a speed")
    parser.add_argument("--at-least", default="psnr=40", help="psnr=... (dB) for fastest, speedup=... for best")
    parser.add_argument("--budget", default="runs=24", help="runs=... or seconds=...")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps per image")
    parser.add_argument("--choose", action="store_true", help="allow fewer steps and another scheduler")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the output files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # The tensors are too small for several threads.

    pipeline = build_pipeline(load_transformer())
    pipeline.set_progress_bar_config(disable=True)
    result = tune(
        pipeline,
        [ten_digits(seed, arguments.steps) for seed in range(2)],
        target=arguments.target,
        at_least=arguments.at_least,
        budget=arguments.budget,
        alternatives="choose" if arguments.choose else "report",
        peak=PEAK,
        thresholds=(),
    )
    print(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result.plot(arguments.out / "frontier.png")
    result.save(arguments.out / "tuned.yaml")

    reference = pipeline(**ten_digits(100, arguments.steps))[0]
    changed = result.apply(pipeline, inner_backend="eager")
    images = pipeline(**ten_digits(100, arguments.steps) | changed)[0]
    print(f"ten other digits: PSNR {psnr(images, reference):.1f} dB")
    print(f"written: tuned.yaml and frontier.png in {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
