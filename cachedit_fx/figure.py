"""How a chart becomes a file: a matplotlib figure, opened and saved. pyplot's state stays as it is."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from cachedit_fx.errors import missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", "a plot") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | PathLike[str]) -> None:
    """Writes it; the suffix of the path tells the format (png, svg, pdf)."""
    from matplotlib import rc_context

    is_svg = Path(path).suffix == ".svg"
    # The SVG of one chart is the same file at every run: no random ids, no date. Its text stays text.
    with rc_context({"svg.hashsalt": "cachedit_fx", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if is_svg else None)
