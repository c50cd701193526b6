"""Compares a reused step of cachedit_fx, of the floor and of the plain model, which alternate in one process.

    python -m benchmarks.in_turn flux-dispatch [--rounds 12]

Prints medians in milliseconds. The step after a computed step is listed separately from the later ones, because a
computed step evicts the processor's caches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch

import cachedit_fx
from benchmarks.sizes import ON_CPU, WORKS
from benchmarks.variants import THRESHOLD, raise_limits
from benchmarks.work import build, keep_blocks, latents_of, prompt_of, timesteps_of
from cachedit_fx.runtime.instances import end_generation


def measure(name: str, rounds: int) -> dict[tuple[str, str], float]:
    work = WORKS[name]
    ours, plain, short = build(work), build(work), keep_blocks(work, build(work), 1, 0)
    cachedit_fx.enable_cache(
        ours,
        Fn_compute_blocks=1,
        residual_diff_threshold=THRESHOLD,
        max_warmup_steps=work.warmup,
        forecaster=None,
        steps_computation_mask=work.mask,
        fullgraph=True,
    )
    by_hand = torch.compile(plain, fullgraph=True), torch.compile(short, fullgraph=True)
    prompt, latents, found = prompt_of(work, 0).inputs["cond"], latents_of(work, 0), defaultdict(list)
    inputs: dict[str, Any] = dict(hidden_states=latents, return_dict=False, **prompt)
    for number in range(rounds + 2):
        for who in ("ours", "by hand"):
            for step, timestep in enumerate(timesteps_of(work)):
                computes = work.mask[step]
                called = ours if who == "ours" else by_hand[0 if computes else 1]
                started = time.perf_counter()
                called(timestep=timestep, **inputs)
                took = 1e3 * (time.perf_counter() - started)
                kind = "computed" if computes else "reused, first" if work.mask[step - 1] else "reused, later"
                if number >= 2:  # Before, something may be compiled.
                    found[who, kind].append(took)
        end_generation(ours)
    return {key: statistics.median(times) for key, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=ON_CPU[:2])
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    raise_limits()
    with torch.no_grad():
        found = measure(args.work, args.rounds)
    for kind in ("computed", "reused, first", "reused, later"):
        mine, floor = found["ours", kind], found["by hand", kind]
        print(f"{kind:14}  ours {mine:8.2f}  by hand {floor:8.2f}  ratio {mine / floor:.3f}")


if __name__ == "__main__":
    main()
