"""Writes SVG elements as strings. Text and attributes are escaped; children must be markup from this module."""

from __future__ import annotations

from html import escape
from typing import Literal

Anchor = Literal["start", "middle", "end"]


def tag(name: str, *children: str, **attributes: object) -> str:
    """Returns an element. `class_` becomes `class`, `font_size` becomes `font-size`; None omits an attribute."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    written = "".join(f' {key}="{escape(_number(value), quote=True)}"' for key, value in given.items())
    return f"<{name}{written}>{''.join(children)}</{name}>"


def text(x: float, y: float, content: object, class_: str = "", anchor: Anchor = "start", **attributes: object) -> str:
    """Returns text whose baseline is at `y`."""
    return tag("text", escape(str(content)), x=x, y=y, text_anchor=anchor, class_=class_ or None, **attributes)


def title(content: object) -> str:
    """Returns the tooltip of an element."""
    return tag("title", escape(str(content)))


def fit(content: str, width: float, size: float = 12.5) -> str:
    """Returns `content`, shortened to about `width` pixels in a font of `size` pixels."""
    room = max(1, int(width / (0.6 * size)))
    return content if len(content) <= room else f"{content[: room - 1]}…"


def points(*pairs: tuple[float, float]) -> str:
    """Returns the attribute `points` of a `polyline` or `polygon`."""
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in pairs)


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
