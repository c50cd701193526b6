"""What did the cache do: `summary` of a pipeline or a transformer."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from typing import Any

from cachedit_fx.adapter import title_of
from cachedit_fx.registry import modules_of
from cachedit_fx.session import records_of
from cachedit_fx.stats import Summary


def summary(target: Any, details: bool = False, *, every_generation: bool = False, logging: bool = True) -> Summary:
    """Statistics of the last generation, one entry per transformer, region and guidance branch.

    They outlive the generation and its sessions (64 per transformer are kept).

    Args:
        target: A pipeline, a transformer, or a `BlockAdapter`.
        details: Show every step's decision too.
        every_generation: Not the last generation alone, but all that are known, oldest first.
        logging: Print the tables; in a terminal with rich, if that is installed.

    Returns:
        A list of `CacheStats`; as a string, the tables in markdown.

    Raises:
        ConfigError: `target` has no diffusion transformer.
    """
    modules = modules_of(target)
    is_bare = len(modules) == 1 and next(iter(modules.values())) is target
    stats = [
        dataclasses.replace(entry, module="" if is_bare else name)
        for name, module in modules.items()
        for record in records_of(module, every_generation=every_generation)
        for entry in record.stats
    ]
    found = Summary(stats, title=title_of(target), details=details)
    if logging:
        _show(found)
    return found


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
