"""Reports registered templates that do not fit the blocks of a graph that is cached with another template."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Match

log = logging.getLogger(__name__)


def report_unfit_templates(chain: Sequence[Match]) -> None:
    """Logs why registered templates do not fit the blocks of a graph that is cached with another template.

    It is a warning, once, if the template is restricted to these blocks, because its author then expects that it fits.
    """
    for match in chain:
        for template, mismatch in match.passed_over.items():
            blocks = match.blocks
            cls = blocks.blocks[0].cls
            named = f"{blocks.path} ({cls.__name__ if cls is not None else 'blocks'})"
            text = "\n".join(
                (
                    f"cachedit_fx: {template} does not fit {named}, so {match.label} is used: {mismatch.cause.value}",
                    *mismatch.lines,
                    f"What to do: {mismatch.cure}, or remove the template: "
                    f"cachedit_fx.patterns.unregister_pattern({template.name!r}).",
                )
            )
            is_meant = bool(template.block_class or template.module_path) and mismatch.cause is not Cause.RESTRICTED
            if is_meant and text not in _reported:
                _reported.add(text)
                log.warning("%s", text)
            else:
                log.info("%s", text)


_reported: set[str] = set()
