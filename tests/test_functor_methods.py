"""The methods that a patch functor replaces and restores, and the errors if it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import Unsupported

import cachedit_fx
from cachedit_fx import BlockAdapter, ForwardPattern
from cachedit_fx.errors import ConfigError, PatternError
from cachedit_fx.functors import PatchFunctor
from cachedit_fx.integrations import BlockAdapterRegistry
from tests import hybrid
from tests.hybrid import SingleBlock, generate
from tests.sessions import every_session
from tests.tiny import TIMES, WIDTH, assert_bitwise


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Branching(nn.Module):
    """Branches on a tensor before its blocks, so that Dynamo cannot capture it as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(SingleBlock() for _ in range(3))
        self.proj_out = nn.Linear(WIDTH, 4)

    def scale_at(self, timestep: Tensor) -> Tensor:
        if timestep.max() > 1000:
            timestep = timestep / 1000
        return (1 + timestep.max())[None, None, None]

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        scale = self.scale_at(timestep)
        hidden_states = self.proj_in(hidden_states) + encoder_hidden_states.mean()
        for block in self.blocks:
            hidden_states = block(hidden_states, scale)
        return (self.proj_out(hidden_states),)


def scale_without_branch(self: Branching, timestep: Tensor) -> Tensor:
    return (1 + timestep.max())[None, None, None]


class Prepares(PatchFunctor):
    def prepare(self, transformer: nn.Module) -> None:
        self.replace_method(transformer, "scale_at", scale_without_branch)


def enable(model: nn.Module, functor: PatchFunctor | None, **fields: Any) -> nn.Module:
    adapter = BlockAdapter(transformer=model, patch_functor=functor)
    cachedit_fx.enable_cache(adapter, hybrid.config(**fields), fullgraph=True)
    return model


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(module.__dict__) for module in model.modules()]


# prepare, replace_method, restore.


def test_a_functor_prepares_a_model_that_cannot_be_captured_as_one_graph():
    with pytest.raises(Unsupported):
        generate(enable(hybrid.build(Branching), None))
    torch._dynamo.reset()
    model = enable(hybrid.build(Branching), Prepares())
    outputs = generate(model)
    (stats,) = every_session(model)
    assert (stats.region, stats.cached_steps) == ("blocks[1:3]", [1, 2, 3, 4, 5, 6, 7])
    assert_bitwise(outputs[:1], generate(hybrid.build(Branching), TIMES[:1]))


def test_only_the_given_instance_is_changed():
    model, other = hybrid.build(Branching), hybrid.build(Branching)
    own_class, others = dict(Branching.__dict__), attributes(other)
    enable(model, Prepares())
    assert model.scale_at.__func__ is scale_without_branch
    assert model.scale_at.__self__ is model
    assert dict(Branching.__dict__) == own_class
    assert attributes(other) == others
    assert other.scale_at.__func__ is Branching.scale_at


def test_disable_cache_restores_every_method():
    model = hybrid.build(Branching)
    before, expected = attributes(model), generate(model)
    enable(model, Prepares())
    generate(model)
    cachedit_fx.disable_cache(model)
    assert attributes(model) == before
    assert_bitwise(generate(model), expected)


def test_a_method_that_was_set_on_the_instance_is_restored():
    model = hybrid.build(Branching)
    instance_method = model.scale_at.__get__(model)
    model.scale_at = instance_method
    functor = Prepares()
    functor.prepare(model)
    assert model.__dict__["scale_at"] is not instance_method
    functor.restore(model)
    assert model.__dict__["scale_at"] is instance_method


def test_methods_of_submodules_are_restored():
    model = hybrid.build(Branching)
    before = attributes(model)
    functor = PatchFunctor()
    for block in model.blocks:
        functor.replace_method(block, "forward", lambda self, hidden_states, scale: hidden_states)
    assert not any((model.blocks[0](torch.ones(1, 2, WIDTH), 1.0) - 1).flatten())
    functor.restore(model)
    assert attributes(model) == before


def test_a_method_replaced_twice_is_restored_to_the_original():
    model = hybrid.build(Branching)
    before = attributes(model)
    functor = PatchFunctor()
    functor.replace_method(model, "scale_at", scale_without_branch)
    functor.replace_method(model, "scale_at", lambda self, timestep: timestep)
    assert model.scale_at(3) == 3
    functor.restore(model)
    assert attributes(model) == before
    functor.restore(model)  # A second restore does nothing.
    assert attributes(model) == before


def test_a_functor_of_two_models_restores_only_the_disabled_one():
    first, second = hybrid.build(Branching), hybrid.build(Branching)
    functor = Prepares()
    for model in (first, second):
        enable(model, functor)
    cachedit_fx.disable_cache(first)
    assert first.scale_at.__func__ is Branching.scale_at
    assert second.scale_at.__func__ is scale_without_branch


