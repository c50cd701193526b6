"""Shows a progress bar for the search, if rich is installed and stderr is a terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

Report = Callable[[str, float], None]  # Takes a line, and the share of the budget that is used.


@contextlib.contextmanager
def shown_progress(is_wanted: bool) -> Iterator[Report]:
    """Yields a function that logs a line and, on a terminal, shows it next to a progress bar."""
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

        def report(line: str, share: float) -> None:
            log.info("%s", line)
            bar.update(task, description=line, completed=min(share, 1.0))

        yield report
