"""Small models that no template fits, each with a patch functor that makes one fit and with its blocks run by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from cachedit_fx import BlockAdapter, BlockTemplate
from cachedit_fx.functors import PatchFunctor, give_to_block, rename_stream, split_stream
from tests import hybrid
from tests.regions import relative_l1
from tests.tiny import TEXT, WIDTH

HIDDEN, ENCODER = "hidden_states", "encoder_hidden_states"
THRESHOLD = 0.08  # At the times of `tests.tiny` the residual diff exceeds it at every other step.


def named(gm: fx.GraphModule, local: str) -> list[fx.Node]:
    """The nodes that Dynamo named after a local of the model's code, in order."""
    return [node for node in gm.graph.nodes if re.fullmatch(rf"{local}(_\d+)?", node.name)]


class Model(nn.Module):
    """The parts around the blocks of all models here: input projection, a scale that depends on time, output."""

    block: type[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(4, WIDTH)
        self.proj_text = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(4))
        self.proj_out = nn.Linear(WIDTH, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.text = nn.Linear(WIDTH, WIDTH)


# Each block takes columns and returns rows, so the output of the last block does not continue the input of the first.


class ColumnBlock(Block):
    def forward(self, columns: Tensor, scale: Tensor) -> Tensor:
        rows = columns.transpose(1, 2)
        rows = rows + scale * self.linear(rows + rows.mean(1, keepdim=True)).tanh()
        return rows


class InColumns(Model):
    block = ColumnBlock

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = (1 + timestep)[:, None, None]
        rows = self.proj_in(hidden_states) + self.proj_text(encoder_hidden_states).mean(1, keepdim=True)
        for block in self.blocks:
            columns = rows.transpose(1, 2).contiguous()
            rows = block(columns, scale)
        return (self.proj_out(rows),)


class GiveColumns(PatchFunctor):
    """Moves the conversion to columns into the block that reads them."""

    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        for columns in named(gm, "columns"):
            (reader,) = columns.users
            give_to_block((columns.args[0], columns), like=reader)
        return gm


def columns_by_hand(model: Any, call: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    scale = (1 + call["timestep"])[:, None, None]
    rows = model.proj_in(call[HIDDEN]) + model.proj_text(call[ENCODER]).mean(1, keepdim=True)
    yield {HIDDEN: rows}
    for block in model.blocks:
        rows = block(rows.transpose(1, 2).contiguous(), scale)
        yield {HIDDEN: rows}


# Two streams whose names do not identify them; each depends on the other and on both inputs and is used at the end.


class NamelessBlock(Block):
    def forward(self, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        context = a.mean(1, keepdim=True)
        a = a + scale * self.linear(a + b.mean(1, keepdim=True)).tanh()
        b = b + scale * self.text(b + context).tanh()
        return a, b


class Nameless(Model):
    block = NamelessBlock

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = (1 + timestep)[:, None, None]
        image, text = self.proj_in(hidden_states), self.proj_text(encoder_hidden_states)
        a, b = image + text.mean(1, keepdim=True), text + image.mean(1, keepdim=True)
        for block in self.blocks:
            a, b = block(a, b, scale)
        return (self.proj_out(a + b.mean(1, keepdim=True)),)


class NameThem(PatchFunctor):
    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        rename_stream(named(gm, "a"), HIDDEN)
        rename_stream(named(gm, "b"), ENCODER)
        return gm


def names_by_hand(model: Any, call: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    scale = (1 + call["timestep"])[:, None, None]
    image, text = model.proj_in(call[HIDDEN]), model.proj_text(call[ENCODER])
    a, b = image + text.mean(1, keepdim=True), text + image.mean(1, keepdim=True)
    yield {HIDDEN: a, ENCODER: b}
    for block in model.blocks:
        a, b = block(a, b, scale)
        yield {HIDDEN: a, ENCODER: b}


# Text and image in one stream. The template has two streams, so that the probe covers only the image.


class JointBlock(Block):
    def forward(self, joint: Tensor, scale: Tensor) -> Tensor:
        mixed = self.linear(joint + joint.mean(1, keepdim=True)).tanh()
        joint = joint + scale * mixed
        return joint


class Joint(Model):
    block = JointBlock

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = (1 + timestep)[:, None, None]
        joint = torch.cat([self.proj_text(encoder_hidden_states), self.proj_in(hidden_states)], dim=1)
        for block in self.blocks:
            joint = block(joint, scale)
        return (self.proj_out(joint[:, encoder_hidden_states.shape[1] :]),)


class SplitText(PatchFunctor):
    def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
        for joint in named(gm, "joint"):
            split_stream(joint, (TEXT, None), 1, (ENCODER, HIDDEN))
        return gm


def joint_by_hand(model: Any, call: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    scale = (1 + call["timestep"])[:, None, None]
    joint = torch.cat([model.proj_text(call[ENCODER]), model.proj_in(call[HIDDEN])], dim=1)
    yield {ENCODER: joint[:, :TEXT], HIDDEN: joint[:, TEXT:]}
    for block in model.blocks:
        joint = block(joint, scale)
        yield {ENCODER: joint[:, :TEXT], HIDDEN: joint[:, TEXT:]}


TWO_STREAMS = BlockTemplate("text and image", takes=(HIDDEN, ENCODER), returns=(ENCODER, HIDDEN))


@dataclass(frozen=True)
class Case:
    """A model with its functor.

    Attributes:
        mismatch: A part of the message without the functor.
        streams: Model and call -> the streams before the first block and after every block, computed in plain Python.
        out: Model and streams after the last block -> the output of the model.
        template: The template that is declared for its blocks; None to declare none.
    """

    model: type[Model]
    functor: type[PatchFunctor]
    mismatch: str
    streams: Callable[[Any, dict[str, Tensor]], Iterator[dict[str, Tensor]]]
    out: Callable[[Any, dict[str, Tensor]], Tensor]
    template: BlockTemplate | None = None

    def adapter(self, model: nn.Module, functor: PatchFunctor | None) -> BlockAdapter:
        declared = {} if self.template is None else dict(blocks_name="blocks", forward_pattern=self.template)
        return BlockAdapter(transformer=model, patch_functor=functor, **declared)


CASES = {
    "give_to_block": Case(
        InColumns,
        GiveColumns,
        "3 of 4 blocks fit",
        columns_by_hand,
        lambda model, end: model.proj_out(end[HIDDEN]),
    ),
    "rename_stream": Case(
        Nameless,
        NameThem,
        "stream-name: expected: one stream that can be identified as hidden_states; found: the streams a, b; neither",
        names_by_hand,
        lambda model, end: model.proj_out(end[HIDDEN] + end[ENCODER].mean(1, keepdim=True)),
    ),
    "split_stream": Case(
        Joint,
        SplitText,
        "stream-count expected: 2 streams (encoder_hidden_states, hidden_states) from block 0 to block 1 of blocks; "
        "found: 1 stream (joint_",
        joint_by_hand,
        lambda model, end: model.proj_out(end[HIDDEN]),
        TWO_STREAMS,
    ),
}


def build(case: Case) -> Any:
    return hybrid.build(case.model)


def by_hand(
    case: Case, given: list[dict[str, Tensor]], cached: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Tensor], list[int]]:
    """The outputs of one generation in which blocks 1 to 3 are cached, and the steps that were reused."""
    model, outputs, reused = build(case), [], []
    last_probe, cached = None, {}
    for step, call in enumerate(given):
        streams = case.streams(model, call)
        before, entered = next(streams), next(streams)
        residual = entered[HIDDEN] - before[HIDDEN]
        if last_probe is not None and relative_l1(residual, last_probe) < THRESHOLD:
            reused.append(step)
            end = {r: cached[r].clone() if cached.get(r) == "value" else entered[r] + cached[r] for r in entered}
        else:
            *_, end = streams
            last_probe = residual
            cached = {role: end[role] if cached.get(role) == "value" else end[role] - entered[role] for role in end}
        outputs.append(case.out(model, end))
    return outputs, reused
