"""Shows on a terminal how far the compilation of a model is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

_CLEAR = "\r\x1b[K"  # To the beginning of the line, and erase it.


@contextlib.contextmanager
def compile_progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of finished pieces, and shows it if stderr is a terminal.

    It is one line, which is erased at the end of the block.

    Args:
        name: What is compiled, for example the class of the model.
        total: The number of pieces.
    """
    if not sys.stderr.isatty():
        yield lambda number: None
        return
    try:
        yield lambda number: _show(f"compiling {name}: {number} of {total} pieces")
    finally:
        _show("")


def _show(line: str) -> None:
    print(f"{_CLEAR}{line}", end="", file=sys.stderr, flush=True)
