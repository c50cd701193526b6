"""Measures the time of the passes, from Dynamo's graph to the pieces to compile, by the number of blocks.

A FLUX with few channels is captured once for every depth, and nothing is compiled. The graphs are rewritten in
alternation, so that other work on the machine affects all of them equally. The figures are medians of CPU time. They
include Python's garbage collector, which visits only the objects that the passes create.

    python benchmarks/matching.py --rounds 7
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import fx
from tqdm import tqdm

from cachedit_fx import CacheConfig
from cachedit_fx.config import CacheType
from cachedit_fx.frontend.capture import copy_graph
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.analysis.join_lists import join_lists
from cachedit_fx.passes.analysis.locate_blocks import locate_blocks
from cachedit_fx.passes.manager import Rewritten, plan_graph, rewrite
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.transforms.hoist_symbols import HoistSymbols
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.matcher import match_any

DEPTHS = ((3, 5), (19, 38), (67, 133))  # (double, single); FLUX.1 has 19 and 38.
CONFIG = CacheConfig()
PRUNED = CacheConfig(cache_type=CacheType.DBPrune)
WIDTH, HEADS, TEXT, IMAGE = 32, 2, 7, 16


def capture(double: int, single: int) -> tuple[fx.GraphModule, list[Any]]:
    """Returns the graph that Dynamo passes to a backend for a FLUX with this number of blocks."""
    torch._dynamo.reset()
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append((copy_graph(gm, example_inputs), example_inputs))
        return gm.forward

    inputs = dict(
        hidden_states=torch.randn(1, IMAGE, 4),
        encoder_hidden_states=torch.randn(1, TEXT, WIDTH),
        pooled_projections=torch.randn(1, WIDTH),
        timestep=torch.ones(1),
        img_ids=torch.zeros(IMAGE, 3),
        txt_ids=torch.zeros(TEXT, 3),
    )
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    return found[0]


def copied(gm: fx.GraphModule, example_inputs: list[Any]) -> None:
    """Returns the copy of the graph that all other steps work on."""
    copy_graph(gm, example_inputs)


def locate_and_match(gm: fx.GraphModule, _example_inputs: list[Any]) -> None:
    """Runs the first half of `plan_graph`."""
    HoistSymbols()(gm)
    program = Program(gm.graph)
    for blocks in join_lists(program, locate_blocks(program)):
        match_any(blocks)


def plan(gm: fx.GraphModule, _example_inputs: list[Any]) -> None:
    """Runs everything before the rewrite: the first transforms, locating, matching and cutting."""
    assert isinstance(plan_graph(gm, CONFIG), Plan)


def one_region(gm: fx.GraphModule, _example_inputs: list[Any]) -> None:
    """Runs everything before the pieces are compiled: the plan, the conditional and the split into pieces."""
    assert isinstance(rewrite(gm, CONFIG, Declaration(), exact=False), Rewritten)


def every_block(gm: fx.GraphModule, _example_inputs: list[Any]) -> None:
    """Runs the same as `one_region` with a region for every block."""
    assert isinstance(rewrite(gm, PRUNED, Declaration(), exact=False), Rewritten)


STEPS: dict[str, Callable[[fx.GraphModule, list[Any]], None]] = {
    "copy": copied,
    "locate_and_match": locate_and_match,
    "plan": plan,
    "rewrite": one_region,
    "rewrite_pruned": every_block,
}


def measure(graphs: list[tuple[fx.GraphModule, list[Any]]], rounds: int) -> dict[tuple[str, int], list[float]]:
    """Returns the CPU seconds of every step on every graph, one value per round."""
    times: dict[tuple[str, int], list[float]] = {(name, i): [] for name in STEPS for i in range(len(graphs))}
    gc.collect()
    gc.freeze()
    for _ in tqdm(range(rounds), desc="rewrite", unit="round"):
        for (name, i), found in times.items():
            gm, example_inputs = graphs[i]
            graph = copy_graph(gm, example_inputs)
            gc.collect()
            start = time.process_time()
            with torch.no_grad():
                STEPS[name](graph, example_inputs)
            found.append(time.process_time() - start)
    gc.unfreeze()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    graphs = [capture(*depth) for depth in tqdm(DEPTHS, desc="capture", unit="graph")]
    times = measure(graphs, args.rounds)
    rows = [
        {
            "blocks": sum(depth),
            "nodes": len(gm.graph.nodes),
            **{f"{name}_s": round(statistics.median(times[name, i]), 3) for name in STEPS},
        }
        for i, (depth, (gm, _)) in enumerate(zip(DEPTHS, graphs, strict=True))
    ]
    for row in rows:
        per_node = {name: round(1e6 * row[f"{name}_s"] / row["nodes"], 1) for name in STEPS}
        print(row, "microseconds per node:", per_node)
    machine = {
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "cpu": platform.processor(),
        "cores": os.cpu_count(),
    }
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
