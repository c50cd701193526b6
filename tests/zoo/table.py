"""Writes docs/models.md: what becomes of every transformer of the zoo.

python -m tests.zoo.table            # or: make models
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import jinja2
import torch

import cachedit_fx
from cachedit_fx import BlockAdapter
from cachedit_fx import backend as backends
from cachedit_fx.compiler import InnerCompiler
from tests.zoo import VARIANTS
from tests.zoo.variant import Variant

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"
COLUMNS = (
    "model",
    "block lists and what they match",
    "region at F1B0",
    "streams kept",
    "structures",
    "graphs",
    "needs",
)


@dataclass
class Seen:
    """What the backend did during one call.

    Attributes:
        num_graphs: Graphs that Dynamo handed over.
        rewritten: Those that are cached.
    """

    num_graphs: int = 0
    rewritten: list[backends.Rewritten] = field(default_factory=list)


@contextmanager
def watched() -> Iterator[Seen]:
    """Notes what the backend does; nothing is compiled, though blocks are shared as for Inductor."""
    seen, rewrite, call = Seen(), backends.rewrite, backends.Backend.__call__

    def noted(*args: Any, **kwargs: Any) -> Any:
        found = rewrite(*args, **kwargs)
        seen.rewritten += [found] if isinstance(found, backends.Rewritten) else []
        return found

    def counted(self: backends.Backend, *args: Any, **kwargs: Any) -> Any:
        seen.num_graphs += 1
        return call(self, *args, **kwargs)

    as_it_is = mock.patch.object(InnerCompiler, "__call__", lambda _, gm, inputs: gm.forward)
    with (
        as_it_is,
        mock.patch.object(backends, "rewrite", noted),
        mock.patch.object(backends.Backend, "__call__", counted),
    ):
        yield seen


@functools.cache
def row(name: str) -> str:
    """The variant's line of the table, from one call with the cache enabled.

    Raises:
        NoMatchError: It does not match.
    """
    variant = VARIANTS[name]
    torch._dynamo.reset()
    model, (call, *_) = variant.build(), variant.generation()
    functor = variant.functor() if variant.functor is not None else None
    target = model if functor is None else BlockAdapter(transformer=model, patch_functor=functor)
    with watched() as seen, torch.no_grad():
        if variant.needs_call:
            model(**call)
        cachedit_fx.enable_cache(target, Fn_compute_blocks=1, on_no_match="raise")
        model(**call)
    cachedit_fx.disable_cache(target)
    torch._dynamo.reset()
    (found,) = seen.rewritten
    cells = [f"{name} (`{variant.kind.__name__}`)", *_cells(found), str(seen.num_graphs), _needs(variant)]
    return f"| {' | '.join(cells)} |"


def _cells(found: backends.Rewritten) -> tuple[str, str, str, str]:
    lists = [
        f"{' and '.join(f'`{path}`' for path in (match.blocks.path, *match.blocks.alternates))} "
        f"({len(match.blocks.blocks)}): {match.label}"
        for match in found.plan.chain
    ]
    kept = [
        f"`{pair.role}`{' (as it is)' if pair.before is None else ''}{' (sizes measured)' if pair.is_measured else ''}"
        for region in found.plan.regions
        for pair in region.carried
    ]
    shared = [len(piece.blocks) for piece in found.pieces if piece.blocks]
    regions = ", ".join(f"`{region.name}`" for region in found.plan.regions)
    return "<br>".join(lists), regions, ", ".join(kept), f"{len(shared)} for {sum(shared)}"


def _needs(variant: Variant) -> str:
    needs = []
    if variant.functor is not None:
        needs.append(f"`{variant.functor.__name__}`")
    if variant.needs_capture:
        needs.append("Dynamo's capture flags, set by `enable_cache`")
    if variant.clock == "model":
        needs.append("`enable_cache`: the loop's graph has no timestep")
    if variant.clock == "none":
        needs.append("`session(key)`: there is no timestep")
    if variant.needs_call:
        needs.append("one call before it, to be one graph")
    return "; ".join(needs) or "-"


TEMPLATE = """\
# Which transformers match

Every transformer of diffusers 0.42 that has a loop over blocks, in {{ rows | length }} variants with tiny random
weights, as `enable_cache(model)` finds it: nothing was said of any of them, but for the functors named in the last
column. Their outputs are tested in `tests/test_zoo*.py`: computed steps bitwise against the model without the cache,
reused steps against blocks skipped by hand. This page is written by `make models`, and a test fails if it is stale.

- **Lists**: number of blocks, and the pattern that they match (see the [README](../README.md#which-models-match)).
  Lists in one row whose streams go on from one to the next are decided about as one region.
- **Structures**: distinct pieces that are compiled for so many blocks, as Inductor would compile them.
- **Graphs**: that Dynamo makes of one call. More than one: it broke the model up, and the loop is whole in one of them.

| {{ columns | join(" | ") }} |
|{% for _ in columns %}---|{% endfor %}

{%- for row in rows %}
{{ row }}
{%- endfor %}
"""


def page(rows: Sequence[str]) -> str:
    return jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(columns=COLUMNS, rows=rows)


if __name__ == "__main__":
    PAGE.write_text(page([row(name) for name in VARIANTS]), encoding="utf-8")
