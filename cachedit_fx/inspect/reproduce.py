"""Runs the passes again on a graph in a folder of `debug_dir`; `reproduce.py` in such a folder calls `main`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import fx

from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.frontend.backend import compile_cached_graph
from cachedit_fx.frontend.inner_compiler import InnerCompiler
from cachedit_fx.frontend.uncached import WhyUncached, why_of
from cachedit_fx.inspect.explanation.build import build_report
from cachedit_fx.inspect.explanation.data import Captured
from cachedit_fx.inspect.explanation.dynamo_recorder import RecordedGraph
from cachedit_fx.inspect.explanation.graphs import snapshot
from cachedit_fx.inspect.explanation.result import Explanation
from cachedit_fx.inspect.explanation.trace import Trace
from cachedit_fx.inspect.graph_json import from_json
from cachedit_fx.passes.manager import Rewritten, rewrite
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.nodes import value_of
from cachedit_fx.runtime.instances import instance_of_weights
from cachedit_fx.runtime.request import session
from cachedit_fx.runtime.stats import CacheStats


def explain_saved(folder: str | Path) -> Explanation:
    """Runs the passes on the graph in `folder` and returns the same explanation as `explain`.

    Raises:
        FileNotFoundError: `folder` contains no graph.json.
    """
    data = _read(folder)
    gm, config, trace = from_json(data), _config(data), Trace()
    with torch.no_grad():
        planned = rewrite(gm, config, Declaration(), exact=True, observer=trace)
        report = build_report(gm, trace, config, Declaration(), cls=data["cls"], number=0)
    why = why_of(planned, None) if isinstance(planned, tuple) else WhyUncached("", "", "")
    how = Captured("", data["cls"], "from a file", "", config.shown_changes, why.reason, why.cure, why.text)
    return Explanation(data["cls"], [how], [RecordedGraph(report, trace.graphs())])


def run_saved(folder: str | Path) -> list[CacheStats]:
    """Runs three steps of the saved graph with random weights: computed, reused, computed.

    Returns:
        The statistics of every region.

    Raises:
        AssertionError: A computed step differs from the captured graph.
        ValueError: The graph is not cached.
    """
    data = _read(folder)
    config = _config(data).override(
        inner_backend="eager", max_warmup_steps=1, residual_diff_threshold=1.0, max_continuous_cached_steps=1
    )
    gm = from_json(data)
    _fill(gm)
    plain = snapshot(gm)
    with torch.no_grad():
        found = rewrite(gm, config, Declaration(), exact=True)
        if not isinstance(found, Rewritten):
            lines = (
                "cachedit_fx: this graph is not cached, so there are no steps to run.",
                f"  {found[0].cause.value}:",
                *found[0].lines,
                "See every verdict: the script without --run, or explain_saved(folder)",
            )
            raise ValueError("\n".join(lines))
        steps = _random_steps(plain, found.plan.timestep.name if found.plan.timestep is not None else "")
        compiled = compile_cached_graph(found, config, InnerCompiler(config, None, {}), "saved", policy_per_call=False)
        with session("saved"):
            outputs = [compiled(*inputs) for inputs in steps]
        for i in (0, 2):
            torch.testing.assert_close(outputs[i], plain(*steps[i]), rtol=0, atol=0, equal_nan=True)
    weights = [steps[0][weight] if isinstance(weight, int) else weight for weight in found.runtime_plan.weights]
    return [entry for record in instance_of_weights(weights).records() for entry in record.stats]


def main(folder: Path) -> None:
    """Runs the command line of `reproduce.py` in `folder`."""
    parser = argparse.ArgumentParser(description="Runs the passes of cachedit_fx again on a saved graph.")
    parser.add_argument("--run", action="store_true", help="also run three steps with random weights")
    given = parser.parse_args()
    print(explain_saved(folder))
    if given.run:
        for stats in run_saved(folder):
            print(f"{stats.region}: {', '.join(stats.decisions)}; computed steps equal the captured graph bit for bit")


def _read(folder: str | Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((Path(folder) / "graph.json").read_text(encoding="utf-8"))
    return data


def _config(data: dict[str, Any]) -> CacheConfig:
    return CacheConfig().override(**{name: value for name, value in data["config"]})


def _random_steps(gm: fx.GraphModule, timestep: str) -> list[list[Any]]:
    """Returns the inputs of three steps, which differ in the timestep only; it decreases.

    Integer tensors contain zeros, so that they are valid indices.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [_random(value_of(node), i) for i, node in enumerate(placeholders)]
    times = [node.name == timestep for node in placeholders]
    return [
        [torch.full_like(v, 9 - 3 * step) if is_time else v for v, is_time in zip(values, times, strict=True)]
        for step in range(3)
    ]


def _random(value: Any, seed: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if value.is_floating_point():
        tensor.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    else:
        tensor.zero_()
    return torch.nn.Parameter(tensor, requires_grad=False) if isinstance(value, torch.nn.Parameter) else tensor


def _fill(gm: fx.GraphModule) -> None:
    """Fills the parameters and buffers of a graph with random values."""
    for module in gm.modules():
        for seed, (name, value) in enumerate(
            [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        ):
            setattr(module, name, _random(value, seed))
