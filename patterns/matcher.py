"""Fits templates to block lists. Reads only; a mismatch is a value, never None or an exception."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
from collections.abc import Iterable

from torch import fx

from cachedit_fx.patterns.blocks import HIDDEN, BlockList
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Match, Mismatch
from cachedit_fx.patterns.nodes import describe, source_line
from cachedit_fx.patterns.pattern_registry import templates
from cachedit_fx.patterns.returns import return_line, return_names, return_order
from cachedit_fx.patterns.template import BlockTemplate

log = logging.getLogger(__name__)


def match_list(blocks: BlockList, template: BlockTemplate) -> Match | Mismatch:
    """Fits one template to one block list."""
    blocks = _named(blocks, template)
    for check in (_check_restriction, _check_streams, _check_names, _check_context, _check_emitted):
        mismatch = check(blocks, template)
        if mismatch is not None:
            return mismatch
    order = _order(blocks, template)
    if order and order != template.returns:
        return _order_mismatch(blocks, template)
    return Match(template, blocks, _label(template, order))


def match_any(blocks: BlockList, among: Iterable[BlockTemplate] | None = None) -> Match | tuple[Mismatch, ...]:
    """The first template that fits, else every template's verdict, nearest miss first."""
    mismatches: list[Mismatch] = []
    for template in templates() if among is None else among:
        found = match_list(blocks, template)
        if isinstance(found, Match):
            log.debug("%s matched %s (%d blocks)", found.label, blocks.path, len(blocks.blocks))
            return found
        log.debug("%s: %s", blocks.path, found)
        mismatches.append(found)
    return tuple(sorted(mismatches, key=lambda mismatch: -mismatch.progress))


def _named(blocks: BlockList, template: BlockTemplate) -> BlockList:
    """`blocks` with its streams under the roles that the template gives their names; as it is if a name is missing."""
    if not template.streams or not set(template.streams.values()) <= set(blocks.labels.values()):
        return blocks
    by_name = {name: role for role, name in template.streams.items()}
    roles = {old: by_name.get(name, old) for old, name in blocks.labels.items()}
    if len(set(roles.values())) != len(roles):
        return blocks
    return dataclasses.replace(
        blocks,
        boundaries=tuple({roles[old]: node for old, node in boundary.items()} for boundary in blocks.boundaries),
        labels={roles[old]: name for old, name in blocks.labels.items()},
    )


def _check_restriction(blocks: BlockList, template: BlockTemplate) -> Mismatch | None:
    cls = blocks.blocks[0].cls
    want = template.block_class
    if want is not None:
        fits = cls is want if isinstance(want, type) else cls is not None and cls.__name__ == want
        if not fits:
            name = want.__name__ if isinstance(want, type) else want
            found = cls.__name__ if cls else "a class that is not known"
            return _mismatch(blocks, template, Cause.RESTRICTED, f"expected blocks of class {name}, found {found}")
    if template.module_path is not None and not fnmatch.fnmatchcase(blocks.path, template.module_path):
        detail = f"expected a list at {template.module_path!r}, found {blocks.path!r}"
        return _mismatch(blocks, template, Cause.RESTRICTED, detail)
    return None


def _check_streams(blocks: BlockList, template: BlockTemplate) -> Mismatch | None:
    want, total = len(template.streams_out), len(blocks.blocks)
    is_lost_before = any(len(found) < len(blocks.boundaries[0]) for found in blocks.boundaries)
    if len(blocks.boundaries) == total and not is_lost_before:  # All are there but the one after the last block.
        last = next(iter(blocks.boundaries[-1].values()))
        detail = (
            f"expected {template.streams_out[0]} out of block {total - 1}, the last of {blocks.path}, found that "
            f"{blocks.broken}"
        )
        return _mismatch(blocks, template, Cause.STREAM_COUNT, detail, node=last, progress=total - 1)
    for i in range(1, total):
        found = blocks.boundaries[i] if i < len(blocks.boundaries) else {}
        if len(found) == want:
            continue
        what = ", ".join(describe(node) for node in found.values()) or (blocks.broken or "none")
        known = blocks.boundaries[min(i, len(blocks.boundaries) - 1)] if blocks.boundaries else {}
        node = next(iter((found or known).values()), None)
        lost = [before for name, before in blocks.boundaries[i - 1].items() if found and name not in found]
        if lost:  # As where tokens are dropped between two blocks.
            what += f"; nothing continues {describe(lost[0])} in its shape"
        detail = (
            f"expected {want} stream{'s' * (want != 1)} ({', '.join(template.streams_out)}) from block {i - 1} into "
            f"block {i} of {blocks.path}, found {len(found)} ({what})"
        )
        return _mismatch(blocks, template, Cause.STREAM_COUNT, detail, node=node, progress=i - 1)
    return None


