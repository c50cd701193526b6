"""A plain-Python reference of skipped blocks for the zoo, where the layout of streams changes between block lists.

It shares no code with `cachedit_fx`: the model runs eagerly, with the forwards of its blocks replaced. A model is
described by its `Variant`. If all blocks take and return the same streams, `tests.regions` is enough.
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
    """Skips the blocks from number `fn` up to the last `bn` ones, and adds the residuals of their last run.

        blocks[:fn] run | streams enter | blocks[fn : n - bn] return their inputs | streams leave | the rest runs

    A stream then leaves with the value that enters now plus its residual of the last computed step. Operations between
    two blocks belong to the first one.

    If the layout changes on the way, the entering streams are needed in the final layout. The code of the model between
    the two blocks converts them. But if the chain ends with text and image in one stream, only the rows of the image
    are needed.

    Args:
        variant: The description of the model.
        model: The forwards of its blocks are restored after every call.
        fn, bn: Numbers of blocks at the front and at the end that always run.
    """

    def __init__(self, variant: Variant, model: nn.Module, fn: int, bn: int) -> None:
        self.model, self.variant = model, variant
        self.chain = variant.chain(model)
        self.fn, self.stop = fn, len(self.chain) - bn
        self.giver, self.taker = self._change_of_layout()
        self.mode = "compute"  # Or "reuse", or "probe", which finds the entering streams in the final layout.
        self.entered: Streams = {}  # The streams before block `fn` at this step,
        self.brought: Streams = {}  # the same in the final layout, if it differs,
        self.added: Streams = {}  # and their residuals of the last computed step.
        self.packed: set[nn.Module] = set()  # The blocks that return a tuple.
        self.made: list[Tensor] = []  # The outputs of the skippable blocks at that step,
        self.skips: Streams = {}  # and those that a later block reads besides its streams.

    def __call__(self, *, skip: bool, **inputs: Any) -> list[Tensor]:
        """The tensors that the model returns."""
        if not skip:
            self.made, self.skips = [], {}
        if not skip and self.taker is not None:
            self._run("probe", inputs)
        return tensors_of(self._run("reuse" if skip else "compute", inputs))

    def _change_of_layout(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The modules between which the layout changes; None if both ends of the skipped blocks have the same one."""
        numbers, is_end = range(self.fn + 1, self.stop + 1), self.stop == len(self.chain)
        if self.variant.alternates and is_end:
            first, *_, last = self.chain[-1][0]
            return first, last
        for number in numbers if not is_end else ():
            (before, names), (after, names_after) = self.chain[number - 1], self.chain[number]
            if len(names_after) != len(names):
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
                module.__dict__.pop("forward", None)  # The forward of the class is visible again.

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
                return tuple(streams.values()) if len(returns) > 1 or module in self.packed else streams[returns[0]]
            result = original(*given.args, **given.kwargs)
            if isinstance(result, tuple):
                self.packed.add(module)
            if self.fn <= number < self.stop:
                self.made += tensors_of(result)
                if is_end:
                    self._leave(dict(zip(returns, result if isinstance(result, tuple) else (result,), strict=True)))
            return result

        return forward

    def _leave(self, streams: Streams) -> Streams:
        """The streams after the last skippable block: in a computed step recorded, in a reused step corrected."""
        starts = self.brought if self.taker is not None else self.entered
        if self.mode == "compute":
            left = {name: stream for name, stream in streams.items() if stream is not None and name in starts}
            self.added = {name: self._rows(stream, starts[name])[0] - starts[name] for name, stream in left.items()}
        elif self.mode == "reuse":
            for name, added in self.added.items():
                _, text = self._rows(streams[name], starts[name])
                rows = [starts[name] + added, *text]
                joined = torch.cat(rows[::-1] if self.variant.image_last else rows, dim=1) if text else rows[0]
                streams = streams | {name: joined}
        return streams

    def _rows(self, stream: Tensor, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The rows of the image and those of the text in a joined stream; all rows and no text for another stream."""
        if stream.shape == image.shape:
            return stream, []
        if self.variant.image_last:
            text, rows = stream.split((stream.shape[1] - image.shape[1], image.shape[1]), dim=1)
        else:
            rows, text = stream.split((image.shape[1], stream.shape[1] - image.shape[1]), dim=1)
        return rows, [text]

    def _skips(self, number: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a block besides its streams that skippable blocks computed, from the last computed step."""
        beside = {name: value for name, value in arguments.items() if name not in self.chain[number][1]}
        for name, value in beside.items() if self.mode == "compute" else ():
            if any(value is made for made in self.made):
                self.skips[f"{number}.{name}"] = value
        return {name: self.skips[f"{number}.{name}"] for name in beside if f"{number}.{name}" in self.skips}


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
