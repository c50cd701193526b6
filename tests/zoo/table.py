"""Writes docs/models.md, which shows how every transformer of the zoo is cached, and the table of `doctor`.

python -m tests.zoo.table            # or: make models
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import jinja2
import torch
from torch import fx

import cachedit_fx
from cachedit_fx import BlockAdapter
from cachedit_fx.frontend import backend as backends
from cachedit_fx.frontend.capture import copy_graph, forget_examples
from cachedit_fx.passes.manager import Rewritten, rewrite
from cachedit_fx.shell.installed_models import TABLE
from tests.zoo import VARIANTS
from tests.zoo.variant import Variant

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"
COLUMNS = (
    "model",
    "block lists and what they match",
    "region at F1B0",
    "cached streams",
    "structures",
    "graphs",
    "needs",
)
UNCACHED = {
    "MiniMaxMusic3RVQDepthDecoder": "samples audio tokens one after another, and takes no part in denoising",
    "RFD4ProteinaTransformer": "one of its two streams changes only after every second block",
    "TransformerTemporalModel": "is a layer of UNets, with a single block",
}
"""Transformer classes of diffusers that are not cached -> the reason (`tests/test_uncached_models.py`)."""


@dataclass
class Observed:
    """The graphs that the backend received during one call.

    Attributes:
        num_graphs: The number of graphs from Dynamo.
        cells: The cells of the table for each cached graph.
    """

    num_graphs: int = 0
    cells: list[tuple[str, str, str, str]] = field(default_factory=list)

    def row(self, variant: Variant) -> str:
        """The row of the variant in the table."""
        (cells,) = self.cells
        first = f"{variant.name} (`{variant.kind.__name__}`)"
        return f"| {' | '.join([first, *cells, str(self.num_graphs), _needs(variant)])} |"


@contextmanager
def watched() -> Iterator[Observed]:
    """Records the result of the passes for every graph, with blocks shared as for Inductor with any inner backend."""
    observed, call = Observed(), backends.Backend.__call__

    def noted(self: backends.Backend, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        observed.num_graphs += 1
        copied = copy_graph(gm, example_inputs)
        found = rewrite(copied, self.config, self.declared, exact=False)
        observed.cells += [_cells(found)] if isinstance(found, Rewritten) else []
        forget_examples(copied)
        return call(self, gm, example_inputs, **kwargs)

    with mock.patch.object(backends.Backend, "__call__", noted):
        yield observed


def row(name: str) -> str:
    """The row of the variant in the table, from one call with the cache enabled.

    Raises:
        NoMatchError: The model does not match.
    """
    variant = VARIANTS[name]
    torch._dynamo.reset()
    model, (call, *_) = variant.build(), variant.generation()
    functor = variant.functor() if variant.functor is not None else None
    target = model if functor is None else BlockAdapter(transformer=model, patch_functor=functor)
    with torch.no_grad():
        if variant.needs_call:
            model(**call)
        cachedit_fx.enable_cache(target, Fn_compute_blocks=1, on_no_match="raise", inner_backend="eager")
        with watched() as observed:
            model(**call)
    cachedit_fx.disable_cache(target)
    torch._dynamo.reset()
    return observed.row(variant)


def without_counts(row: str) -> list[str]:
    """The cells of a row, except for the numbers of structures and of graphs."""
    cells = row.split(" | ")
    return [cell for name, cell in itertools.zip_longest(COLUMNS, cells) if name not in ("structures", "graphs")]


def _cells(found: Rewritten) -> tuple[str, str, str, str]:
    lists = [
        f"{' and '.join(f'`{path}`' for path in (match.blocks.path, *match.blocks.alternates))} "
        f"({len(match.blocks.blocks)}): {match.label}"
        for match in found.plan.chain
    ]
    cached = [
        f"`{pair.role}`{' (as it is)' if pair.before is None else ''}{' (sizes measured)' if pair.is_measured else ''}"
        for region in found.plan.regions
        for pair in region.live_outs
    ]
    shared = [piece.blocks for piece in found.pieces if piece.blocks]
    num_blocks = len({block for blocks in shared for block in blocks})  # A block in two halves is counted once.
    regions = ", ".join(f"`{region.name}`" for region in found.plan.regions)
    return "<br>".join(lists), regions, ", ".join(cached), f"{len(shared)} for {num_blocks}"


def _needs(variant: Variant) -> str:
    needs = []
    if variant.functor is not None:
        needs.append(f"`{variant.functor.__name__}`")
    if variant.needs_capture:
        needs.append("Dynamo's capture flags, which `enable_cache` sets")
    if variant.timestep_input == "model":
        needs.append("`enable_cache`, because the graph of the loop has no timestep")
    if variant.timestep_input == "none":
        needs.append("`session(key)`, because there is no timestep")
    if variant.needs_call:
        needs.append("one call before `enable_cache`, to be one graph")
    return "; ".join(needs) or "-"


TEMPLATE = """\
# Which transformers match

This page lists the transformers of diffusers 0.42 that are tested, in {{ rows | length }} variants with
tiny random weights, as `enable_cache(model)` finds them. Nothing is declared for any of them, except for the functors
named in the last column. `cachedit-fx doctor` lists the others. `tests/test_zoo*.py` test their outputs: computed steps
bitwise against the model without the cache, reused steps against blocks that are skipped by hand. This page is written
by `make models`, and a test fails if it is out of date.

- **block lists**: the number of blocks, and the pattern that they match (see the
  [built-in patterns](patterns.md#the-six-built-in-patterns)). Lists in one row whose streams continue from one to the
  next form one region, with one decision.
- **region at F1B0**: the blocks that a reused step skips if one block at the front and none at the end always run.
- **structures**: the number of distinct pieces that are compiled for this number of blocks, as for Inductor. If only
  the region reads what the last of the Fn blocks computes of the text, this block counts as two pieces.
- **graphs**: the number of graphs that Dynamo makes of one call. If there is more than one, Dynamo broke the model up,
  and one of the graphs contains the whole loop.

| {{ columns | join(" | ") }} |
|{% for _ in columns %}---|{% endfor %}

{%- for row in rows %}
{{ row }}
{%- endfor %}
"""


def page(rows: Sequence[str]) -> str:
    return jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(columns=COLUMNS, rows=rows)


def classes_and_needs(rows: Sequence[str]) -> dict[str, str]:
    """The class of every row, and what it takes that all of its variants are cached: for `cachedit-fx doctor`."""
    needs: dict[str, list[str]] = {}
    for row in rows:
        first, *_, last = row.removeprefix("| ").removesuffix(" |").split(" | ")
        found = needs.setdefault(first.partition("`")[2].partition("`")[0], [])
        if last != "-" and last not in found:
            found.append(last)
    return {name: "; ".join(needs[name]).replace("`", "") for name in sorted(needs)}


def write(rows: Sequence[str]) -> None:
    """Writes docs/models.md, and the table of the package."""
    PAGE.write_text(page(rows), encoding="utf-8")
    content = {"diffusers": diffusers.__version__, "models": classes_and_needs(rows), "uncached": UNCACHED}
    TABLE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write([row(name) for name in VARIANTS])
