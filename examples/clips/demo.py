"""Generates clips without and with the cache, and shows what the cache did.

    python examples/clips/demo.py [--out DIR] [--steps 20] [--guidance 3] [--threshold 0.2]

Both sides run the WanPipeline of diffusers on the weights in this folder, with a negative prompt, and compile with
Inductor. The two sides alternate after every clip, so that other work on the machine slows both equally. The cache
decides for the two guidance branches separately.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from captions import caption_of, prompts, scene_of
from judge import load_judge, read
from model import build_pipeline, call_arguments, clips_of, load_transformer
from pictures import Outcome, draw_animation, draw_sheet
from torch import Tensor
from torch._inductor.utils import fresh_cache
from tqdm import tqdm

import cachedit_fx

if TYPE_CHECKING:
    from diffusers import WanPipeline


def build_uncached() -> WanPipeline:
    """Returns the pipeline without a cache. One compiled block serves all, which takes a quarter of the time."""
    transformer = load_transformer()
    transformer.compile_repeated_blocks(backend="inductor", fullgraph=True)
    return build_pipeline(transformer)


def build_cached(threshold: float, warmup_steps: int) -> WanPipeline:
    """Returns the pipeline with the cache. Everything that is not given here has its default."""
    return cachedit_fx.enable_cache(
        build_pipeline(),
        residual_diff_threshold=threshold,
        max_warmup_steps=warmup_steps,
        inner_backend="inductor",
        fullgraph=True,
    )


def generate(pipeline: WanPipeline, caption: str, arguments: argparse.Namespace, seed: int) -> tuple[Tensor, float]:
    """Generates a clip, [3, 8, 16, 16] in [-1, 1]; returns it and the time in seconds."""
    call = call_arguments(seed, arguments.steps, arguments.guidance)
    started = time.perf_counter()
    frames = pipeline(prompt=caption, **call).frames
    seconds = time.perf_counter() - started
    return clips_of(frames)[0], seconds


def warm_up(name: str, pipeline: WanPipeline, arguments: argparse.Namespace) -> float:
    """Generates a first clip, which is not shown, and returns the time in seconds, including compilation."""
    pipeline.set_progress_bar_config(desc=f"{name}: compiling, then a first clip", unit="step")
    # Otherwise, the second side would load from disk what the first side or an earlier run has compiled.
    with fresh_cache():
        _, seconds = generate(pipeline, "red square stays", arguments, arguments.seed)
    pipeline.set_progress_bar_config(disable=True)  # The following clips share one progress bar.
    return seconds


def compare(uncached: WanPipeline, cached: WanPipeline, arguments: argparse.Namespace) -> list[Outcome]:
    """Generates the clips with both pipelines in alternation."""
    outcomes = []
    judge = load_judge()
    with tqdm(total=2 * arguments.clips, desc=f"{arguments.clips} clips, twice", unit="clip") as bar:
        for number, caption in enumerate(prompts(arguments.clips, arguments.seed)):
            seed = 1000 * arguments.seed + number
            plain_clip, plain_seconds = generate(uncached, caption, arguments, seed)
            bar.update()
            clip, seconds = generate(cached, caption, arguments, seed)
            bar.update()
            stats = list(cachedit_fx.summary(cached, logging=False))
            scenes = read(judge, torch.stack((plain_clip, clip)))
            right = [set(scene) == set(scene_of(caption)) for scene in scenes]
            texts = [caption_of(scene) or "nothing" for scene in scenes]
            outcomes.append(Outcome(caption, plain_clip, clip, plain_seconds, seconds, stats, *texts, *right))
    return outcomes


def print_clips(outcomes: list[Outcome]) -> None:
    """Prints one row per clip, and a summary of all."""
    branches = [s.session for s in outcomes[0].stats]
    width = max(len(o.caption) for o in outcomes)
    print(
        f"{'caption':<{width}}  {'  '.join(f'reused, {b:<6}' for b in branches)}  PSNR (dB)  uncached (ms)  cached (ms)"
    )
    for o in outcomes:
        reused = "  ".join(f"{len(s.cached_steps):>8}/{s.num_steps:<5}" for s in o.stats)
        times = f"{1000 * o.uncached_seconds:>13.0f}  {1000 * o.cached_seconds:>11.0f}"
        print(f"{o.caption:<{width}}  {reused}  {o.psnr:>9.1f}  {times}")
    for b, branch in enumerate(branches):
        reused = sum(len(o.stats[b].cached_steps) for o in outcomes)
        total = sum(o.stats[b].num_steps for o in outcomes)
        print(f"{branch}: reused {reused} of {total} steps ({reused / total:.0%})")
    # A clip without a reused step may have no error. Its infinite PSNR would make the mean infinite.
    finite = [o.psnr for o in outcomes if math.isfinite(o.psnr)]
    mean = f"{statistics.mean(finite):.1f} dB over {len(finite)} clips" if finite else "infinite: same pixels"
    print(f"mean PSNR {mean}")


def print_readings(outcomes: list[Outcome]) -> None:
    """Prints in how many clips the judge reads the caption, and what it reads in the others."""
    count = len(outcomes)
    uncached, cached = sum(o.uncached_right for o in outcomes), sum(o.cached_right for o in outcomes)
    print(f"the judge reads the caption in {uncached} of {count} uncached clips and {cached} of {count} cached ones")
    for o in outcomes:
        for side, right, text in (
            ("uncached", o.uncached_right, o.uncached_read),
            ("cached", o.cached_right, o.cached_read),
        ):
            if not right:
                print(f"  {o.caption!r}, {side}: it reads {text!r}")
    print()


def print_times(outcomes: list[Outcome], first_uncached: float, first_cached: float) -> None:
    """Prints the median time per clip, and separately the compilation time."""
    uncached = statistics.median(o.uncached_seconds for o in outcomes)
    cached = statistics.median(o.cached_seconds for o in outcomes)
    print(f"CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print("          per clip, median (ms)  compilation (s)")
    print(f"uncached  {1000 * uncached:>21.0f}  {first_uncached - uncached:>15.1f}")
    print(f"cached    {1000 * cached:>21.0f}  {first_cached - cached:>15.1f}")
    print(f"speed-up per clip: {uncached / cached:.2f}x\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the pictures")
    parser.add_argument("--clips", type=int, default=8, help="number of clips")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps per clip")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale; above 1")
    parser.add_argument("--threshold", type=float, default=0.2, help="a step below this residual diff is reused")
    parser.add_argument("--warmup-steps", type=int, default=4, help="number of first steps that are always computed")
    parser.add_argument("--seed", type=int, default=0, help="each seed generates clips of other captions")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    uncached, cached = build_uncached(), build_cached(arguments.threshold, arguments.warmup_steps)
    first_uncached = warm_up("uncached", uncached, arguments)
    first_cached = warm_up("cached", cached, arguments)

    outcomes = compare(uncached, cached, arguments)

    print(f"\n{cachedit_fx.summary(cached, logging=False)}\n")
    print_clips(outcomes)
    print_readings(outcomes)
    print_times(outcomes, first_uncached, first_cached)
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw_sheet(outcomes, arguments.out / "clips.png")
    draw_animation(outcomes, arguments.out / "clips.gif")
    print(f"written: clips.png and clips.gif in {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