def test_the_methods_stay_replaced_when_the_configuration_changes():
    model = hybrid.build(Branching)
    before = attributes(model)
    enable(model, Prepares())
    enable(model, Prepares(), max_warmup_steps=2)
    cachedit_fx.refresh_context(model, Bn_compute_blocks=1)
    generate(model)
    assert every_session(model)[-1].region == "blocks[1:2]"
    cachedit_fx.disable_cache(model)
    assert attributes(model) == before


def test_replacing_a_missing_method_raises_an_error():
    model = hybrid.build(Branching)
    before = attributes(model)
    for name in ("scale_of", "training"):
        with pytest.raises(ConfigError, match=f"cachedit_fx: Branching has no method '{name}' to replace"):
            PatchFunctor().replace_method(model, name, scale_without_branch)
    assert attributes(model) == before


def test_a_functor_that_fails_to_prepare_leaves_the_model_unchanged():
    class Halfway(Prepares):
        def prepare(self, transformer: nn.Module) -> None:
            super().prepare(transformer)
            self.replace_method(transformer, "no_such_method", scale_without_branch)

    model = hybrid.build(Branching)
    before = attributes(model)
    with pytest.raises(ConfigError, match="no_such_method"):
        enable(model, Halfway())
    assert attributes(model) == before


# Enabling the cache again.


def test_enabling_the_same_functor_again_compiles_nothing():
    model, functor = hybrid.build(), PatchFunctor()
    enable(model, functor)
    compiled = model._compiled_call_impl
    enable(model, functor)
    assert model._compiled_call_impl is compiled


def test_enable_cache_with_the_same_registered_adapter_does_nothing():
    @BlockAdapterRegistry.register("Hybrid")
    def adapter(pipe: Any) -> BlockAdapter:
        return BlockAdapter(
            transformer=pipe.transformer,
            blocks_name="blocks",
            forward_pattern=ForwardPattern.Pattern_1,
            patch_functor=PatchFunctor(),
        )

    try:
        model = cachedit_fx.enable_cache(hybrid.build(), hybrid.config())
        compiled = model._compiled_call_impl
        cachedit_fx.enable_cache(model, hybrid.config())
    finally:
        BlockAdapterRegistry.unregister("Hybrid")
    assert model._compiled_call_impl is compiled


# A failing `apply`.


def raises(gm: fx.GraphModule) -> fx.GraphModule:
    raise RuntimeError("no such node")


def reads_too_early(gm: fx.GraphModule) -> fx.GraphModule:
    nodes = list(gm.graph.nodes)
    with gm.graph.inserting_before(nodes[0]):
        gm.graph.call_function(torch.neg, (nodes[-2],))
    return gm


def returns_nothing(gm: fx.GraphModule) -> None:
    return None


@pytest.mark.parametrize("apply", [raises, reads_too_early, returns_nothing])
def test_a_functor_that_fails_on_the_graph_is_named(apply):
    class Broken(PatchFunctor):
        def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
            return apply(gm)

    with pytest.raises(PatternError) as caught:
        generate(enable(hybrid.build(), Broken()))
    message = str(caught.value)
    assert message.startswith("cachedit_fx: patch functor `")
    assert "Broken` failed on the captured graph: " in message
    if apply is raises:
        assert "RuntimeError: no such node\n" in message


def test_block_nodes_returns_the_nodes_of_each_block_in_order():
    found = []

    class Look(PatchFunctor):
        def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
            found.append((list(gm.graph.nodes), cachedit_fx.functors.block_nodes(gm, "blocks")))
            assert cachedit_fx.functors.block_nodes(gm, "no_such_list") == []
            return gm

    model = hybrid.build()
    generate(enable(model, Look()))
    ((nodes, blocks),) = found
    assert len(blocks) == len(model.blocks)
    ordered = [node for block in blocks for node in block]
    assert ordered == sorted(ordered, key=nodes.index) and len(set(ordered)) == len(ordered)
    for block in blocks:
        assert any(node.target is torch.nn.functional.linear for node in block)
        assert not any(node.op in ("placeholder", "output") for node in block)


def test_a_functor_that_adds_an_input_is_named():
    class AddsAnInput(PatchFunctor):
        def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
            with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
                gm.graph.placeholder("one_more")
            return gm

    with pytest.raises(PatternError, match=r"patch functor `.*AddsAnInput`"):
        generate(enable(hybrid.build(), AddsAnInput()))


def test_the_base_class_changes_nothing():
    model, functor = hybrid.build(), PatchFunctor()
    before = attributes(model)
    functor.prepare(model)
    assert attributes(model) == before
    enable(model, functor)
    outputs = generate(model)
    plain = cachedit_fx.enable_cache(hybrid.build(), hybrid.config())
    assert_bitwise(outputs, generate(plain))
