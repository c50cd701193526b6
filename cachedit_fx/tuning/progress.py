"""Shows on a terminal how far `tune` is: the budget, the time that is left, and the best configuration so far."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from cachedit_fx.tuning.targets import Budget

log = logging.getLogger(__name__)

_FORMATS = {
    "runs": "tune |{bar:20}| {n:.0f} of {total:.0f} runs, {elapsed}, at most {remaining} left{postfix}",
    "seconds": "tune |{bar:20}| {n:.0f} of {total:.0f} s, at most {remaining} left{postfix}",
}


class Progress:
    """Shows one line, which is updated after every measurement.

    Attributes:
        budget: The budget of the whole search. The search may end before it is used.
        best: The best configuration so far, in a few words.
    """

    def __init__(self, budget: Budget, bar: Any = None) -> None:
        self.budget = budget
        self.best = ""
        self._bar = bar

    def show(self, what: str) -> None:
        """Shows what is going on, next to the used budget and `best`."""
        log.debug("%s", what)
        if self._bar is None:
            return
        self._bar.n = min(self.budget.consumed, self.budget.value)
        best = f"best: {self.best}; " if self.best else ""
        self._bar.set_postfix_str(f"{best}{what}", refresh=False)
        self._bar.refresh()


@contextlib.contextmanager
def shown_progress(is_wanted: bool, budget: Budget) -> Iterator[Progress]:
    """Yields a `Progress`, which shows nothing if stderr is not a terminal or tqdm is not installed."""
    tqdm = _tqdm() if is_wanted and sys.stderr.isatty() else None
    if tqdm is None:
        yield Progress(budget)
        return
    bar = tqdm(
        total=budget.value,
        bar_format=_FORMATS[budget.kind],
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
        smoothing=0.1,
    )
    try:
        yield Progress(budget, bar)
    finally:
        bar.close()


@contextlib.contextmanager
def without_bars(pipe: Any) -> Iterator[None]:
    """Turns off the progress bar that a pipeline of diffusers shows for every generation."""
    configure, before = getattr(pipe, "set_progress_bar_config", None), vars(pipe).get("_progress_bar_config")
    if not callable(configure):
        yield
        return
    configure(**(before or {}) | {"disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            configure(**before)


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
