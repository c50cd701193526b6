"""Records the decisions and outputs of cache-dit for the cases of `cases.py`: `python -m tests.peers.record`.

Needs the extra "peers". cache-dit patches the classes of the pipelines, so every case runs in a separate process that
is forked from one that has run no case.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cache_dit
import torch
from cache_dit.envs import ENV
from torch import nn

from tests.models import FAMILIES
from tests.peers.cases import CASES, RECORDED, Case, build, generate, subject

NUM_LATENTS = 64
MASK_POLICIES = ("slow", "medium", "fast", "ultra")
MASK_STEPS = (4, 6, *range(8, 51))  # cache-dit has none for 5, 7 and fewer than 4.

_PREFIX = re.compile(r"(?P<list>\w+?)(?:_(?P<block>\d+)_Fn_original|_Fn_residual)")


class Observer:
    """Records the decisions of cache-dit's context manager, by guidance branch, region and step.

    A branch is identified by the order of the calls in the loop, and a step is the number of the branch's call.
    Therefore both have the same meaning before and after cache-dit has started over.
    """

    def __init__(self, case: Case, transformer: nn.Module) -> None:
        self.case = case
        self.manager = transformer._context_manager
        self.num_calls = 0
        self.names = FAMILIES[case.family].guidance_branches
        self.guidance_branches: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in self.names}
        self._diff: float | None = None
        self._can_cache, self._add_residual_diff = self.manager.can_cache, self.manager.add_residual_diff
        self.manager.can_cache, self.manager.add_residual_diff = self.can_cache, self.add_residual_diff
        transformer.register_forward_pre_hook(self.count_call)

    def count_call(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        self.num_calls += 1

    def add_residual_diff(self, diff: float) -> None:
        self._diff = diff if diff >= 0 else None  # -1 and -2 are markers: always similar, and different shapes.
        self._add_residual_diff(diff)

    def can_cache(self, states: torch.Tensor, *, prefix: str, **others: Any) -> bool:
        self._diff = None
        reuse = bool(self._can_cache(states, prefix=prefix, **others))
        place = _PREFIX.fullmatch(prefix)
        assert place is not None, prefix
        step, guidance_branch = divmod(self.num_calls - 1, len(self.names))
        name = place["list"] if self.case.regions == "per_list" else "merged"
        region = self.guidance_branches[self.names[guidance_branch]].setdefault(
            name, {"cached_steps": [], "residual_diffs": {}}
        )
        if reuse and step not in region["cached_steps"]:
            region["cached_steps"].append(step)
        if not self.case.prune:
            if self._diff is not None:
                region["residual_diffs"][str(step)] = rounded(self._diff)
            return reuse
        pruned = region.setdefault("pruned_blocks", {})
        if reuse:
            pruned.setdefault(str(step), []).append(int(place["block"]))
        if self._diff is not None:
            region["residual_diffs"].setdefault(str(step), {})[place["block"]] = rounded(self._diff)
        return reuse

    def check(self) -> None:
        """Asserts that the statistics of cache-dit agree, for the steps since it last started over."""
        for context in self.manager._cached_context_manager.values():
            if context.transformer_executed_steps != self.num_calls:
                continue
            name = re.sub(r"_\d+$", "", context.name) if self.case.regions == "per_list" else "merged"
            for guidance_branch, reused in zip(
                self.names, (context.cached_steps, context.cfg_cached_steps), strict=False
            ):
                assert self.guidance_branches[guidance_branch][name]["cached_steps"] == reused, (
                    str(self.case),
                    guidance_branch,
                    name,
                )


def record(case: Case) -> dict[str, Any]:
    """The record of `case`. The process stays patched."""
    torch.set_num_threads(1)
    ENV.CACHE_DIT_FLUX_ENABLE_DUMMY_BLOCKS = case.regions == "merged"
    config = cache_dit.DBPruneConfig if case.prune else cache_dit.DBCacheConfig
    settings: dict[str, Any] = {"cache_config": config(**case.fields)}
    if case.modifiers:
        # A reset configuration changes only the fields that it is given.
        settings["params_modifiers"] = [
            cache_dit.ParamsModifier(cache_config=config().reset(**fields)) for fields in case.modifiers
        ]
    if case.taylorseer_order:
        settings["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=case.taylorseer_order)
    transformer = build(case)
    called = subject(case, transformer)
    cache_dit.enable_cache(called, **settings)
    observer = Observer(case, transformer)
    latents = generate(case, called).float()
    observer.check()
    return {
        "case": case.as_json(),
        "branches": observer.guidance_branches,
        "latents": {
            "shape": list(latents.shape),
            "first": [rounded(value) for value in latents.flatten()[:NUM_LATENTS].tolist()],
            "mean_abs": rounded(latents.double().abs().mean().item()),
        },
    }


def rounded(value: float) -> float:
    """Rounds to 9 significant digits, which represent a float32 exactly."""
    return float(f"{value:.9g}")


def _masks() -> dict[str, dict[str, str]]:
    """Every predefined mask, as a string of digits."""

    def digits(policy: str, steps: int) -> str:
        return "".join(map(str, cache_dit.steps_mask(mask_policy=policy, total_steps=steps)))

    return {policy: {str(steps): digits(policy, steps) for steps in MASK_STEPS} for policy in MASK_POLICIES}


def _write(name: str, values: dict[str, Any]) -> None:
    versions = {"cache_dit": version("cache-dit"), "diffusers": version("diffusers"), "torch": version("torch")}
    text = json.dumps({"versions": versions, **values}, indent=1)
    text = re.sub(r"\[[^][{}]*\]", _on_one_line, text)
    text = re.sub(r"\{[^{}]*\}", _on_one_line, text)
    path = RECORDED / f"{name}.json"
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{path.relative_to(Path.cwd())}: {path.stat().st_size / 1024:.0f} KiB")


def _on_one_line(innermost: re.Match[str]) -> str:
    return json.dumps(json.loads(innermost[0]))


def main() -> None:
    logging.disable(logging.WARNING)
    RECORDED.mkdir(exist_ok=True)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        results = pool.map(record, CASES, chunksize=1)
    for family in FAMILIES:
        cases = {case.name: result for case, result in zip(CASES, results, strict=True) if case.family == family}
        _write(family, {"cases": dict(sorted(cases.items()))})
    _write("steps_masks", {"masks": _masks()})


if __name__ == "__main__":
    main()
