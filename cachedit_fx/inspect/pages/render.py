"""Templates into pages that need nothing beside themselves."""

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
    """The page of a template in `templates/`. Everything in `context` is escaped where it is not marked as safe.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    styles = "".join(map(asset, ("page.css", "chain.css", "chart.css")))
    return _environment().get_template(template).render(styles=styles, script=asset("page.js"), **context)


def asset(name: str) -> str:
    """The text of a file in `templates/`."""
    return resources.files("cachedit_fx.inspect.pages").joinpath("templates", name).read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """JSON that may stand inside a `<script>`: nothing in it ends one."""
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
