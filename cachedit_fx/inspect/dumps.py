"""Writes a folder for each graph to `debug_dir`, with the graph before and after every pass, and a reproducer.

000_FluxTransformer2DModel/
    00_captured.py                       the graph as Dynamo captured it
    01_inline-checkpoints.before.py      and so on: a pair of files for each pass that rewrites the graph
    06_locate-blocks.json                one file for each pass that only reads the graph
    09_split-pieces.after.py             the graph that is compiled
    report.json                          the results as data (`GraphReport`)
    graph.json, reproduce.py             runs the passes again, without the model: `python reproduce.py`
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import fx

from cachedit_fx._version import __version__
from cachedit_fx.config.cache_config import CacheConfig
from cachedit_fx.errors import ConfigError
from cachedit_fx.inspect.explanation.build import build_report
from cachedit_fx.inspect.explanation.trace import Trace
from cachedit_fx.inspect.graph_json import to_json
from cachedit_fx.passes import observer
from cachedit_fx.passes.analysis.dataflow import Program
from cachedit_fx.passes.plan import Plan
from cachedit_fx.passes.transforms.apply_functor import ApplyFunctor
from cachedit_fx.patterns.blocks import BlockList
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.mismatch import Match, Mismatch

log = logging.getLogger(__name__)

_SCRIPT = '''"""Repeats what cachedit_fx did with graph {number} of {cls}, without the model and its weights.

    python reproduce.py            runs the passes on graph.json and prints their results
    python reproduce.py --run      also runs three steps with random weights (computed, reused, computed), and compares
                                   the computed ones with the captured graph

Requires cachedit_fx {version}, torch and the packages of the model. The sizes are those of the captured call.
"""

from pathlib import Path

from cachedit_fx.inspect.reproduce import main

if __name__ == "__main__":
    main(Path(__file__).parent)
'''


class Dump(Trace):
    """Writes the results of every pass over a graph into a folder, immediately after the pass.

    If a later pass fails, the files of the previous passes remain.

    Args:
        cls: The name of the class of the module that the graph belongs to.
        config: The configuration. Its `debug_dir` is created if it does not exist.
        declared: What the user declared about the model.

    Attributes:
        path: The folder of this graph.

    Raises:
        ConfigError: The folder cannot be created or written to.
    """

    def __init__(self, cls: str, config: CacheConfig, declared: Declaration) -> None:
        super().__init__()
        folder = config.debug_dir or "."
        self._config, self._declared, self._cls = config, declared, cls
        self._numbers = itertools.count()
        self._last: tuple[str, str] = ("", "")
        try:
            self.path = _new_folder(Path(folder), cls)
        except OSError as error:
            raise ConfigError(
                f"cachedit_fx: debug_dir must be a folder that can be written to, or a path where one can be created, "
                f"got {str(folder)!r}: {error.strerror}"
            ) from error

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        super().graph(name, gm)
        self._pass(name, _readable(gm))
        if name == ApplyFunctor.name:
            self._write_reproducer(gm)

    def lists(self, program: Program, found: Sequence[BlockList], chain: Sequence[BlockList]) -> None:
        super().lists(program, found, chain)
        shown = [{**_list_of(blocks), "in_chain": blocks in chain} for blocks in found]
        self._write(f"{next(self._numbers):02d}_locate-blocks.json", shown)

    def matched(self, match: Match) -> None:
        super().matched(match)
        self._write_match(match.blocks, [match.label])

    def mismatched(self, blocks: BlockList, mismatches: Sequence[Mismatch]) -> None:
        super().mismatched(blocks, mismatches)
        self._write_match(blocks, list(map(str, mismatches)))

    def _write_match(self, blocks: BlockList, results: list[str]) -> None:
        self._write(f"{next(self._numbers):02d}_match-{blocks.path}.json", results)

    def planned(self, plan: Plan) -> None:
        super().planned(plan)
        regions = [
            {
                "name": region.name,
                "nodes": [node.name for node in region.nodes],
                "hoisted": [node.name for node in region.hoisted],
                "cached": {p.after.name: p.before.name if p.before is not None else None for p in region.live_outs},
                "probe": [str(region.probed_at), str(region.probed_since)],
            }
            for region in plan.regions
        ]
        self._write(f"{next(self._numbers):02d}_cut-regions.json", regions)

    def refused(self, mismatches: tuple[Mismatch, ...]) -> None:
        super().refused(mismatches)
        self._write(f"{next(self._numbers):02d}_mismatches.json", list(map(str, mismatches)))

    def finish(self, gm: fx.GraphModule) -> None:
        """Writes the report."""
        report = build_report(gm, self, self._config, self._declared, cls=self._cls, number=self.number)
        self._write("report.json", dataclasses.asdict(report))
        log.info("wrote the passes over a graph of %s to %s", self._cls, self.path)

    @property
    def number(self) -> int:
        return int(self.path.name.partition("_")[0])

    def fail(self) -> None:
        """Writes the exception that is currently being handled."""
        self._write("error.txt", traceback.format_exc())

    def _pass(self, name: str, code: str) -> None:
        number = next(self._numbers)
        if number == 0:
            self._write(f"{number:02d}_{name}.py", code)
        else:
            self._write(f"{number:02d}_{name}.before.py", self._last[1])
            self._write(f"{number:02d}_{name}.after.py", code)
        self._last = (name, code)

    def _write_reproducer(self, gm: fx.GraphModule) -> None:
        try:
            graph = to_json(gm)
        except TypeError as error:
            self._write("reproduce.txt", f"This graph cannot be saved as JSON: {error}")
            return
        settings = {"config": [[name, value] for name, value in self._config.plain_changes if name != "debug_dir"]}
        self._write("graph.json", {"cls": self._cls, **settings, **graph})
        script = _SCRIPT.format(number=self.number, cls=self._cls, version=__version__)
        self._write("reproduce.py", script)

    def _write(self, name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content, indent=1, default=str)
        (self.path / re.sub(r"[^\w.\-]", "-", name)).write_text(text + "\n", encoding="utf-8")


def _new_folder(folder: Path, cls: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(sum(1 for _ in folder.glob("[0-9][0-9][0-9]_*"))):
        path = folder / f"{number:03d}_{re.sub(r'[^A-Za-z0-9]', '-', cls) or 'graph'}"
        try:
            path.mkdir()
            return path
        except FileExistsError:  # Another process writes to the same folder.
            continue
    raise AssertionError


def _readable(gm: fx.GraphModule) -> str:
    return str(gm.print_readable(print_output=False, include_stride=True)).rstrip()


def _list_of(blocks: BlockList) -> dict[str, Any]:
    return {
        "path": blocks.path,
        "blocks": [block.path for block in blocks.blocks],
        "streams": [{role: node.name for role, node in boundary.items()} for boundary in blocks.boundaries],
        "contexts": [node.name for node in blocks.contexts],
        "emitted": [node.name for node in blocks.emitted],
        "lost_at": blocks.lost_at,
        "flops": blocks.flops,
    }


observer.new_dump = Dump
