"""Renders templates to self-contained HTML pages."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from cachedit_fx.errors import missing
from cachedit_fx.inspect.explanation.units import flops, size

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **context: Any) -> str:
    """Renders a template in `templates/`. Everything in `context` is escaped unless the template marks it as safe.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    styles = "".join(map(asset, ("page.css", "chain.css", "chart.css")))
    return _environment().get_template(template).render(styles=styles, script=asset("page.js"), **context)


def asset(name: str) -> str:
    """Returns the text of a file in `templates/`."""
    return resources.files("cachedit_fx.inspect.pages").joinpath("templates", name).read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """Returns JSON that is safe inside a `<script>` element, because nothing in it can end the element."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise missing("jinja2", "a page") from error
    environment = Environment(
        loader=PackageLoader("cachedit_fx.inspect.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(flops=flops, size=size)
    return environment
