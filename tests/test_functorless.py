"""Models whose code cache-dit patches are cached here as they are, and docs/functors.md says how.

A generation of three steps: the first is computed, the second reused, the third computed.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cachedit_fx
from cachedit_fx import backend
from cachedit_fx.cache_factory import patch_functors
from cachedit_fx.passes.pipeline import Plan, plan_graph
from tests.functorless import MODELS, Functorless
from tests.models import Block, noise

PAGE = (Path(__file__).parent.parent / "docs" / "functors.md").read_text(encoding="utf-8")
FN = 1
TIMES = (0.9, 0.8, 0.7)
SETTINGS = dict(
    Fn_compute_blocks=FN,
    max_warmup_steps=1,
    residual_diff_threshold=1.0,
    max_continuous_cached_steps=1,
    inner_backend="eager",
    on_no_match="raise",
    fullgraph=True,
)

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class ByHand:
    """Runs a model eagerly with the forwards of its blocks replaced; shares no code with the package.

    Args:
        chain: The blocks, each with what it returns. In the last one the image may stand behind the text in one stream.
    """

    def __init__(self, model: nn.Module, chain: list[Block]) -> None:
        self.model, self.chain = model, chain
        self.entered: dict[str, Tensor] = {}  # The streams before the first block that may be skipped,
        self.added: dict[str, Tensor] = {}  # and what the blocks from there on added to them.

    def __call__(self, *, skip: bool, **inputs: Any) -> list[Tensor]:
        """The model's outputs. With `skip`, all blocks but the first add what they added in the call before."""
        try:
            for index, (block, returns) in enumerate(self.chain):
                block.forward = self._stand_in(index, block, returns, skip)
            return tensors_of(self.model(**inputs))
        finally:
            for block, _returns in self.chain:
                block.__dict__.pop("forward", None)  # The class's own shows again.

    def _stand_in(self, index: int, block: nn.Module, returns: tuple[str, ...], skip: bool) -> Callable[..., Any]:
        original = block.forward
        signature = inspect.signature(original)
        is_last = index == len(self.chain) - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            streams = {name: given[name] for name in returns}
            if index == FN:
                self.entered = streams
            if index < FN or not skip:
                result = original(*args, **kwargs)
                if is_last:
                    left = dict(zip(returns, result if isinstance(result, tuple) else (result,), strict=True))
                    self.added = {name: self._rows(name, left[name])[1] - self.entered[name] for name in returns}
                return result
            if is_last:
                for name, stream in streams.items():
                    before, _ = self._rows(name, stream)
                    streams[name] = torch.cat([before, self.entered[name] + self.added[name]], dim=1)
            return tuple(streams.values()) if len(returns) > 1 else streams[returns[0]]

        return forward

    def _rows(self, name: str, stream: Tensor) -> tuple[Tensor, Tensor]:
        """What stands before a stream in a joint one (nothing, if it is not joined), and the stream."""
        here = self.entered[name].shape[1]
        return stream[:, : stream.shape[1] - here], stream[:, stream.shape[1] - here :]


@dataclass(frozen=True)
class Generation:
    """What became of the three steps of a model.

    Attributes:
        lists: Path of every block list in execution order, with the label of what it matched.
        region, decisions: From the statistics of the one session.
        outputs: Of every step, as the cached model gave them; `uncached` and `by_hand` are what they are held against.
    """

    lists: dict[str, str]
    region: str
    decisions: list[str]
    outputs: list[list[Tensor]]
    uncached: list[list[Tensor]]
    by_hand: list[list[Tensor]]


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@functools.cache
def generation(name: str) -> Generation:
    """The three steps without a functor, with the cache in one graph."""
    model, plans = MODELS[name], []
    transformer, prompt = model.build(), model.arguments()
    calls = [model.at(prompt, time) for time in TIMES]
    # Called once before it is compiled, ZImage has its rotary tables; Dynamo does not capture how they are made.
    uncached = [tensors_of(transformer(**call)) for call in calls]
    reference = ByHand(transformer, model.chain(transformer))
    by_hand = [reference(skip=step == 1, **call) for step, call in enumerate(calls)]

    def noted(*args: Any) -> Any:
        plans.append(plan_graph(*args))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backend, "plan_graph", noted)
        cachedit_fx.enable_cache(transformer, **SETTINGS)
        outputs = [tensors_of(transformer(**call)) for call in calls]
    (plan,), (stats,) = plans, cachedit_fx.summary(transformer, logging=False)
    assert isinstance(plan, Plan)
    lists = {match.blocks.path: match.label for match in plan.chain}
    return Generation(lists, stats.region, stats.decisions, outputs, uncached, by_hand)


