"""Locates the blocks of a graph and the streams between them.

    conv_in -> [blocks.0] -> [blocks.1] -> ... -> norm_out     ->     BlockList("blocks", ...)

The metadata `nn_module_stack` shows which module call a node belongs to. The dataflow between the calls shows which
streams the blocks pass on. Names only label the streams.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import fx

from cachedit_fx.passes.analysis.dataflow import Program, is_addition, is_layout
from cachedit_fx.passes.analysis.module_calls import Call, Path, module_lists, module_path_of
from cachedit_fx.passes.analysis.stream_change import find_stream_change
from cachedit_fx.patterns.blocks import ENCODER, HIDDEN, Block, BlockList
from cachedit_fx.patterns.nodes import base_name, is_tensor, may_share_shape, same_shape, shape_key
from cachedit_fx.patterns.returns import return_keys

_MOST_BEHIND = 8  # How many nodes after a block are searched for the addition that completes it.


def locate_blocks(program: Program) -> tuple[BlockList, ...]:
    """The lists of at least two block calls, in execution order, whether or not a stream continues to their end.

    Lists inside the blocks of a list that has streams are left out. Two lists whose blocks alternate are one list.
    """
    found: list[BlockList] = []
    known: set[Path] = set()  # Paths of the blocks that have streams.
    taken: set[Path] = set()  # Lists whose blocks alternate with those of a list in `found`.
    lists = module_lists(program)
    for path, calls in sorted(lists.items(), key=lambda item: (len(item[0]), item[1][0].start)):
        inner = calls[0].path
        if len(calls) < 2 or path in taken or any(inner[:i] in known for i in range(len(inner))):
            continue
        blocks = _trace_turns(program, path, lists) or _trace_calls(program, path, calls)
        if blocks.has_stream:
            known.update(call.path for call in calls)
            taken.update(tuple(other.split(".")) for other in blocks.alternates)
        found.append(blocks)
    return tuple(sorted((b for b in found if tuple(b.path.split(".")) not in taken), key=lambda b: b.blocks[0].start))


def _trace_list(
    program: Program, path: Path, blocks: tuple[Block, ...], calls: list[Call], alternates: str = ""
) -> BlockList:
    boundaries = _trace_streams(program, blocks)
    labels: dict[str, str] = {}
    if len(boundaries) == len(blocks) + 1:
        boundaries, labels = _assign_roles(program, blocks, boundaries)
    return BlockList(
        path=".".join(path),
        blocks=blocks,
        boundaries=tuple(boundaries),
        contexts=_contexts(program, blocks, boundaries),
        emitted=_emitted(program, blocks, boundaries),
        flops=sum(program.flops[position] for call in calls for position in call.positions),
        labels=labels,
        alternates=(alternates,) if alternates else (),
        change=find_stream_change(program, blocks, boundaries),
    )


def _trace_calls(program: Program, path: Path, calls: list[Call]) -> BlockList:
    """The list at `path`. Its first block begins after its first layout operations if more streams continue then.

    A hook may cut the streams before the first block runs, so that every rank works on its part of a sequence.
    """
    blocks = _spans(program, calls)
    found = _trace_list(program, path, blocks, calls)
    first, start = blocks[0], _behind_layout(program, blocks[0])
    if start == first.start:
        return found
    cut = _trace_list(program, path, (replace(first, start=start), *blocks[1:]), calls)
    is_better = cut.has_stream and (not found.has_stream or len(cut.boundaries[0]) > len(found.boundaries[0]))
    return cut if is_better else found


def _behind_layout(program: Program, block: Block) -> int:
    """The position of the first node of a block that is no layout operation."""
    positions = range(block.start, block.end)
    return next((i for i in positions if not is_layout(program.nodes[i])), block.start)


def _trace_turns(program: Program, path: Path, lists: Mapping[Path, list[Call]]) -> BlockList | None:
    """The list at `path` and a list next to it whose blocks alternate with its own (spatial, temporal), as one list.

    A block then consists of one block of each list, and extends to where the stream has its original shape again. None
    if there is no such list.
    """
    calls = lists[path]
    for other, theirs in lists.items():
        if other == path or other[:-1] != path[:-1] or len(theirs) != len(calls) or not _adds(program, theirs[0]):
            continue
        turns = [call for pair in zip(calls, theirs, strict=True) for call in pair]
        if any(call.positions[-1] >= then.start for call, then in itertools.pairwise(turns)):
            continue
        last = Call(calls[-1].path, calls[-1].cls, 0, [calls[-1].start, _moved_back(program, calls, theirs) - 1])
        found = _trace_list(program, path, _spans(program, [*calls[:-1], last]), turns, ".".join(other))
        if found.has_stream:
            return found
    return None


def _adds(program: Program, call: Call) -> bool:
    """Whether the call adds to one of its inputs. A call that only returns a branch (an adapter) is not a block."""
    start, end = call.start, call.positions[-1] + 1
    entered = set(program.read_from_before(start, end))
    made = (n for n in program.nodes_in(start, end) if is_tensor(n) and program.used_in(n, end, len(program.nodes)))
    return any(entered & program.residual_path(node, start) for node in made)


def _moved_back(program: Program, calls: list[Call], theirs: list[Call]) -> int:
    """Where the last block of an alternating list ends: after the layout operations that restore the shape of the
    stream that entered it."""
    entered = program.read_from_before(calls[-1].start, theirs[-1].positions[-1])
    shapes = {shape_key(node) for node in entered if is_tensor(node)}
    end = theirs[-1].positions[-1] + 1
    for stop in range(end, len(program.nodes)):
        before, node = program.nodes[stop - 1], program.nodes[stop]
        if is_tensor(before) and shape_key(before) in shapes:
            return stop
        if not is_layout(node):
            break
    return end


def _spans(program: Program, calls: list[Call]) -> tuple[Block, ...]:
    """The blocks that the calls of a list are, with the nodes that belong to each."""
    starts = [call.start for call in calls]
    blocks: list[Block] = []
    for i, call in enumerate(calls):
        is_last = i + 1 == len(calls)
        limit = call.positions[-1] + 1 if is_last else starts[i + 1]
        # Nodes of the module after the start of the next block are a later call. They do not belong to this block.
        end = max(p for p in call.positions if p < limit) + 1
        if is_last and blocks:
            ahead = _completed_ahead(program, blocks[-1].start, blocks[-1].end)
            if ahead and ahead == _completed_ahead(program, call.start, end):
                end = limit = end + ahead
        blocks.append(Block(".".join(call.path), call.cls, call.start, end, limit))
    return tuple(blocks)


def _completed_ahead(program: Program, start: int, end: int) -> int:
    """The number of nodes right after the block in [start, end) that add its output to its input; 0 if there are none.

    A loop may contain this addition (`x = x + block(x)`), with a scale in between.
    """
    entered = set(program.read_from_before(start, end))
    for stop in range(end, min(end + _MOST_BEHIND, len(program.nodes))):
        node = program.nodes[stop]
        if node.op not in ("call_function", "call_method") or module_path_of(node) or program.flops[stop]:
            return 0
        operands = [a for a in node.all_input_nodes if is_tensor(a) and is_tensor(node) and same_shape(a, node)]
        if len(operands) == 2 and is_addition(node):
            return stop + 1 - end if _completes(program, operands, entered, start, end) else 0
    return 0


def _completes(program: Program, operands: list[fx.Node], entered: set[fx.Node], start: int, end: int) -> bool:
    """Whether one operand is the output of the block in [start, end), and the other the stream that it is added to.

    If the output already contains the stream, the block is complete, and the addition is a skip connection.
    """
    for stream, branch in (operands, operands[::-1]):
        made = {node for node in program.ancestors_within(branch, start, len(program.nodes)) if node is not stream}
        is_made = any(start <= program.position[node] < end for node in made)
        residual_path = program.residual_path(stream, start)
        enters = stream in entered or bool(entered & residual_path) or _is_source(program, stream, entered, start)
        added = program.residual_path(branch, start)
        if is_made and enters and stream not in added and not entered & added and branch not in residual_path:
            return True
    return False


def _is_source(program: Program, node: fx.Node, entered: set[fx.Node], start: int) -> bool:
    """Whether a value that entered a block depends on `node`, as `norm(x)` depends on `x`."""
    position = program.position[node]
    return position < start and any(
        program.position[e] > position and node in program.ancestors_within(e, position, start) for e in entered
    )


def _trace_streams(program: Program, blocks: tuple[Block, ...]) -> list[dict[str, fx.Node]]:
    """The streams at every boundary, with provisional names, up to the first boundary at which none continues."""
    boundaries: list[dict[str, fx.Node]] = []
    told: set[str] = set()  # Streams for which there was more evidence than the shape at every boundary so far.
    for i, block in enumerate(blocks):
        is_last = i + 1 == len(blocks)
        reads = (block.span_end, blocks[i + 1].span_end) if not is_last else (block.end, len(program.nodes))
        nodes_in = program.nodes_in(block.start, block.span_end)
        candidates = [node for node in nodes_in if is_tensor(node) and program.used_in(node, *reads)]
        if not is_last:
            candidates = _latest(program, block, blocks[i + 1], candidates)
        if i == 0:
            # A value that only the nodes after the block read is not a stream, unless the block reads a value derived
            # from it.
            read = set(program.read_from_before(block.start, block.end))
            around = program.read_from_before(block.start, block.span_end)
            entries = [n for n in around if is_tensor(n) and (n in read or _is_source(program, n, read, block.start))]
            later = {n for n in entries if program.used_in(n, block.span_end, blocks[-1].end)}
            pairs = _pair(program, block, {node.name: node for node in entries}, candidates, later)
            pairs = _without_derived(program, block, pairs)
            boundaries.append({name: program.by_name[name] for name in pairs})
            told = set(pairs)
        else:
            pairs = _pair(program, block, boundaries[-1], candidates, set())
        alike = {name for name, node in pairs.items() if not _is_told(program, block, boundaries[-1][name], node)}
        if is_last:  # A value of the same shape that is used after the list may be another output of the last block.
            pairs = {name: node for name, node in pairs.items() if name not in alike & told}
        told -= alike
        if not pairs:
            break
        boundaries.append(pairs)
    return boundaries


def _latest(program: Program, block: Block, following: Block, candidates: list[fx.Node]) -> list[fx.Node]:
    """`candidates` without those that the nodes after the block turn into another one, which the next block continues.

    The value before a norm is not a stream if it is only used by a skip connection. It is a stream if the loop adds the
    next block to it (`x = x + block(norm(x))`).
    """
    handed_on = [node for node in program.nodes_in(following.start, following.span_end) if is_tensor(node)]
    leaving = [node for node in handed_on if program.used_in(node, following.span_end, len(program.nodes))]
    added_to = {old for node in leaving for old in program.residual_path(node, following.start)}

    def rank(node: fx.Node) -> tuple[bool, bool]:
        return node in added_to, program.used_in(node, following.start, following.end)

    behind = [node for node in candidates if program.position[node] >= block.end]
    superseded = {
        old
        for node in behind
        for old in program.ancestors_within(node, block.start, block.span_end) & set(candidates)
        if old is not node and same_shape(old, node) and rank(old) <= rank(node)
    }
    return [node for node in candidates if node not in superseded]


def _without_derived(program: Program, block: Block, pairs: dict[str, fx.Node]) -> dict[str, fx.Node]:
    """`pairs` without the streams that are only derived from another one, such as `norm(x)` from `x`."""
    added = {name for name, node in pairs.items() if program.by_name[name] in program.residual_path(node, block.start)}
    firm = {pairs[name] for name in added}

    def is_derived(name: str) -> bool:
        first = min((program.position[node] for node in firm), default=block.span_end)
        return bool(firm & program.ancestors_within(pairs[name], first, block.span_end))

    return {name: node for name, node in pairs.items() if name in added or not is_derived(name)}


def _is_told(program: Program, block: Block, before: fx.Node, after: fx.Node) -> bool:
    """Whether a path of additions or an equal name shows that `after` continues `before`."""
    return before in program.residual_path(after, block.start) or base_name(before) == base_name(after)


def _pair(
    program: Program, block: Block, before: Mapping[str, fx.Node], after: list[fx.Node], avoid: set[fx.Node]
) -> dict[str, fx.Node]:
    """Each stream before the block, with the value after the block that continues it.

    A value qualifies if it depends on the stream through a node of the block and has the same shape. If the shape
    depends on data, a path of additions is required instead. Among the values that qualify, the one with the best
    evidence is chosen. Evidence is, in this order: the stream is not read by later blocks (`avoid`: it would be an
    invariant), there is a path of additions, the names are equal, the value is late in the block, and the stream is
    late before the block (an earlier value is a skip connection).
    """
    scored = []
    for node in after:
        reached = program.ancestors_within(node, block.start, block.span_end)
        if not any(block.start <= program.position[made] < block.end for made in reached):
            continue  # Computed without the block, such as a conditioning that is refined from block to block.
        close = [(name, old) for name, old in before.items() if old in reached and may_share_shape(old, node)]
        if not close:
            continue
        residual_path = program.residual_path(node, block.start)
        for name, old in close:
            if old not in residual_path and not same_shape(old, node):
                continue
            told = (old in residual_path, base_name(old) == base_name(node))
            evidence = (old not in avoid, *told, program.position[node], program.position[old])
            scored.append((evidence, name, node))
    pairs: dict[str, fx.Node] = {}
    for evidence, name, node in sorted(scored, key=lambda item: item[0], reverse=True):
        if name not in pairs and node not in pairs.values() and (evidence[0] or evidence[1]):
            pairs[name] = node
    return {name: pairs[name] for name in before if name in pairs}


def _assign_roles(
    program: Program, blocks: tuple[Block, ...], boundaries: list[dict[str, fx.Node]]
) -> tuple[list[dict[str, fx.Node]], dict[str, str]]:
    """The boundaries with roles instead of provisional names, and role -> name in the model's code.

    The roles are identified by these criteria, in this order: the names in the code of the blocks; which stream is used
    after the list; of two streams, the one that is computed from the other one too is the image; which stream the first
    of several outputs of the model is computed from; which stream is computed from an input with the shape of an
    output. A stream that is not identified keeps its name in the code.
    """
    names = list(boundaries[0])
    labels = {}
    for name in names:
        made = Counter(base_name(boundary[name]) for boundary in boundaries[1:] if name in boundary)
        labels[name] = made.most_common(1)[0][0] if made else name
    labels |= _keys_of(program, blocks[0], boundaries[1], names)
    roles = dict.fromkeys(names, "")
    if len(names) == 1:
        roles[names[0]] = HIDDEN
    for name in names:
        if not roles[name] and labels[name] in (HIDDEN, ENCODER):
            roles[name] = labels[name]
    open_names = [name for name in names if not roles[name]]
    leaving = [name for name in names if name in boundaries[-1]]
    if HIDDEN not in roles.values() and len(leaving) == 1 and leaving[0] in open_names:
        roles[leaving[0]] = HIDDEN
        open_names.remove(leaving[0])
    if len(names) == len(open_names) == 2:
        reading = [name for name in names if _reads_beside(program, blocks, boundaries, name)]
        if len(reading) == 1:
            roles[reading[0]] = HIDDEN
            open_names.remove(reading[0])
    if HIDDEN not in roles.values():  # The stream that the first of several outputs of the model is computed from.
        behind = _behind_first_output(program, blocks[-1], boundaries[-1])
        if len(behind) == 1 and behind[0] in open_names:
            roles[behind[0]] = HIDDEN
            open_names.remove(behind[0])
    if HIDDEN not in roles.values():  # The stream that is computed from the latents.
        latents = [name for name in open_names if program.inputs_behind(boundaries[0][name]) & program.like_outputs]
        if len(latents) == 1:
            roles[latents[0]] = HIDDEN
            open_names.remove(latents[0])
    if len(names) == 2 and len(open_names) == 1:  # The remaining stream has the remaining role.
        roles[open_names[0]] = ENCODER if HIDDEN in roles.values() else HIDDEN
    taken = set(filter(None, roles.values()))
    for name in names:
        if not roles[name]:
            roles[name] = labels[name] if labels[name] not in taken else f"{labels[name]} ({name})"
            taken.add(roles[name])
    ordered = sorted(names, key=lambda name: roles[name] != HIDDEN)
    renamed = [{roles[name]: boundary[name] for name in ordered if name in boundary} for boundary in boundaries]
    return renamed, {roles[name]: labels[name] for name in ordered}


def _keys_of(program: Program, block: Block, after: Mapping[str, fx.Node], names: list[str]) -> dict[str, str]:
    """Name of a stream -> the name under which the block returns it in a dict or another container with names.

    The order in which the values are computed shows which of them has which name. Empty if there is no container, or
    if it holds other values as well.
    """
    keys = return_keys(block.cls)
    if len(keys) != len(names) or len(after) != len(names):
        return {}
    by_key = {base_name(node): name for name, node in after.items()}
    if set(by_key) == set(keys):  # The variables have the names of the keys.
        return {name: key for key, name in by_key.items()}
    ordered = sorted(names, key=lambda name: program.position[after[name]])
    return dict(zip(ordered, keys, strict=True)) if all(keys.values()) else {}


def _reads_beside(program: Program, blocks: tuple[Block, ...], boundaries: list[dict[str, fx.Node]], name: str) -> bool:
    """Whether any block computes the stream `name` from another stream as well."""
    for block, before, after in zip(blocks, boundaries, boundaries[1:], strict=False):
        others = {node for other, node in before.items() if other != name}
        if name in after and others & program.ancestors_within(after[name], block.start, block.span_end):
            return True
    return False


def _behind_first_output(program: Program, last: Block, boundary: Mapping[str, fx.Node]) -> list[str]:
    """The streams after the last block that the first output is computed from (video before audio, for example)."""
    outputs = [node for node in program.nodes[-1].all_input_nodes if is_tensor(node) and node.op != "placeholder"]
    if len(outputs) < 2:
        return []
    behind = program.ancestors_within(outputs[0], last.end, len(program.nodes))
    return [name for name, node in boundary.items() if node in behind]


def _contexts(
    program: Program, blocks: tuple[Block, ...], boundaries: Iterable[Mapping[str, fx.Node]]
) -> tuple[fx.Node, ...]:
    """The sequences that every block reads and that are computed from a conditioning input before the list."""
    boundaries = list(boundaries)
    streams = set(boundaries[0].values()) if boundaries else set()
    latents = program.latent_inputs(boundaries[0].get(HIDDEN) if boundaries else None)
    found = []
    for node in program.read_from_before(blocks[0].start, blocks[0].span_end):
        if node in streams or not program.is_sequence(node):
            continue
        made_from = program.conditioning_behind(node) - latents
        if made_from and _is_read_by_all(program, node, blocks[1:]):
            found.append(node)
    return tuple(found)


def _is_read_by_all(program: Program, node: fx.Node, blocks: Iterable[Block]) -> bool:
    reads = sorted(program.position[user] for user in node.users)
    return all(bisect.bisect_left(reads, block.start) < bisect.bisect_left(reads, block.end) for block in blocks)


def _emitted(program: Program, blocks: tuple[Block, ...], boundaries: list[dict[str, fx.Node]]) -> tuple[fx.Node, ...]:
    """The outputs of the last block that are used after the list and are not streams."""
    last = blocks[-1]
    streams = set(boundaries[-1].values()) if boundaries else set()
    return (
        tuple(
            node
            for node in program.nodes_in(last.start, last.end)
            if node not in streams
            and program.is_sequence(node)
            and program.used_in(node, last.end, len(program.nodes))
            and any(
                stream in program.ancestors_within(node, last.start, last.end) for stream in boundaries[-2].values()
            )
        )
        if len(boundaries) > 1
        else ()
    )
