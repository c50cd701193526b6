"""A pipeline gets the adapter that is registered for its class."""

from __future__ import annotations

import pytest
import torch

import cachedit_fx
from cachedit_fx import BlockAdapter, ForwardPattern
from cachedit_fx.errors import ConfigError
from cachedit_fx.integrations import BlockAdapterRegistry
from tests import hybrid
from tests.hybrid import generate
from tests.sessions import every_session

P1, P3 = ForwardPattern.Pattern_1, ForwardPattern.Pattern_3


@pytest.fixture(autouse=True)
def nothing_registered():
    yield
    for name in BlockAdapterRegistry.supported_pipelines()[1]:
        BlockAdapterRegistry.unregister(name)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def pipeline(name, **parts):
    """A pipeline of a class with this name."""
    pipe = type(name, (), {})()
    parts = parts or {"transformer": hybrid.build()}
    pipe.components = parts
    pipe.__dict__.update(parts)
    return pipe


def register(name, blocks="single_blocks", pattern=P3):
    @BlockAdapterRegistry.register(name)
    def adapter(pipe, **others):
        return BlockAdapter(pipe=pipe, blocks_name=blocks, forward_pattern=pattern, **others)

    return adapter


def named(pipe):
    """The block list of the adapter that the registry returns for a pipeline, or None."""
    adapter = BlockAdapterRegistry.get(pipe)
    return adapter and adapter.blocks_name


def test_the_decorated_function_is_returned_unchanged():
    def make(pipe):
        return None

    assert BlockAdapterRegistry.register("Flux")(make) is make


def test_an_exact_class_name_takes_precedence_over_its_prefixes():
    register("Flux", "blocks", P1)
    register("FluxPipeline", "single_blocks", P3)
    assert named(pipeline("FluxPipeline")) == "single_blocks"
    assert named(pipeline("FluxImg2ImgPipeline")) == "blocks"


@pytest.mark.parametrize("names", [["Flux", "Flux2"], ["Flux2", "Flux"]])
def test_the_longest_prefix_wins(names):
    for name in names:
        register(name, *(("blocks", P1) if name == "Flux" else ("single_blocks", P3)))
    assert named(pipeline("FluxPipeline")) == "blocks"
    assert named(pipeline("Flux2Pipeline")) == "single_blocks"
    assert named(pipeline("Flux2KleinPipeline")) == "single_blocks"


def test_a_name_matches_only_class_names_that_it_is_a_prefix_of():
    register("Flux2")
    for name in ("FluxPipeline", "Flux", "flux2", "MyFlux2Pipeline"):
        assert BlockAdapterRegistry.get(pipeline(name)) is None


def test_the_function_registered_last_under_a_name_wins():
    register("Flux", "blocks", P1)
    register("Flux", "single_blocks", P3)
    assert named(pipeline("Flux")) == "single_blocks"
    assert BlockAdapterRegistry.supported_pipelines() == (1, ["Flux"])


def test_registered_names_can_be_listed_and_unregistered():
    assert BlockAdapterRegistry.supported_pipelines() == (0, [])
    register("Wan")
    register("Flux")
    assert BlockAdapterRegistry.supported_pipelines() == (2, ["Flux", "Wan"])
    BlockAdapterRegistry.unregister("Wan")
    BlockAdapterRegistry.unregister("Wan")
    assert BlockAdapterRegistry.supported_pipelines() == (1, ["Flux"])
    assert BlockAdapterRegistry.get(pipeline("WanPipeline")) is None


def test_arguments_are_passed_on_to_the_function():
    register("Flux")
    assert BlockAdapterRegistry.get(pipeline("Flux"), has_separate_cfg=True).has_separate_cfg


def test_the_function_receives_the_pipeline_itself():
    received = []

    @BlockAdapterRegistry.register("Flux")
    def adapter(pipe):
        received.append(pipe)
        return BlockAdapter(pipe=pipe, blocks_name="blocks", forward_pattern=P1)

    pipe = pipeline("FluxPipeline")
    BlockAdapterRegistry.get(pipe)
    assert received == [pipe]


def test_a_bare_transformer_is_passed_as_the_component_of_a_pipeline():
    model = hybrid.build()

    @BlockAdapterRegistry.register("Hybrid")
    def adapter(pipe):
        assert pipe.transformer is model
        return BlockAdapter(transformer=pipe.transformer, blocks=pipe.transformer.single_blocks, forward_pattern=P3)

    assert cachedit_fx.enable_cache(model, hybrid.config()) is model
    generate(model)
    assert [stats.region for stats in every_session(model)] == ["single_blocks[1:3]"]


def test_a_registered_adapter_takes_precedence_over_automatic_matching():
    register("Flux")
    found = {}
    for name in ("FluxPipeline", "AnotherPipeline"):
        pipe = pipeline(name)
        assert cachedit_fx.enable_cache(pipe, hybrid.config()) is pipe
        generate(pipe.transformer)
        found[name] = [stats.region for stats in cachedit_fx.summary(pipe, logging=False)]
    assert found == {"FluxPipeline": ["single_blocks[1:3]"], "AnotherPipeline": ["blocks[1:3]+single_blocks"]}


def test_a_given_adapter_takes_precedence_over_a_registered_one():
    register("Flux")
    pipe = pipeline("FluxPipeline")
    cachedit_fx.enable_cache(BlockAdapter(pipe=pipe, blocks_name="blocks", forward_pattern=P1), hybrid.config())
    generate(pipe.transformer)
    assert [stats.region for stats in cachedit_fx.summary(pipe, logging=False)] == ["blocks[1:3]"]


@pytest.mark.parametrize("returned", [None, "adapter", BlockAdapter])
def test_a_function_that_returns_no_adapter_raises_an_error(returned):
    BlockAdapterRegistry.register("Flux")(lambda pipe: returned)
    with pytest.raises(ConfigError, match=r"the function registered for 'Flux' must return a BlockAdapter, got "):
        cachedit_fx.enable_cache(pipeline("FluxPipeline"))


@pytest.mark.parametrize("name", ["", None, hybrid.Hybrid])
def test_a_name_must_be_a_non_empty_string(name):
    with pytest.raises(ConfigError, match=r"cachedit_fx: register takes a class name or the beginning of one, got "):
        BlockAdapterRegistry.register(name)


def test_a_transformer_that_only_the_adapter_finds_can_be_summarized_refreshed_and_disabled():
    @BlockAdapterRegistry.register("Odd")
    def adapter(pipe):
        return BlockAdapter(transformer=pipe.denoiser, blocks=pipe.denoiser.blocks, forward_pattern=P1)

    pipe = pipeline("OddPipeline", denoiser=hybrid.build())
    cachedit_fx.enable_cache(pipe, hybrid.config())
    generate(pipe.denoiser)
    assert [stats.region for stats in cachedit_fx.summary(pipe, logging=False)] == ["blocks[1:3]"]
    cachedit_fx.refresh_context(pipe, max_warmup_steps=2)
    cachedit_fx.disable_cache(pipe)
    assert pipe.denoiser._compiled_call_impl is None