@every_model
def test_all_blocks_are_found_without_a_functor(model: Functorless):
    found = generation(model.name)
    assert [*found.lists] == [*model.lists]
    first, *others = model.lists
    count = len(model.build().get_submodule(first))
    assert found.region == "+".join([f"{first}[{FN}:{count}]", *others])


@every_model
def test_computed_steps_are_bitwise_the_uncached_ones(model: Functorless):
    found = generation(model.name)
    assert found.decisions == ["warmup", "threshold-one", "max-continuous"]
    for step in (0, 2):
        torch.testing.assert_close(found.outputs[step], found.uncached[step], rtol=0, atol=0)
        torch.testing.assert_close(found.by_hand[step], found.uncached[step], rtol=0, atol=0)


@every_model
def test_a_reused_step_is_that_of_blocks_skipped_by_hand(model: Functorless):
    found = generation(model.name)
    torch.testing.assert_close(found.outputs[1], found.by_hand[1], rtol=0, atol=0)
    assert not any(torch.equal(*pair) for pair in zip(found.outputs[1], found.uncached[1], strict=True))


# docs/functors.md


def rows() -> dict[str, list[str]]:
    """Name of a transformer -> the other cells of its row in the page's table."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.findall(r"`(\w+)`", first)[0]: others for first, *others in cells}


def test_the_page_lists_these_models_and_those_with_a_functor():
    needed = {name: re.findall(r"`(\w+)`", here) for name, (_, here, _) in rows().items() if here != "nothing"}
    assert {name for name in rows() if name not in needed} == {model.kind.__name__ for model in MODELS.values()}
    assert {functor for (functor, *_) in needed.values()} == set(patch_functors.__all__)


@every_model
def test_the_page_says_which_lists_are_found_and_what_they_match(model: Functorless):
    said = re.findall(r"`(\w+)` (\d(?: or \d)?)", rows()[model.kind.__name__][-1])
    labels = generation(model.name).lists
    assert said == [(path, label.removeprefix("pattern ").split(" (")[0]) for path, label in labels.items()]


class LatticeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.text = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        mean = a.mean(1, keepdim=True) + b.mean(1, keepdim=True)
        return a + gain * self.linear(a + mean).tanh(), b + gain * self.text(b + mean).tanh()


class LatticeTransformer(nn.Module):
    """The transformer that the page's example speaks of."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LatticeBlock() for _ in range(4))

    def gain(self, timestep: Tensor) -> float:
        return float(np.log1p(timestep.numpy()).max())

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        gain = self.gain(timestep)
        a, b = hidden_states, encoder_hidden_states
        for block in self.blocks:
            a, b = block(a, b, gain)
        return (a + b.mean(1, keepdim=True),)


def test_the_example_of_the_page_makes_its_transformer_cacheable_and_is_undone():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    transformer = LatticeTransformer().eval().requires_grad_(False)
    inputs = dict(hidden_states=noise(2, 6, 8, seed=1), encoder_hidden_states=noise(2, 5, 8, seed=1))
    calls = [inputs | dict(timestep=torch.tensor([time])) for time in TIMES]
    uncached = [transformer(**call)[0] for call in calls]
    before = dict(transformer.__dict__)
    names: dict[str, Any] = {"transformer": transformer}
    exec(compile(code, "functors.md", "exec"), names)
    cachedit_fx.enable_cache(names["adapter"], **SETTINGS)
    outputs = [transformer(**call)[0] for call in calls]
    (stats,) = cachedit_fx.summary(transformer, logging=False)
    assert stats.decisions == ["warmup", "threshold-one", "max-continuous"]
    # The gain: a float of 64 bits by NumPy, of 32 by the functor.
    torch.testing.assert_close(outputs[0::2], uncached[0::2], rtol=0, atol=1e-6)
    assert not torch.equal(outputs[1], uncached[1])
    cachedit_fx.disable_cache(names["adapter"])
    assert transformer.__dict__ == before
    assert torch.equal(transformer(**calls[0])[0], uncached[0])
