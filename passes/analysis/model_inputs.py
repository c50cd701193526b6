"""Finds the timestep input and the conditioning, which identify the step and the generation of a call."""

from __future__ import annotations

import re

import torch
from torch import fx

from cachedit_fx.passes.analysis.dataflow import Program, is_named_conditioning, is_weight
from cachedit_fx.passes.analysis.op_tables import WAVE_NAMES
from cachedit_fx.patterns.blocks import ENCODER, HIDDEN, BlockList
from cachedit_fx.patterns.names import TIMESTEP_NAMES, is_rebuilt_name
from cachedit_fx.patterns.nodes import base_name, value_of


def find_timestep(program: Program, chain: tuple[BlockList, ...]) -> fx.Node | None:
    """The timestep input, by its name; else the only input of at most one dimension that is embedded in sines and
    cosines; None if there is no such input.

    A timestep has one number per sample ([], [B], [B, 1]), or one per token or frame ([B, N], [B, N, 1]). In a graph
    that begins after the first lines of the model, an input of the latter shape may be an embedding with the name of
    the timestep. It counts only if it is embedded, or is not a floating-point tensor.
    """
    given = [node for node in _user_tensors(program) if not _is_bool(node)]
    waves = [n for n in program.nodes[: chain[0].blocks[0].start] if _function_name(n) in WAVE_NAMES]

    def is_embedded(node: fx.Node) -> bool:
        return any(node in program.inputs_behind(wave) for wave in waves)

    for pattern in TIMESTEP_NAMES:
        named = [node for node in given if re.fullmatch(pattern, base_name(node)) and value_of(node).dim() <= 3]
        for node in named:
            if _has_one_per_sample(node) or not value_of(node).is_floating_point() or is_embedded(node):
                return node
    embedded = [node for node in given if value_of(node).dim() <= 1 and is_embedded(node)]
    return embedded[0] if len(embedded) == 1 else None


def _has_one_per_sample(node: fx.Node) -> bool:
    return all(isinstance(size, int) and size == 1 for size in value_of(node).shape[1:])


def find_conditioning(program: Program, chain: tuple[BlockList, ...], timestep: fx.Node | None) -> fx.Node | None:
    """The input whose identity distinguishes requests and guidance branches; None if there is none.

    It is the floating-point input of at least three dimensions ([B, L, D]) that the encoder stream or a context of the
    blocks is computed from, or the labels of a class-conditional model. Masks, ids and guidance do not count, because
    denoising loops rebuild them at every step. Latents do not count either.
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


def _user_tensors(program: Program) -> list[fx.Node]:
    return [
        node
        for node in program.nodes
        if node.op == "placeholder" and isinstance(value_of(node), torch.Tensor) and not is_weight(node)
    ]


def _is_looked_up(node: fx.Node) -> bool:
    """Whether the input selects rows of an embedding table, as token ids and class labels do."""
    return any(user.target is torch.nn.functional.embedding and user.args[0] is node for user in node.users)


def _is_rebuilt(node: fx.Node) -> bool:
    """Whether denoising loops rebuild the input at every step, so that its identity distinguishes no requests."""
    return _is_bool(node) or is_rebuilt_name(base_name(node))


def _is_bool(node: fx.Node) -> bool:
    return bool(value_of(node).dtype == torch.bool)


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
