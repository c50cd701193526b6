"""Generates the ten digits without and with the cache, and shows what the cache did.

    python examples/digits/demo.py [--out DIR] [--steps 28] [--threshold 0.2]

Both sides run the FluxPipeline of diffusers on the weights in this folder and compile with Inductor; they differ in the
backend only. The two sides alternate after every digit, so that other work on the machine slows both equally.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from model import PIPELINE_SIDE, build_pipeline, class_conditioning, load_transformer, unpatchify
from pictures import Outcome, draw_grid, draw_timeline
from torch import Tensor
from torch._inductor.utils import fresh_cache
from tqdm import tqdm

import cachedit_fx

if TYPE_CHECKING:
    from diffusers import FluxPipeline


def build_uncached() -> FluxPipeline:
    """Returns the pipeline with a compiled transformer and no cache."""
    return build_pipeline(torch.compile(load_transformer(), backend="inductor", fullgraph=True))


def build_cached(threshold: float, warmup_steps: int) -> FluxPipeline:
    """Returns the pipeline with a compiled transformer that reuses the last residual of all blocks except the first."""
    options = {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": threshold,
        "max_warmup_steps": warmup_steps,
        "forecaster": None,
        "inner_backend": "inductor",
    }
    return build_pipeline(torch.compile(load_transformer(), backend="cachedit", fullgraph=True, options=options))


def generate(pipeline: FluxPipeline, digit: int, steps: int, seed: int) -> tuple[Tensor, float]:
    """Generates one image of `digit`, [8, 8] in [-1, 1]; returns it and the time in seconds.

    The noise depends on `digit` and `seed` only, so that two pipelines can be compared pixel by pixel.
    """
    tokens, pooled = class_conditioning(torch.tensor([digit]))
    generator = torch.Generator().manual_seed(10 * seed + digit)
    started = time.perf_counter()
    latents = pipeline(
        prompt_embeds=tokens,
        pooled_prompt_embeds=pooled,
        height=PIPELINE_SIDE,
        width=PIPELINE_SIDE,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        return_dict=False,
    )[0]
    seconds = time.perf_counter() - started
    return unpatchify(latents)[0].clamp(-1, 1), seconds


def warm_up(name: str, pipeline: FluxPipeline, steps: int, seed: int) -> float:
    """Generates a first image, which is not shown, and returns the time in seconds, including compilation."""
    pipeline.set_progress_bar_config(desc=f"{name}: compiling, then a first image", unit="step")
    # Otherwise, the second side would load from disk what the first side or an earlier run has compiled.
    with fresh_cache():
        _, seconds = generate(pipeline, 0, steps, seed)
    pipeline.set_progress_bar_config(disable=True)  # The following images share one progress bar.
    return seconds


def compare(uncached: FluxPipeline, cached: FluxPipeline, steps: int, seed: int) -> list[Outcome]:
    """Generates the ten digits with both pipelines in alternation."""
    outcomes = []
    with tqdm(total=20, desc="ten digits, twice", unit="image") as bar:
        for digit in range(10):
            bar.set_postfix(digit=digit)
            plain_image, plain_seconds = generate(uncached, digit, steps, seed)
            bar.update()
            image, seconds = generate(cached, digit, steps, seed)
            bar.update()
            stats = cachedit_fx.summary(cached.transformer, logging=False)[-1]
            outcomes.append(Outcome(digit, plain_image, image, plain_seconds, seconds, stats))
    return outcomes


def print_digits(outcomes: list[Outcome]) -> None:
    """Prints one row per digit, and a summary of all ten."""
    print("digit  reused steps  PSNR (dB)  uncached (ms)  cached (ms)")
    for o in outcomes:
        reused = f"{len(o.stats.cached_steps)}/{o.stats.num_steps}"
        times = f"{1000 * o.uncached_seconds:>13.0f}  {1000 * o.cached_seconds:>11.0f}"
        print(f"{o.digit:>5}  {reused:>12}  {o.psnr:>9.1f}  {times}")
    reused = sum(len(o.stats.cached_steps) for o in outcomes)
    total = sum(o.stats.num_steps for o in outcomes)
    # A digit without a reused step may have no error. Its infinite PSNR would make the mean infinite.
    finite = [o.psnr for o in outcomes if math.isfinite(o.psnr)]
    mean = f"{statistics.mean(finite):.1f} dB over {len(finite)} digits" if finite else "infinite: same pixels"
    print(f"reused {reused} of {total} steps ({reused / total:.0%}), mean PSNR {mean}\n")


def print_times(outcomes: list[Outcome], first_uncached: float, first_cached: float) -> None:
    """Prints the median time per image of ten images, and separately the compilation time."""
    uncached = statistics.median(o.uncached_seconds for o in outcomes)
    cached = statistics.median(o.cached_seconds for o in outcomes)
    print(f"CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print("          per image, median (ms)  compilation (s)")
    print(f"uncached  {1000 * uncached:>22.0f}  {first_uncached - uncached:>15.1f}")
    print(f"cached    {1000 * cached:>22.0f}  {first_cached - cached:>15.1f}")
    print(f"speed-up per image: {uncached / cached:.2f}x\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the figures")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps per image")
    parser.add_argument("--threshold", type=float, default=0.2, help="a step below this residual diff is reused")
    parser.add_argument("--warmup-steps", type=int, default=4, help="number of first steps that are always computed")
    parser.add_argument("--seed", type=int, default=0, help="each seed generates ten different digits")
    # Tensors of 18 tokens and 128 channels are too small for several threads, which would wait for each other.
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    steps, seed = arguments.steps, arguments.seed
    uncached, cached = build_uncached(), build_cached(arguments.threshold, arguments.warmup_steps)
    first_uncached = warm_up("uncached", uncached, steps, seed)
    first_cached = warm_up("cached", cached, steps, seed)

    outcomes = compare(uncached, cached, steps, seed)

    print(f"\n{cachedit_fx.summary(cached.transformer, logging=False)}\n")
    print_digits(outcomes)
    print_times(outcomes, first_uncached, first_cached)
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw_grid(outcomes, arguments.out / "digits.png")
    draw_timeline(outcomes, arguments.threshold, arguments.out / "timeline.png")
    print(f"written: digits.png and timeline.png in {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
