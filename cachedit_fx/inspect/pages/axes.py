"""The axes of a chart: scales and ticks, in pixels of an SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from cachedit_fx.inspect.pages.svg import tag, text

LEGEND_ROW = 20.0  # Height of a row of a legend.


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear scale that maps the values `low` to `high` to the pixels `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (value - self.low) / ((self.high - self.low) or 1.0)


@dataclass(frozen=True, slots=True)
class Frame:
    """The axes of a chart. `x` and `y` map values to pixels."""

    width: float
    height: float
    x: Scale
    y: Scale

    def rows(self, name: str) -> Iterator[str]:
        """Yields horizontal grid lines with their values, and the name of the vertical axis above them."""
        yield text(4, 12, name, "axis-name")
        for value in ticks(self.y.high):
            y = self.y(value)
            yield tag("line", x1=self.x.start, y1=y, x2=self.x.stop, y2=y, class_="grid")
            yield text(self.x.start - 7, y + 4, f"{value:.3g}", "tick", "end")

    def columns(self, name: str, values: list[float]) -> Iterator[str]:
        """Yields the values and the name of the horizontal axis below the chart."""
        for value in values:
            yield text(self.x(value), self.y.start + 16, f"{value:.3g}", "tick", "middle")
        yield text(self.x.stop, self.y.start + 32, name, "axis-name", "end")

    def svg(self, parts: Iterator[str], label: str) -> str:
        """Returns the chart as an SVG element."""
        box = f"0 0 {self.width:.0f} {self.height:.0f}"
        return tag("svg", *parts, class_="ch", viewBox=box, role="img", aria_label=label)


def frame(
    columns: tuple[float, float], high: float, *, width: float = 430, height: float = 216, legend_rows: int = 0
) -> Frame:
    """Returns axes with room for labels, and for rows of a legend above the chart. The vertical axis starts at 0."""
    x = Scale(*columns, 58, width - 10)
    above = LEGEND_ROW * legend_rows
    return Frame(width, height + above, x, Scale(0, ticks(high)[-1], height + above - 42, 24 + above))


def ticks(high: float) -> list[float]:
    """Returns four to six round numbers from 0 to a number that is at least `high`."""
    if not math.isfinite(high) or high <= 0:
        return [0.0, 1.0]
    unit = 10.0 ** math.floor(math.log10(high / 5))
    every = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= high / 5.001)
    return [every * i for i in range(math.ceil(high / every - 1e-9) + 1)]


def step_ticks(num_steps: int) -> list[float]:
    """Returns at most twelve numbers of steps."""
    every = max(1, math.ceil(num_steps / 12))
    return [float(step) for step in range(0, num_steps, every)]
