"""Reports what the cache of a pipeline or a transformer did: `summary` and `report`."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cachedit_fx.frontend.uncached import reasons_of_bare
from cachedit_fx.inspect.why_idle import why_none_reused
from cachedit_fx.integrations.adapter_registry import modules_of
from cachedit_fx.integrations.block_adapter import title_of
from cachedit_fx.runtime import stats as stats_module
from cachedit_fx.runtime.instances import KEY, calls_of, installed_in, notes_of, records_of
from cachedit_fx.runtime.stats import CacheStats, Summary

_DISPLACED = (
    "{}: its calls run without the cache, because the forward that enable_cache compiled was replaced (as "
    "module.compile() does) or was not copied (by copy.copy). Call enable_cache again"
)


def summary(target: Any, details: bool = False, *, every_generation: bool = False, logging: bool = True) -> Summary:
    """Returns the statistics of the last generation, one entry per transformer, region and guidance branch.

    They remain available after the generation and its sessions have ended (64 sessions per transformer). The lines
    below the first table state how all calls since `enable_cache` were served: computed, reused, or without the cache,
    with the reason. If the generation reused nothing, a line states why.

    Args:
        target: A pipeline, a transformer, or a `BlockAdapter`.
        details: Whether to show the decision at every step as well.
        every_generation: Whether to include all recorded generations, oldest first, instead of the last one only.
        logging: Whether to print the tables; in a terminal, with rich if it is installed.

    Returns:
        A list of `CacheStats` with the attributes `calls` (a `CallCounts` per transformer) and `notes`. Its `str`
        consists of the tables in Markdown and the lines below the first one.

    Raises:
        ConfigError: `target` has no diffusion transformer.
    """
    found = _stats_of(target, details=details, every_generation=every_generation)
    if logging:
        _show(found)
    return found


class RunReport:
    """A report of a run. Its `str` consists of the tables of its summary.

    Attributes:
        title: The name of the class of the pipeline or transformer.
        stats: The statistics, one entry per transformer, region and guidance branch.
    """

    def __init__(self, title: str, stats: Summary) -> None:
        self.title = title
        self.stats = stats

    def to_dict(self) -> dict[str, Any]:
        """Returns all data in a form that JSON can store."""
        calls = {name: counts.to_dict() for name, counts in self.stats.calls.items()}
        stats = [entry.to_dict() for entry in self.stats]
        return {"title": self.title, "stats": stats, "calls": calls, "notes": self.stats.notes}

    def to_html(self, path: str | Path) -> Path:
        """Writes the report as one HTML file that loads nothing from the network, and returns its path.

        Raises:
            ConfigError: jinja2 is not installed.
        """
        from cachedit_fx.inspect.pages import run_page

        target = Path(path)
        target.write_text(run_page(self.title, self.stats), encoding="utf-8")
        return target

    def plot(self, path: str | Path | None = None) -> Any:
        """Returns the steps as a matplotlib figure, and writes it to `path` (png, svg or pdf) if a path is given.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        from cachedit_fx.inspect.pages import plot_run

        return plot_run(self.stats, path)

    def _repr_html_(self) -> str:
        return _fragment(self.stats)

    def __str__(self) -> str:
        return str(self.stats)

    __repr__ = __str__


def report(target: Any, path: str | Path | None = None, *, every_generation: bool = False) -> RunReport:
    """Reports the last generation: the decision at every step with its reason, its diff, its time, and the memory.

    After a run in shadow mode, the report also contains the error of reusing each step, from which a threshold can be
    chosen.

    Args:
        target: A pipeline, a transformer, or a `BlockAdapter`.
        path: The HTML file to write, if any.
        every_generation: Whether to include all recorded generations, oldest first, instead of the last one only.

    Raises:
        ConfigError: `target` has no diffusion transformer, or a path is given and jinja2 is not installed.
    """
    stats = _stats_of(target, details=True, every_generation=every_generation)
    found = RunReport(stats.title, stats)
    if path is not None:
        found.to_html(path)
    return found


def _stats_of(target: Any, *, details: bool, every_generation: bool) -> Summary:
    modules = modules_of(target)
    is_bare = len(modules) == 1 and next(iter(modules.values())) is target
    named = {"" if is_bare else name: module for name, module in modules.items()}
    stats = [e for name, module in named.items() for e in _entries(name, module, every_generation=every_generation)]
    calls = {
        ".".join(filter(None, (name, path))): counts
        for name, module in named.items()
        for path, counts in calls_of(module).items()
    }
    notes = [note for name, module in named.items() if (note := _why_none_reused(name, module, stats))]
    notes += [_DISPLACED.format(name) for name, m in modules.items() if KEY in vars(m) and installed_in(m) is None]
    notes += [f"{name}: {note}" if name else note for name, module in named.items() for note in notes_of(module)]
    if not calls and not stats:
        notes += [f"{name} runs without the cache: {why}" for name, m in modules.items() for why in reasons_of_bare(m)]
    return Summary(stats, title=title_of(target), details=details, calls=calls, notes=notes)


def _entries(name: str, module: nn.Module, *, every_generation: bool) -> list[CacheStats]:
    records = records_of(module, every_generation=every_generation)
    return [dataclasses.replace(entry, module=name) for record in records for entry in record.stats]


def _why_none_reused(name: str, module: nn.Module, stats: Sequence[CacheStats]) -> str:
    of_module = [entry for entry in stats if entry.module == name]
    if all(entry.num_steps == 1 for entry in of_module):  # For the user, generations of one step each are one.
        of_module = _entries(name, module, every_generation=True)
    return why_none_reused(name, of_module)


def _fragment(found: Summary) -> str:
    from cachedit_fx.inspect.pages import run_fragment

    return run_fragment(found)


stats_module.html_renderer = _fragment


def _show(found: Summary) -> None:
    if not found or not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print(found)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for i, rows in enumerate(found.tables):
        title = f"Cache Steps and Residual Diffs Statistics: {found.title}" if i == 0 else "Decisions"
        table = Table(*rows[0], title=title)
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
        for line in found.lines if i == 0 else ():
            console.print(line, markup=False)