def _check_names(blocks: BlockList, template: BlockTemplate) -> Mismatch | None:
    for role, name in template.streams.items():
        if role in template.streams_out and name not in blocks.labels.values():
            found = ", ".join(sorted(blocks.labels.values()))
            detail = f"expected the stream {role} under the name {name!r}, found {found}"
            return _mismatch(blocks, template, Cause.STREAM_NAME, detail, progress=len(blocks.blocks) - 1)
    if HIDDEN not in blocks.labels:
        detail = (
            f"expected one stream that is hidden_states, found {', '.join(sorted(blocks.labels.values()))} and no "
            "name or use after the list that tells which; name them with BlockTemplate(streams=...)"
        )
        return _mismatch(blocks, template, Cause.STREAM_NAME, detail, progress=len(blocks.blocks) - 1)
    return None


def _check_context(blocks: BlockList, template: BlockTemplate) -> Mismatch | None:
    if len(template.streams_out) > 1:
        return None  # With two streams the text is a stream; what else the blocks read makes no difference.
    if template.contexts and not blocks.contexts:
        detail = f"expected a context ({template.contexts[0]}) that every block reads, found none"
        return _mismatch(blocks, template, Cause.NO_CONTEXT, detail)
    if not template.contexts and blocks.contexts:
        node = blocks.contexts[0]
        detail = f"expected blocks that read {HIDDEN} alone, found that each also reads {describe(node)}"
        return _mismatch(blocks, template, Cause.EXTRA_CONTEXT, detail, node=node)
    return None


def _check_emitted(blocks: BlockList, template: BlockTemplate) -> Mismatch | None:
    if template.emitted and not blocks.emitted:
        detail = (
            f"expected every block to emit {template.emitted[0]}, found nothing used after the list but its streams"
        )
        return _mismatch(blocks, template, Cause.NO_EMITTED, detail, progress=len(blocks.blocks) - 1)
    if not template.emitted and blocks.emitted and len(template.streams_out) == 1:
        node = blocks.emitted[0]
        detail = f"expected blocks that return {HIDDEN} alone, found that the last one also emits {describe(node)}"
        return _mismatch(blocks, template, Cause.EXTRA_EMITTED, detail, node=node, progress=len(blocks.blocks) - 1)
    return None


def _order_mismatch(blocks: BlockList, template: BlockTemplate) -> Mismatch:
    names = return_names(blocks.blocks[0].cls)
    cls = blocks.blocks[0].cls
    detail = (
        f"expected a block that returns ({', '.join(template.returns)}), found "
        f"`return {', '.join(str(name or '...') for name in names)}` in {cls.__name__ if cls else 'the block'}.forward"
    )
    mismatch = _mismatch(blocks, template, Cause.RETURN_ORDER, detail, progress=len(blocks.blocks))
    return dataclasses.replace(mismatch, where=return_line(cls))


def _order(blocks: BlockList, template: BlockTemplate) -> tuple[str, ...]:
    """Roles in return order, as the block's source tells; empty where it does not, or there is but one."""
    if len(template.returns) < 2:
        return ()
    labels = {role: blocks.labels.get(role, role) for role in template.returns} | dict(template.streams)
    if template.emitted and blocks.emitted:
        # What is emitted has no boundary to be named at, so any one other name in the return statement is it.
        labels = {role: label for role, label in labels.items() if role not in template.emitted}
        names = return_names(blocks.blocks[0].cls)
        roles = [next((role for role, label in labels.items() if label == name), None) for name in names]
        if len(names) == len(template.returns) and roles.count(None) == len(template.emitted) == 1:
            return tuple(role or template.emitted[0] for role in roles)
        return ()
    return return_order(blocks.blocks[0].cls, {role: labels[role] for role in template.returns})


def _label(template: BlockTemplate, order: tuple[str, ...]) -> str:
    if template.number in (0, 1, 4, 5) and not order:
        first = 0 if template.number < 2 else 4
        return f"pattern {first} or {first + 1} ({template.name.split(',')[0]}; the return order is not known)"
    return str(template)


def _mismatch(
    blocks: BlockList,
    template: BlockTemplate,
    cause: Cause,
    detail: str,
    *,
    node: fx.Node | None = None,
    progress: int = 0,
) -> Mismatch:
    name = node.name if node is not None else None
    return Mismatch(template, cause, detail, name, source_line(node), progress, len(blocks.blocks))
