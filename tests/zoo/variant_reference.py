"""A plain-Python reference of skipped blocks for the zoo, whose streams change their layout between two block lists.

It shares no code with `cachedit_fx`: the model runs eagerly, with the forwards of its blocks replaced. What it knows of
a model is its `Variant`. Where all blocks take and return the same streams, `tests.regions` is enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo.variant import Variant

Streams = dict[str, Tensor]


class VariantReference:
    """Skips the blocks from number `fn` up to the last `bn` ones, and adds what they added when they last ran.

        blocks[:fn] run | streams enter | blocks[fn : n - bn] hand on what they get | streams leave | the rest runs

    What leaves is then what enters now, plus what left less what entered at the last computed step. Work between two
    blocks belongs to the one before.

    The layout may change on the way, and what enters is then wanted in that of the end. The model's own code brings it
    there: one block hands it over to the next. But where the chain ends with text and image in one stream, only the
    image's rows are needed.

    Args:
        variant: What is known of the model.
        model: Its blocks get their own forwards back after every call.
        fn, bn: Blocks at the front and at the end that always run.
    """

    def __init__(self, variant: Variant, model: nn.Module, fn: int, bn: int) -> None:
        self.model, self.variant = model, variant
        self.chain = variant.chain(model)
        self.fn, self.stop = fn, len(self.chain) - bn
        self.giver, self.taker = self._change_of_layout()
        self.mode = "compute"  # Or "reuse", or "probe": what are the streams that enter in the layout at the end?
        self.entered: Streams = {}  # The streams before block `fn` at this step,
        self.brought: Streams = {}  # the same in the layout at the end, if it is another,
        self.added: Streams = {}  # and what was added to them at the last computed step.
        self.made: list[Tensor] = []  # What the skippable blocks returned then,
        self.skips: Streams = {}  # and what of it a later block took beside its streams.

    def __call__(self, *, skip: bool, **inputs: Any) -> list[Tensor]:
        """The tensors that the model returns."""
        if not skip:
            self.made, self.skips = [], {}
        if not skip and self.taker is not None:
            self._run("probe", inputs)
        return tensors_of(self._run("reuse" if skip else "compute", inputs))

    def _change_of_layout(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The modules between which it happens; none if both ends of what is skipped have one layout."""
        numbers, is_end = range(self.fn + 1, self.stop + 1), self.stop == len(self.chain)
        if self.variant.alternates and is_end:
            first, *_, last = self.chain[-1][0]
            return first, last
        for number in numbers if not is_end else ():
            (before, names), (after, names_after) = self.chain[number - 1], self.chain[number]
            if len(names_after) < len(names):
                return before[-1], after[0]
        return None, None

    def _run(self, mode: str, inputs: dict[str, Any]) -> Any:
        self.mode = mode
        with self._stand_ins():
            return self.model(**inputs)

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        modules = [(number, module) for number, (modules, _) in enumerate(self.chain) for module in modules]
        try:
            for number, module in modules:
                module.forward = self._stand_in(number, module)
            yield
        finally:
            for _, module in modules:
                module.__dict__.pop("forward", None)  # The class's own shows again.

    def _stand_in(self, number: int, module: nn.Module) -> Callable[..., Any]:
        modules, returns = self.chain[number]
        is_first = module is modules[0]
        is_end = module is self.chain[-1][0][-1]
        original, signature = module.forward, inspect.signature(module.forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            streams = {name: given.arguments[name] for name in returns}
            if is_first and number == self.fn:
                self.entered = streams
            if module is self.taker and self.mode != "compute":
                self.brought = streams
            if number >= self.stop:
                if is_first and number == self.stop:
                    streams = self._leave(streams)
                given.arguments.update({**streams, **self._skips(number, given.arguments)})
            if self.mode != "compute" and self.fn <= number < self.stop:
                streams = self.entered if module is self.giver else self._leave(streams) if is_end else streams
                return tuple(streams.values()) if len(returns) > 1 else streams[returns[0]]
            result = original(*given.args, **given.kwargs)
            if self.fn <= number < self.stop:
                self.made += tensors_of(result)
                if is_end:
                    self._leave(dict(zip(returns, result if isinstance(result, tuple) else (result,), strict=True)))
            return result

        return forward

    def _leave(self, streams: Streams) -> Streams:
        """The streams behind the last block that may be skipped: noted as they are, or where it was, put right."""
        starts = self.brought if self.taker is not None else self.entered
        if self.mode == "compute":
            left = {name: stream for name, stream in streams.items() if stream is not None}
            self.added = {name: self._rows(stream, starts[name])[0] - starts[name] for name, stream in left.items()}
        elif self.mode == "reuse":
            for name, added in self.added.items():
                _, text = self._rows(streams[name], starts[name])
                rows = [starts[name] + added, *text]
                joined = torch.cat(rows[::-1] if self.variant.image_last else rows, dim=1) if text else rows[0]
                streams = streams | {name: joined}
        return streams

    def _rows(self, stream: Tensor, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of a joint stream the rows of the image, and those of the text; of another stream all, and none."""
        if stream.shape == image.shape:
            return stream, []
        if self.variant.image_last:
            text, rows = stream.split((stream.shape[1] - image.shape[1], image.shape[1]), dim=1)
        else:
            rows, text = stream.split((image.shape[1], stream.shape[1] - image.shape[1]), dim=1)
        return rows, [text]

    def _skips(self, number: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a block takes of the skippable ones beside its streams: what they made at the last computed step."""
        beside = {name: value for name, value in arguments.items() if name not in self.chain[number][1]}
        for name, value in beside.items() if self.mode == "compute" else ():
            if any(value is made for made in self.made):
                self.skips[f"{number}.{name}"] = value
        return {name: self.skips[f"{number}.{name}"] for name in beside if f"{number}.{name}" in self.skips}


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
