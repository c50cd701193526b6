"""A bar for the search, where rich is installed and someone looks on."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

Told = Callable[[str, float], None]  # A line, and the share of the budget that is used.


@contextlib.contextmanager
def shown_progress(is_wanted: bool) -> Iterator[Told]:
    """Yields what takes lines; they go to the log, and beside a bar on a terminal."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        is_wanted = False
    if not is_wanted or not sys.stderr.isatty():
        yield lambda line, share: log.info("%s", line)
        return
    columns = (TextColumn("tune"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def told(line: str, share: float) -> None:
            log.info("%s", line)
            bar.update(task, description=line, completed=min(share, 1.0))

        yield told
