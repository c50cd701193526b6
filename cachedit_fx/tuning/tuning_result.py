"""The result of `tune`: `TuneResult`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachedit_fx.figure import save_figure
from cachedit_fx.integrations.pipelines import enable_cache
from cachedit_fx.integrations.signature import Signature
from cachedit_fx.tuning.frontier_plot import draw_frontier
from cachedit_fx.tuning.frontier_table import frontier_lines
from cachedit_fx.tuning.points import Alternative, Point, Quality, steps_of
from cachedit_fx.tuning.saved import Config, configs_to, save
from cachedit_fx.tuning.solvers import scheduler_from
from cachedit_fx.tuning.targets import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TuneResult:
    """A configuration for `enable_cache`, and its quality.

    Attributes:
        config: The chosen configuration, for `enable_cache`. If the pipeline runs several transformers, it is a dict
            of one configuration for each, by its name. If `choice` is an alternative
            without the cache, it computes every step.
        target: The target of the search.
        is_reached: Whether the target was reached, including the margin.
        predicted: The quality to expect for other calls: the measured quality less the margin.
        verified: The quality that was measured on the given calls.
        is_confirmed: Whether `verified` was measured with the cache enabled, and not by simulating the schedule.
        frontier: All points that were measured or predicted, fastest first.
        signature: What the configuration was tuned on.
        alternatives: Fewer steps with this and other schedulers, as far as they were measured.
        better: The best alternative, if it is better than the best configuration of the cache for the given scheduler
            and number of steps; else None.
        choice: The alternative that was chosen; None if `config` is for the given scheduler and number of steps.
        verdict: One sentence that compares the best alternative with the best cached configuration; empty without
            alternatives.
        why_no_alternatives: Why alternatives cannot be measured with the given calls; empty if they can.
    """

    config: Config
    target: Target
    is_reached: bool
    predicted: Quality
    verified: Quality
    is_confirmed: bool
    frontier: tuple[Point, ...]
    signature: Signature
    alternatives: tuple[Alternative, ...] = ()
    better: Alternative | None = None
    choice: Alternative | None = None
    verdict: str = ""
    why_no_alternatives: str = ""

    def __str__(self) -> str:
        reached = "reached" if self.is_reached else "not reached"
        cached = (point for point in self.frontier if point.is_measured and point.config == self.config)
        chosen = self.choice or next(cached, None)
        lines = [
            f"{self.target} {reached} ({self.target.sentence})",
            f"  predicted: {self.predicted}",
            f"  verified:  {self.verified}",
            *([f"  chosen:    {self.choice.name}"] if self.choice else []),
            *frontier_lines(self.frontier, self.alternatives, chosen, self.verified.speedup),
            *([self.verdict] if self.verdict else []),
        ]
        if self.why_no_alternatives:
            lines.append(f"Fewer steps and other schedulers were not tried, because {self.why_no_alternatives}.")
        return "\n".join(lines)

    def apply(self, pipe: Any, **fields: Any) -> dict[str, Any]:
        """Prepares a pipeline as chosen: sets its scheduler if an alternative was chosen, and enables the cache.

        Args:
            pipe: The pipeline.
            **fields: Further fields for `enable_cache`.

        Returns:
            The arguments that calls of the pipeline need: `num_inference_steps` of a chosen alternative, else none.
        """
        choice = self.choice
        if choice is not None and choice.scheduler_config:
            pipe.scheduler = scheduler_from(choice.scheduler, choice.scheduler_config)
        if choice is None or choice.config is not None:
            enable_cache(pipe, self.config, tuned_on=self.signature, **fields)
        return {} if choice is None else {"num_inference_steps": choice.num_inference_steps}

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes a YAML file (JSON if the path ends in `.json`) for `load_tuned` and `load_configs`.

        Raises:
            ImportError: The path does not end in `.json`, and PyYAML is not installed.
        """
        found = {
            "target": str(self.target),
            "predicted": _rounded(self.predicted),
            "verified": _rounded(self.verified),
            "choice": None if self.choice is None else _plain(self.choice),
            "verdict": self.verdict,
            "alternatives": [_plain(each) for each in self.alternatives],
            "signature": self.signature,
        }
        return save(path, self.config, found)

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Plots quality over speed: measured, predicted and alternative points, the choice and the target.

        Args:
            path: The file to write, if any: png, svg or pdf.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        signature = self.signature
        name = self.choice.name if self.choice else f"cache, {steps_of(self.config)}"
        given = f"{signature.get('pipeline', '')}, {signature.get('transformer', '')}"
        reference = (
            "" if self.choice else f", {signature.get('num_steps', '')} steps of {signature.get('scheduler', '')}"
        )
        title = f"{self.target.sentence[0].upper()}{self.target.sentence[1:]}", f"{given}{reference}"
        figure = draw_frontier(self.target, self.frontier, self.alternatives, (name, self.verified), title)
        if path is not None:
            save_figure(figure, path)
        return figure


def _rounded(quality: Quality) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in dataclasses.asdict(quality).items()}


def _plain(alternative: Alternative) -> dict[str, Any]:
    return {
        "scheduler": alternative.scheduler,
        "scheduler_config": dict(alternative.scheduler_config),
        "num_inference_steps": alternative.num_inference_steps,
        "cache_config": None if alternative.config is None else configs_to(alternative.config),
        "is_reached": alternative.is_reached,
        "quality": _rounded(alternative.quality),
    }
