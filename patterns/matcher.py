"""Fits templates to block lists."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
from collections.abc import Iterable

from torch import fx

from cachedit_fx.patterns.blocks import HIDDEN, BlockList
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Match, Mismatch, MismatchError
from cachedit_fx.patterns.nodes import SourceLine, describe, source_line
from cachedit_fx.patterns.pattern_registry import templates
from cachedit_fx.patterns.returns import return_line, return_names, return_order
from cachedit_fx.patterns.template import BlockTemplate

log = logging.getLogger(__name__)

# Built-in templates that differ only in the order of what they return -> both numbers, and what they have in common.
_UNORDERED = {
    0: "pattern 0 or 1 (dual-stream",
    1: "pattern 0 or 1 (dual-stream",
    4: "pattern 4 or 5 (hidden-only, emits encoder",
    5: "pattern 4 or 5 (hidden-only, emits encoder",
}


def match_list(blocks: BlockList, template: BlockTemplate) -> Match:
    """Fits one template to one block list.

    Raises:
        MismatchError: It does not fit.
    """
    blocks = _named(blocks, template)
    _check_restriction(blocks, template)
    _check_streams(blocks, template)
    _check_names(blocks, template)
    _check_context(blocks, template)
    _check_emitted(blocks, template)
    order = _order(blocks, template)
    if order and order != template.returns:
        raise _order_mismatch_error(blocks, template)
    return Match(template, blocks, _label(template, order))


def match_any(blocks: BlockList, among: Iterable[BlockTemplate] | None = None) -> Match:
    """The first template that fits.

    Args:
        among: The templates to try, in order; None for all registered ones.

    Raises:
        MismatchError: None fits. It carries one mismatch per template, the nearest one first.
    """
    mismatches: list[Mismatch] = []
    for template in templates() if among is None else among:
        try:
            match = match_list(blocks, template)
        except MismatchError as error:
            log.debug("%s: %s", blocks.path, error)
            mismatches += error.mismatches
        else:
            log.debug("%s matches %s (%d blocks)", match.label, blocks.path, len(blocks.blocks))
            return dataclasses.replace(match, mismatches=tuple(mismatches))
    raise MismatchError(*sorted(mismatches, key=lambda mismatch: -mismatch.progress))


def _named(blocks: BlockList, template: BlockTemplate) -> BlockList:
    """`blocks` with the roles that the template assigns to the names of the streams; unchanged if a name is missing."""
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


def _check_restriction(blocks: BlockList, template: BlockTemplate) -> None:
    cls = blocks.blocks[0].cls
    want = template.block_class
    if want is not None:
        fits = cls is want if isinstance(want, type) else cls is not None and cls.__name__ == want
        if not fits:
            name = want.__name__ if isinstance(want, type) else want
            found = f"blocks of class {cls.__name__}" if cls else "blocks of an unknown class"
            raise _mismatch_error(blocks, template, Cause.RESTRICTED, f"blocks of class {name}", found)
    if template.module_path is not None and not fnmatch.fnmatchcase(blocks.path, template.module_path):
        expected, found = f"a list at {template.module_path!r}", f"a list at {blocks.path!r}"
        raise _mismatch_error(blocks, template, Cause.RESTRICTED, expected, found)


def _check_streams(blocks: BlockList, template: BlockTemplate) -> None:
    want, total = template.streams_out, len(blocks.blocks)
    is_lost_before = any(len(streams) < len(blocks.boundaries[0]) for streams in blocks.boundaries)
    if blocks.lost_at == total and not is_lost_before:  # Only the boundary after the last block has no stream.
        last = blocks.change.after if blocks.change is not None else next(iter(blocks.boundaries[-1].values()))
        raise _mismatch_error(
            blocks,
            template,
            Cause.STREAM_COUNT,
            f"{want[0]} as an output of block {total - 1}, the last block of {blocks.path}",
            blocks.loss,
            node=last,
            stream=want[0],
            lost_at=total,
            progress=total - 1,
        )
    for i in range(1, total):
        streams = blocks.boundaries[i] if i < len(blocks.boundaries) else {}
        if len(streams) != len(want):
            raise _count_mismatch_error(blocks, template, i)


def _count_mismatch_error(blocks: BlockList, template: BlockTemplate, i: int) -> MismatchError:
    """The error for boundary `i`, which does not have the number of streams that the template declares."""
    want = template.streams_out
    streams = blocks.boundaries[i] if i < len(blocks.boundaries) else {}
    before = blocks.boundaries[i - 1]
    lost = next((role for role in before if role not in streams), None)
    change = blocks.change if blocks.change is not None and blocks.change.boundary == i else None
    if streams:
        found = f"{_count(len(streams))} ({', '.join(map(describe, streams.values()))})"
        if change is not None:  # For example where tokens are dropped between two blocks.
            found += f"; {change}"
        elif lost is not None:
            found += f"; no output of block {i - 1} has the shape of {describe(before[lost])}"
    else:
        found = blocks.loss
    return _mismatch_error(
        blocks,
        template,
        Cause.STREAM_COUNT,
        f"{_count(len(want))} ({', '.join(want)}) from block {i - 1} to block {i} of {blocks.path}",
        found,
        node=change.after if change is not None else next(iter((streams or before).values()), None),
        stream=lost,
        lost_at=i if lost is not None else None,
        progress=i - 1,
    )


def _count(number: int) -> str:
    return f"{number} stream{'s' * (number != 1)}"


def _check_names(blocks: BlockList, template: BlockTemplate) -> None:
    names, last = ", ".join(sorted(blocks.labels.values())), len(blocks.blocks) - 1
    for role, name in template.streams.items():
        if role in template.streams_out and name not in blocks.labels.values():
            expected = f"a stream with the name {name!r}, which the template declares as {role}"
            found = f"streams with the names {names}"
            raise _mismatch_error(blocks, template, Cause.STREAM_NAME, expected, found, stream=role, progress=last)
    if HIDDEN not in blocks.labels:
        expected = f"one stream that can be identified as {HIDDEN}"
        found = f"the streams {names}; neither a name nor a use after the list identifies one of them"
        raise _mismatch_error(blocks, template, Cause.STREAM_NAME, expected, found, stream=HIDDEN, progress=last)


def _check_context(blocks: BlockList, template: BlockTemplate) -> None:
    if len(template.streams_out) > 1:
        return  # The text is a stream of its own then. What else the blocks read makes no difference.
    if template.contexts and not blocks.contexts:
        expected = f"a context ({template.contexts[0]}) that every block reads"
        raise _mismatch_error(blocks, template, Cause.NO_CONTEXT, expected, "blocks that read no context")
    if not template.contexts and blocks.contexts:
        node = blocks.contexts[0]
        expected, found = f"blocks that read only {HIDDEN}", f"every block also reads {describe(node)}"
        raise _mismatch_error(blocks, template, Cause.EXTRA_CONTEXT, expected, found, node=node)


def _check_emitted(blocks: BlockList, template: BlockTemplate) -> None:
    last = len(blocks.blocks) - 1
    if template.emitted and not blocks.emitted:
        role = template.emitted[0]
        expected = f"{role} as an output of every block that is used after the list"
        found = "only the streams are used after the list"
        raise _mismatch_error(blocks, template, Cause.NO_EMITTED, expected, found, stream=role, progress=last)
    if not template.emitted and blocks.emitted and len(template.streams_out) == 1:
        node = blocks.emitted[0]
        expected, found = f"blocks that return only {HIDDEN}", f"the last block also returns {describe(node)}"
        raise _mismatch_error(blocks, template, Cause.EXTRA_EMITTED, expected, found, node=node, progress=last)


def _order_mismatch_error(blocks: BlockList, template: BlockTemplate) -> MismatchError:
    cls = blocks.blocks[0].cls
    names = ", ".join(str(name or "...") for name in return_names(cls))
    return _mismatch_error(
        blocks,
        template,
        Cause.RETURN_ORDER,
        f"a block that returns ({', '.join(template.returns)})",
        f"`return {names}` in {cls.__name__ if cls else 'the block'}.forward",
        where=return_line(cls),
        progress=len(blocks.blocks),
    )


def _order(blocks: BlockList, template: BlockTemplate) -> tuple[str, ...]:
    """Roles in the order of the return statement; empty if the source does not show it or there is only one role."""
    if len(template.returns) < 2:
        return ()
    labels = {role: blocks.labels.get(role, role) for role in template.returns} | dict(template.streams)
    if template.emitted and blocks.emitted:
        # An emitted value has no name at a boundary. The one unknown name in the return statement must be its name.
        labels = {role: label for role, label in labels.items() if role not in template.emitted}
        names = return_names(blocks.blocks[0].cls)
        roles = [next((role for role, label in labels.items() if label == name), None) for name in names]
        if len(names) == len(template.returns) and roles.count(None) == len(template.emitted) == 1:
            return tuple(role or template.emitted[0] for role in roles)
        return ()
    return return_order(blocks.blocks[0].cls, {role: labels[role] for role in template.returns})


def _label(template: BlockTemplate, order: tuple[str, ...]) -> str:
    if template.number in _UNORDERED and not order:
        return f"{_UNORDERED[template.number]}; the return order is not known)"
    return str(template)


def _mismatch_error(
    blocks: BlockList,
    template: BlockTemplate,
    cause: Cause,
    expected: str,
    found: str,
    *,
    node: fx.Node | None = None,
    where: SourceLine | None = None,
    stream: str | None = None,
    lost_at: int | None = None,
    progress: int = 0,
) -> MismatchError:
    return MismatchError(
        Mismatch(
            template,
            cause,
            expected,
            found,
            node=node.name if node is not None else None,
            where=where or source_line(node),
            stream=stream,
            lost_at=lost_at,
            progress=progress,
            total=len(blocks.blocks),
            path=blocks.path,
        )
    )
