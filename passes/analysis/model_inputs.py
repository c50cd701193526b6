"""Which inputs of the graph tell where in a generation a call stands: the timestep and the conditioning. Reads only."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import fx

from cachedit_fx.passes.analysis.dataflow import Program, is_conditioning_name, is_named_conditioning, is_weight
from cachedit_fx.patterns.blocks import ENCODER, HIDDEN, BlockList
from cachedit_fx.patterns.nodes import base_name, value_of

_TIMESTEP_NAMES = (r"timesteps?", r"t", r"sigmas?", r"time", r"[a-z]+_timesteps?")
_REBUILT_NAME = re.compile(r"mask|ids$|guidance|control|rotary|freqs|timestep|sigma|scale|shape|size", re.IGNORECASE)


def find_timestep(program: Program, chain: tuple[BlockList, ...]) -> fx.Node | None:
    """The timestep input, by name; without a name the one small input that sines and cosines are made of.

    It has one number per sample ([], [B], [B, 1]), or one per token or frame ([B, N], [B, N, 1]). What then tells it
    from an embedding of the same name, in a graph that begins behind the model's first lines, is that it is embedded.
    """
    given = [node for node in _user_tensors(program) if not _is_bool(node)]
    waves = [n for n in program.nodes[: chain[0].blocks[0].start] if _function_name(n) in ("sin", "cos")]

    def is_embedded(node: fx.Node) -> bool:
        return any(node in program.inputs_behind(wave) for wave in waves)

    for pattern in _TIMESTEP_NAMES:
        named = [node for node in given if re.fullmatch(pattern, base_name(node)) and value_of(node).dim() <= 3]
        for node in named:
            if _has_one_per_sample(node) or not value_of(node).is_floating_point() or is_embedded(node):
                return node
    embedded = [node for node in given if value_of(node).dim() <= 1 and is_embedded(node)]
    return embedded[0] if len(embedded) == 1 else None


def _has_one_per_sample(node: fx.Node) -> bool:
    return all(isinstance(size, int) and size == 1 for size in value_of(node).shape[1:])


def find_conditioning(program: Program, chain: tuple[BlockList, ...], timestep: fx.Node | None) -> fx.Node | None:
    """The input that tells one request and one guidance branch from another by its identity.

    The floating input, at least [B, L, D], that the encoder stream or a context of the blocks is made from; for a
    class-conditional model the labels. Masks, ids and guidance are rebuilt by loops and do not count, nor do latents.
    """
    boundary = chain[0].boundaries[0]
    latents = program.latent_inputs(boundary.get(HIDDEN)) | {
        node for node in program.like_outputs if not is_named_conditioning(node)
    }
    roots = [boundary[ENCODER]] if ENCODER in boundary else []
    roots += [context for blocks in chain for context in blocks.contexts]
    behind = {source for root in roots for source in program.conditioning_behind(root)} - latents
    if not behind:
        given = {node for node in _user_tensors(program) if node is not timestep} - latents
        behind = set(filter(_is_looked_up, given)) or {node for node in given if not _is_rebuilt(node)}

    def rank(node: fx.Node) -> tuple[bool, int, int]:
        return is_named_conditioning(node), value_of(node).dim(), -program.position[node]

    return max(behind, key=rank, default=None)


def timestep_name(names: Iterable[str]) -> str | None:
    """Which of the arguments of a model's forward is the timestep."""
    ordered = list(names)
    found = (name for pattern in _TIMESTEP_NAMES for name in ordered if re.fullmatch(pattern, name))
    return next(found, None)


def conditioning_names(names: Iterable[str]) -> tuple[str, ...]:
    """Which of the arguments of a model's forward may tell requests and guidance branches apart, best first."""
    return tuple(name for name in names if is_conditioning_name(name) and _REBUILT_NAME.search(name) is None)


def _user_tensors(program: Program) -> list[fx.Node]:
    return [
        node
        for node in program.nodes
        if node.op == "placeholder" and isinstance(value_of(node), torch.Tensor) and not is_weight(node)
    ]


def _is_looked_up(node: fx.Node) -> bool:
    """Whether the input picks rows of an embedding table, as token ids and class labels do."""
    return any(user.target is torch.nn.functional.embedding and user.args[0] is node for user in node.users)


def _is_rebuilt(node: fx.Node) -> bool:
    """Whether the input is one that loops make anew at every step and that tells no request apart."""
    return _is_bool(node) or _REBUILT_NAME.search(base_name(node)) is not None


def _is_bool(node: fx.Node) -> bool:
    return bool(value_of(node).dtype == torch.bool)


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
