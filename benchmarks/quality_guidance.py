"""What guidance reuse is worth on the trained clips: PSNR against the uncached clips, and the share that is computed.

    python -m benchmarks.quality_guidance [--clips 8] [--steps 20] [--out guidance.json]

The clips are those of `examples/clips`. Every configuration runs the same prompts and the same noise, eagerly. The
computed share is the number of block runs, over both guidance branches, divided by that without the cache.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cachedit_fx
from benchmarks.quality_metrics import nearness
from cachedit_fx import CacheConfig

CLIPS = Path(__file__).parents[1] / "examples" / "clips"
THRESHOLDS = (0.03, 0.06, 0.09, 0.12, 0.18, 0.25)
TARGETS = (45.0, 40.0, 35.0)  # dB
# When the branch that is called second computes, of the steps that the first one computes. By name: its fields.
SECOND: dict[str, dict[str, Any]] = {
    "off": {},
    "off, one diff": dict(cfg_diff_compute_separate=False),
    "every 2nd": dict(guidance_reuse="difference", max_continuous_guidance_steps=1),
    "every 4th": dict(guidance_reuse="difference", max_continuous_guidance_steps=3),
    "never": dict(guidance_reuse="difference"),
    "first half": dict(guidance_reuse="difference", guidance_computation_mask=(1,) * 10),
    "first half, then every 2nd": dict(guidance_reuse="difference", guidance_computation_mask=(1,) * 10 + (0, 1) * 20),
}
Point = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all configurations, prints them, and compares the computed shares at equal PSNR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, default=CLIPS, help="the folder of the clip model")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--second", nargs="*", choices=SECOND, default=[*SECOND])
    parser.add_argument("--thresholds", nargs="*", type=float, default=[*THRESHOLDS])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(given.examples))
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    points = measured(given.clips, given.steps, given.second, given.thresholds)
    if given.out is not None:
        given.out.write_text(json.dumps(points, indent=1), encoding="utf-8")
    print(compared(points))


def measured(num_clips: int, num_steps: int, second: Sequence[str], thresholds: Sequence[float]) -> list[Point]:
    """Returns one point per configuration: its name, PSNR in dB, SSIM, computed share and number of guided steps."""
    from captions import prompts  # type: ignore[import-not-found]
    from model import build_pipeline, call_arguments  # type: ignore[import-not-found]

    pipe = build_pipeline()
    pipe.set_progress_bar_config(disable=True)
    captions = prompts(num_clips, seed=1)

    def clips() -> Tensor:
        with torch.no_grad():
            frames: Tensor = pipe(prompt=captions, **call_arguments(seed=0, steps=num_steps)).frames
        return frames

    reference = clips()
    cachedit_fx.enable_cache(pipe, CacheConfig(inner_backend="eager"))
    points = []
    defaults = {name: getattr(CacheConfig(), name) for fields in SECOND.values() for name in fields}
    for name in second:
        for threshold in thresholds:
            fields = defaults | SECOND[name] | {"residual_diff_threshold": threshold}
            cachedit_fx.refresh_context(pipe, **fields)
            cachedit_fx.reset(pipe.transformer)
            start = time.process_time()
            found = nearness(clips(), reference)
            point = dict(second=name, threshold=threshold, psnr=found.psnr, ssim=found.ssim)
            point |= share_of(pipe) | dict(cpu_seconds=round(time.process_time() - start, 1))
            points.append(point)
            print(point, file=sys.stderr, flush=True)
    return points


def share_of(pipe: Any) -> Point:
    """Returns the computed share of the last generation, over all guidance branches."""
    found = cachedit_fx.summary(pipe, logging=False)
    blocks = len(pipe.transformer.blocks)
    steps, reused = sum(s.num_steps for s in found), sum(len(s.cached_steps) for s in found)
    guided = sum(len(s.guided_steps) for s in found)
    return dict(share=1 - reused / steps * (blocks - 1) / blocks, reused=reused, guided=guided, steps=steps)


def share_at(points: Sequence[Point], psnr: float) -> float:
    """Returns the smallest computed share with this PSNR, on the lines between the points; NaN if there is none."""
    found = [p["share"] for p in points if p["psnr"] >= psnr]
    for one in points:
        for other in points:
            if one["psnr"] < psnr <= other["psnr"]:
                weight = (psnr - one["psnr"]) / (other["psnr"] - one["psnr"])
                found.append(one["share"] + weight * (other["share"] - one["share"]))
    return min(found, default=math.nan)


def compared(points: Sequence[Point]) -> str:
    """Returns a table of the computed shares at equal PSNR, each also as a fraction of that of the first row."""
    by_second: dict[str, list[Point]] = {}
    for point in points:
        by_second.setdefault(point["second"], []).append(point)
    lines = ["| second branch | " + " | ".join(f"{target:.0f} dB" for target in TARGETS) + " |", "|---" * 4 + "|"]
    first = next(iter(by_second.values()), [])
    for name, found in by_second.items():
        shares = [(share_at(found, target), share_at(first, target)) for target in TARGETS]
        lines.append(f"| {name} | " + " | ".join(f"{one:.1%} ({one / base:.2f})" for one, base in shares) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
