"""Templates into pages that need nothing beside themselves."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from cachedit_fx.errors import ConfigError
from cachedit_fx.explanation.units import flops, size

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
    return resources.files("cachedit_fx.pages").joinpath("templates", name).read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """JSON that may stand inside a `<script>`: nothing in it ends one."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def missing(package: str, what: str) -> ConfigError:
    """What to say where a package of the extra is not installed."""
    return ConfigError(f"cachedit_fx: {what} needs {package}, which is not installed: pip install cachedit_fx[report]")


@functools.cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise missing("jinja2", "a page") from error
    environment = Environment(
        loader=PackageLoader("cachedit_fx.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(flops=flops, size=size)
    return environment
