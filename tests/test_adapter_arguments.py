"""The errors about invalid declarations: each of them names the argument."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import cachedit_fx
from cachedit_fx import BlockAdapter, CacheConfig, ForwardPattern, ParamsModifier
from cachedit_fx.errors import ConfigError
from cachedit_fx.functors import PatchFunctor
from tests import hybrid
from tests.hybrid import pipe_of

P1, P3 = ForwardPattern.Pattern_1, ForwardPattern.Pattern_3


@pytest.fixture
def model():
    return hybrid.build()


def message_with(*parts):
    """A pattern of a message that starts with the name of the package and contains all parts."""
    return "cachedit_fx: .*" + ".*".join(re.escape(part) for part in parts)


# BlockAdapter.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param(
            lambda m: dict(transformer=m, forward_pattern=P1),
            ["blocks must be given unless auto=True, got None"],
            id="no-blocks",
        ),
        pytest.param(
            lambda m: dict(transformer=m, auto=True),
            ["forward_pattern must be given with auto=True, got None"],
            id="auto-without-a-pattern",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks=m.blocks, blocks_name="blocks", forward_pattern=P1),
            ["blocks and blocks_name are two ways to name the blocks"],
            id="blocks-twice",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks=m.blocks, forward_pattern=P1, patch_functor=PatchFunctor),
            ["patch_functor must be a PatchFunctor, got <class"],
            id="a-class-for-a-functor",
        ),
        pytest.param(
            lambda m: dict(transformer="transformer", blocks=m.blocks, forward_pattern=P1),
            ["transformer must be a module or a list of modules, got 'transformer'"],
            id="a-name-for-a-transformer",
        ),
        pytest.param(
            lambda m: dict(transformer=[m, None], blocks=[m.blocks, None], forward_pattern=P1),
            ["transformer must be a module or a list of modules, got None"],
            id="no-second-transformer",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks=m.blocks[1:], forward_pattern=P1),
            ["blocks must be a block list of Hybrid itself (not a slice of one), got a ModuleList; it has"],
            id="a-slice",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks=list(m.blocks), forward_pattern=P1),
            ["blocks 'blocks.0' must be a ModuleList of at least two blocks"],
            id="blocks-one-by-one",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks=hybrid.build().blocks, forward_pattern=P1),
            ["blocks must be a block list of Hybrid itself"],
            id="blocks-of-another-transformer",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks_name="transformer_blocks", forward_pattern=P1),
            ["blocks must be a block list of Hybrid itself", "got 'transformer_blocks'; it has blocks, single_blocks"],
            id="no-such-name",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks=m.proj_in, forward_pattern=P1),
            ["blocks 'proj_in' must be a ModuleList of at least two blocks"],
            id="a-layer",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks=m, forward_pattern=P1),
            ["blocks must be a block list of Hybrid itself", "got a Hybrid"],
            id="the-transformer-itself",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks=[m.blocks, m.single_blocks], forward_pattern=[P1]),
            ["forward_pattern must have one entry per block list, 2, got 1"],
            id="one-pattern-for-two-lists",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks=m.blocks, forward_pattern=[P1, P3]),
            ["forward_pattern must have one entry per block list, 1, got 2"],
            id="two-patterns-for-one-list",
        ),
        pytest.param(
            lambda m: dict(
                transformer=m, blocks=[m.blocks, m.single_blocks], forward_pattern=[P1, P3],
                params_modifiers=[ParamsModifier()],
            ),
            ["params_modifiers must have one entry per block list, 2, got 1"],
            id="one-modifier-in-a-list-for-two-lists",
        ),
        pytest.param(
            lambda m: dict(transformer=[m, hybrid.build()], blocks=[m.blocks], forward_pattern=P1),
            ["blocks must have one entry per transformer, 2, got 1"],
            id="blocks-of-one-transformer-of-two",
        ),
        pytest.param(
            lambda m: dict(transformer=[m], blocks=[m.blocks], forward_pattern=[P1, P3]),
            ["forward_pattern must have one entry per transformer, 1, got 2"],
            id="patterns-of-two-transformers-for-one",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks=m.blocks, forward_pattern=1),
            ["forward_pattern must be one of ForwardPattern.Pattern_0, ", "or a BlockTemplate, got 1"],
            id="a-number-for-a-pattern",
        ),
        pytest.param(
            lambda m: dict(transformer=m, auto=True, forward_pattern="Pattern_1"),
            ["forward_pattern must be one of ForwardPattern.Pattern_0, ", "got 'Pattern_1'"],
            id="a-name-for-a-pattern",
        ),
        pytest.param(
            lambda m: dict(transformer=m, blocks=m.blocks, forward_pattern=P1, params_modifiers=CacheConfig()),
            ["params_modifiers must contain ParamsModifier or None, got CacheConfig("],
            id="a-config-for-a-modifier",
        ),
    ],
)  # fmt: skip
def test_an_invalid_declaration_raises_an_error_that_names_the_argument(model, arguments, parts):
    with pytest.raises(ConfigError, match=message_with(*parts)) as caught:
        BlockAdapter(**arguments(model))
    assert isinstance(caught.value, ValueError)


def test_a_list_of_one_block_is_refused():
    model = hybrid.build()
    model.blocks = model.blocks[:1]
    with pytest.raises(ConfigError, match=message_with("blocks 'blocks' must be a ModuleList of at least two blocks")):
        BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=P1)


def test_auto_takes_one_pattern(model):
    with pytest.raises(ConfigError, match="forward_pattern"):
        BlockAdapter(transformer=model, auto=True, forward_pattern=[P1, P3])


# Objects that hold a transformer.


@pytest.mark.parametrize(
    ("pipe", "found"),
    [
        pytest.param(None, "NoneType with no components", id="none"),
        pytest.param("pipe", "str with no components", id="a-string"),
        pytest.param(pipe_of(), "SimpleNamespace with no components", id="nothing"),
        pytest.param(
            pipe_of(vae=nn.Linear(1, 1), scheduler=object()),
            "SimpleNamespace with vae (Linear), scheduler (object)",
            id="no-transformer",
        ),
        pytest.param(pipe_of(transformer=None), "SimpleNamespace with transformer (NoneType)", id="not-loaded"),
    ],
)
@pytest.mark.parametrize(
    "take",
    [
        cachedit_fx.enable_cache,
        cachedit_fx.disable_cache,
        cachedit_fx.refresh_context,
        cachedit_fx.summary,
        lambda pipe: BlockAdapter(pipe=pipe, auto=True, forward_pattern=P1),
    ],
    ids=["enable_cache", "disable_cache", "refresh_context", "summary", "BlockAdapter"],
)
def test_a_pipe_without_a_transformer_is_refused_with_a_list_of_its_components(take, pipe, found):
    with pytest.raises(
        ConfigError, match=message_with("must be a pipeline with a diffusion transformer", f"got {found}")
    ):
        take(pipe)


def test_a_transformer_that_is_already_compiled_is_refused():
    compiled = torch.compile(hybrid.build(), backend="eager")
    with pytest.raises(ConfigError, match=message_with("transformer is compiled already; pass the module that")):
        cachedit_fx.enable_cache(pipe_of(transformer=compiled))


def test_other_modules_of_a_pipeline_are_not_used_as_transformers():
    model = hybrid.build()
    others = dict(vae=nn.Linear(1, 1), transformer_encoder=nn.TransformerEncoder, controlnet=nn.Linear(1, 1))
    adapter = BlockAdapter(pipe=pipe_of(transformer=model, **others), blocks_name="blocks", forward_pattern=P1)
    assert [*adapter.transformers()] == ["transformer"]


def test_transformers_have_the_names_that_the_pipeline_gives_them():
    first, second = hybrid.build(), hybrid.build()
    pipe = pipe_of(transformer=first, transformer_2=second)
    adapter = BlockAdapter(pipe=pipe, transformer=[second, first], blocks_name="blocks", forward_pattern=P1)
    assert adapter.transformers() == {"transformer_2": second, "transformer": first}


# ParamsModifier.


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        pytest.param(
            lambda: ParamsModifier(calibrator_config=object()),
            ["calibrator_config must be a Forecaster, its name or its mapping", "got <object"],
            id="calibrator",
        ),
        pytest.param(
            lambda: ParamsModifier({"max_cached_steps": 1}),
            ["cache_config must be a CacheConfig, got {'max_cached_steps': 1}"],
            id="dict",
        ),
        pytest.param(
            lambda: ParamsModifier(max_cached_step=1),
            ["option 'max_cached_step' (given 1) is unknown. Did you mean 'max_cached_steps'?"],
            id="unknown",
        ),
        pytest.param(
            lambda: ParamsModifier(max_cached_steps=1.5),
            ["max_cached_steps must be an int >= -1, got 1.5"],
            id="bad-value",
        ),
        *(
            pytest.param(
                lambda name=name, value=value: ParamsModifier(CacheConfig(**{name: value})),
                [f"{name} applies to a whole model, not to one block list"],
                id=name,
            )
            for name, value in [
                ("inner_backend", "eager"),
                ("on_no_match", "raise"),
                ("regions", "per_list"),
                ("compile_blocks", "inline"),
                ("mode", "default"),
            ]
        ),
    ],
)
def test_an_invalid_modifier_raises_an_error_that_names_the_field(make, parts):
    with pytest.raises(ConfigError, match=message_with(*parts)):
        make()


def test_a_modifier_that_leaves_no_probe_is_refused_when_the_cache_is_enabled(model):
    adapter = BlockAdapter(
        transformer=model, blocks=model.blocks, forward_pattern=P1, params_modifiers=ParamsModifier(Fn_compute_blocks=0)
    )
    with pytest.raises(ConfigError, match=message_with("Fn_compute_blocks=0 leaves no residual to measure")):
        cachedit_fx.enable_cache(adapter, hybrid.config())


# enable_cache.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param(
            dict(calibrator_config=object()), ["calibrator_config must be a Forecaster", "got <object"], id="calibrator"
        ),
        pytest.param(
            dict(cache_config={}),
            ["cache_config must be a CacheConfig, or a dict of one for each of transformer, got {}"],
            id="dict",
        ),
        pytest.param(
            dict(max_warmup=1),
            ["enable_cache's argument 'max_warmup' (given 1) is unknown. Did you mean 'max_warmup_steps'"],
            id="unknown",
        ),
        pytest.param(
            dict(params_modifiers=[CacheConfig()]),
            ["params_modifiers must contain ParamsModifier or None"],
            id="modifier",
        ),
        pytest.param(
            dict(max_warmup_steps=-1), ["max_warmup_steps must be an int >= 0, or None, got -1"], id="bad-value"
        ),
    ],
)
def test_the_error_about_an_invalid_argument_of_enable_cache_names_it(model, arguments, parts):
    with pytest.raises(ConfigError, match=message_with(*parts)):
        cachedit_fx.enable_cache(pipe_of(transformer=model), **arguments)
