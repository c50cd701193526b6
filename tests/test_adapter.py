"""`BlockAdapter` and `ParamsModifier`: which blocks are cached, how, and how the graph checks a declaration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import cachedit_fx
from cachedit_fx import BlockAdapter, BlockTemplate, ForwardPattern, ParamsModifier
from cachedit_fx.errors import PatternError
from tests import hybrid, tiny, tiny_pipelines
from tests.hybrid import DUAL, SINGLE, Hybrid, LosesText, calls, generate, pipe_of
from tests.messages import flat
from tests.regions import Span, at_steps, runs, threshold
from tests.sessions import every_session
from tests.tiny import Transformer, TwoLists, assert_bitwise

P0, P1, P2, P3 = ForwardPattern.Pattern_0, ForwardPattern.Pattern_1, ForwardPattern.Pattern_2, ForwardPattern.Pattern_3
ONE_RUN = ParamsModifier(max_continuous_cached_steps=1)
TWO_RUN = ParamsModifier(max_continuous_cached_steps=2)
ALL = [1, 2, 3, 4, 5, 6, 7]  # All steps after the warm-up step.


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def both_lists(model, **others):
    lists = dict(blocks=[model.blocks, model.single_blocks], forward_pattern=[P1, P3])
    return BlockAdapter(pipe=pipe_of(transformer=model), transformer=model, **lists | others)


def cached_steps(model):
    """Region -> the reused steps of the only session."""
    found = every_session(model)
    assert len({stats.session for stats in found}) == 1
    return {stats.region: stats.cached_steps for stats in found}


def enabled(adapter, **fields):
    """The outputs of a generation of the adapter's only transformer, and the reused steps per region."""
    cachedit_fx.enable_cache(adapter, hybrid.config(**fields))
    (model,) = adapter.transformers().values()
    return generate(model), cached_steps(model)


def spans(model, dual, single, Fn=(1, 1)):
    """The blocks of each list after its Fn blocks, each list with its own decisions."""
    return [
        Span(model.blocks[Fn[0] :], DUAL, dual, since=model.blocks[0]),
        Span(model.single_blocks[Fn[1] :], SINGLE, single, since=model.single_blocks[0]),
    ]


def reference(make_spans):
    model = hybrid.build()
    made = make_spans(model)
    return runs(model, made, calls()), made


# Which blocks are cached.


def test_one_list_alone_is_cached_and_the_other_always_runs():
    model = hybrid.build()
    adapter = BlockAdapter(transformer=model, blocks=model.single_blocks, forward_pattern=P3)
    outputs, reused = enabled(adapter)
    assert reused == {"single_blocks[1:3]": ALL}
    expected, _ = reference(lambda m: spans(m, at_steps(range(8)), at_steps([0])))
    assert_bitwise(outputs, expected)


@pytest.mark.parametrize("name", ["blocks", "single_blocks"])
def test_a_list_can_be_named(name):
    model = hybrid.build()
    pattern = P1 if name == "blocks" else P3
    _, reused = enabled(BlockAdapter(pipe=pipe_of(transformer=model), blocks_name=name, forward_pattern=pattern))
    assert [*reused] == [f"{name}[1:3]"]


def test_lists_of_two_patterns_share_one_decision():
    outputs, reused = enabled(both_lists(hybrid.build()))
    assert reused == {"blocks[1:3]+single_blocks": ALL}
    model, entered, left = hybrid.build(), [], []
    model.blocks[0].register_forward_hook(lambda _module, _args, result: entered.append(result[1]))
    model.proj_out.register_forward_pre_hook(lambda _module, args: left.append(args[0]))
    first, *_ = generate(model)
    added = left[0] - entered[0]
    assert_bitwise(outputs, [first, *(model.proj_out(stream + added) for stream in entered[1:8])])


def test_lists_may_be_declared_in_any_order():
    model = hybrid.build()
    swapped = dict(blocks=[model.single_blocks, model.blocks], forward_pattern=[P3, P1])
    outputs, reused = enabled(both_lists(model, **swapped))
    torch._dynamo.reset()
    ordered, same = enabled(both_lists(hybrid.build()))
    assert reused == same
    assert_bitwise(outputs, ordered)


def test_auto_caches_the_lists_that_fit_the_pattern_and_leaves_the_others_alone():
    model = hybrid.build()
    adapter = BlockAdapter(pipe=pipe_of(transformer=model), auto=True, forward_pattern=P3)
    outputs, reused = enabled(adapter)
    assert [*reused] == ["single_blocks[1:3]"]
    expected, _ = reference(lambda m: spans(m, at_steps(range(8)), at_steps([0])))
    assert_bitwise(outputs, expected)


def test_auto_finds_the_single_blocks_of_chroma_by_pattern_3():
    tiny = tiny_pipelines.PIPELINES["chroma"]
    pipe = tiny.build()
    uncached = tiny.run(pipe, num_steps=3)
    adapter = BlockAdapter(pipe=pipe, auto=True, forward_pattern=P3)
    cachedit_fx.enable_cache(adapter, hybrid.config(max_warmup_steps=3))
    assert_bitwise([tiny.run(pipe, num_steps=3)], [uncached])
    assert {stats.region for stats in cachedit_fx.summary(pipe, logging=False)} == {"single_transformer_blocks[1:4]"}


def test_a_custom_template_can_be_declared():
    template = BlockTemplate("image and text", ("hidden_states", "encoder_hidden_states"), DUAL)
    model = hybrid.build()
    _, reused = enabled(BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=template))
    assert [*reused] == ["blocks[1:3]"]


def test_summary_covers_only_the_lists_that_are_cached_now():
    model = hybrid.build()
    enabled(both_lists(model))
    adapter = BlockAdapter(transformer=model, blocks=model.single_blocks, forward_pattern=P3)
    cachedit_fx.enable_cache(adapter, hybrid.config())
    generate(model)
    assert [stats.region for stats in cachedit_fx.summary(model, logging=False)] == ["single_blocks[1:3]"]


# A region per list.


@pytest.mark.parametrize("swapped", [False, True])
def test_each_list_with_a_modifier_has_its_own_decisions(swapped):
    model = hybrid.build()
    lists = [(model.blocks, P1, ONE_RUN), (model.single_blocks, P3, TWO_RUN)]
    blocks, patterns, modifiers = map(list, zip(*lists[:: -1 if swapped else 1], strict=True))
    adapter = both_lists(model, blocks=blocks, forward_pattern=patterns, params_modifiers=modifiers)
    outputs, reused = enabled(adapter)
    assert reused == {"blocks[1:3]": [1, 3, 5, 7], "single_blocks[1:3]": [1, 2, 4, 5, 7]}
    expected, _ = reference(lambda m: spans(m, at_steps([0, 2, 4, 6]), at_steps([0, 3, 6])))
    assert_bitwise(outputs, expected)
    assert_bitwise(outputs[:1], generate(hybrid.build())[:1])


def test_each_list_has_its_own_diffs():
    limits = 0.02, 0.12
    modifiers = [ParamsModifier(residual_diff_threshold=limit) for limit in limits]
    model = hybrid.build()
    outputs, reused = enabled(both_lists(model, params_modifiers=modifiers))
    expected, expected_spans = reference(lambda m: spans(m, *map(threshold, limits)))
    assert [*reused.values()] == [span.cached_steps for span in expected_spans]
    assert reused["blocks[1:3]"] != reused["single_blocks[1:3]"] != []
    assert_bitwise(outputs, expected)
    for stats, span in zip(every_session(model), expected_spans, strict=True):
        diffs = {step: diff for step, diff in enumerate(span.diffs) if diff is not None}
        assert stats.residual_diffs == pytest.approx(diffs, rel=1e-6)  # Float32 means are divided in another precision.


def test_a_modifier_for_one_list_gives_the_other_list_a_separate_region():
    _, reused = enabled(both_lists(hybrid.build(), params_modifiers=[None, TWO_RUN]))
    assert reused == {"blocks[1:3]": ALL, "single_blocks[1:3]": [1, 2, 4, 5, 7]}


def test_one_modifier_applies_to_all_lists():
    _, reused = enabled(both_lists(hybrid.build(), params_modifiers=ONE_RUN))
    assert reused == {"blocks[1:3]": [1, 3, 5, 7], "single_blocks[1:3]": [1, 3, 5, 7]}


def test_a_modifier_may_change_the_cuts_of_its_list():
    model = hybrid.build()
    modifiers = [ParamsModifier(Bn_compute_blocks=1), ParamsModifier(Fn_compute_blocks=2)]
    outputs, reused = enabled(both_lists(model, params_modifiers=modifiers), max_continuous_cached_steps=1)
    assert [*reused] == ["blocks[1:2]", "single_blocks[2:3]"]
    odd = at_steps([0, 2, 4, 6])

    def made(m):
        dual, single = spans(m, odd, odd, Fn=(1, 2))
        dual.blocks = dual.blocks[:1]
        return [dual, single]

    assert_bitwise(outputs, reference(made)[0])


PARTS = [
    pytest.param(lambda: ParamsModifier(cachedit_fx.DBCacheConfig().reset(max_cached_steps=2)), id="reset"),
    pytest.param(lambda: ParamsModifier(cachedit_fx.CacheConfig(max_cached_steps=2)), id="config"),
    pytest.param(
        lambda: ParamsModifier(cachedit_fx.config.BasicCacheConfig(5).reset(max_cached_steps=2)), id="reset-forgets"
    ),
    pytest.param(lambda: ParamsModifier(max_cached_steps=2), id="field"),
    pytest.param(
        lambda: ParamsModifier(cachedit_fx.CacheConfig(max_cached_steps=1), max_cached_steps=2), id="field-on-top"
    ),
]


@pytest.mark.parametrize("part", PARTS)
def test_a_partial_configuration_sets_only_the_given_fields(part):
    assert part().cache_config.changes == (("max_cached_steps", 2),)


def test_a_partial_configuration_overrides_only_the_given_fields():
    partial = ParamsModifier(cachedit_fx.DBCacheConfig().reset(max_cached_steps=2))
    _, reused = enabled(both_lists(hybrid.build(), params_modifiers=[partial, None]), max_warmup_steps=2)
    assert reused == {"blocks[1:3]": [2, 3], "single_blocks[1:3]": [2, 3, 4, 5, 6, 7]}


def test_a_field_set_to_its_default_is_an_override():
    modifiers = [ParamsModifier(max_continuous_cached_steps=-1), None]
    _, reused = enabled(both_lists(hybrid.build(), params_modifiers=modifiers), max_continuous_cached_steps=1)
    assert reused == {"blocks[1:3]": ALL, "single_blocks[1:3]": [1, 3, 5, 7]}


def test_modifiers_of_enable_cache_take_precedence_over_those_of_the_adapter():
    model = hybrid.build()
    adapter = both_lists(model, params_modifiers=[ONE_RUN, ONE_RUN])
    cachedit_fx.enable_cache(adapter, hybrid.config(), params_modifiers=[TWO_RUN, ONE_RUN])
    generate(model)
    assert cached_steps(model) == {"blocks[1:3]": [1, 2, 4, 5, 7], "single_blocks[1:3]": [1, 3, 5, 7]}


def test_modifiers_work_without_an_adapter():
    model = hybrid.build()
    cachedit_fx.enable_cache(pipe_of(transformer=model), hybrid.config(), params_modifiers=[ONE_RUN, TWO_RUN])
    generate(model)
    assert cached_steps(model) == {"blocks[1:3]": [1, 3, 5, 7], "single_blocks[1:3]": [1, 2, 4, 5, 7]}


def test_one_modifier_applies_to_all_lists_found_in_the_graph():
    model = hybrid.build()
    cachedit_fx.enable_cache(model, hybrid.config(), params_modifiers=ONE_RUN)
    generate(model)
    assert cached_steps(model) == {"blocks[1:3]": [1, 3, 5, 7], "single_blocks[1:3]": [1, 3, 5, 7]}


def test_more_modifiers_than_lists_in_the_graph_are_an_error():
    model = hybrid.build(TwoLists)
    adapter = BlockAdapter(
        pipe=pipe_of(transformer=model), auto=True, forward_pattern=P2, params_modifiers=[ONE_RUN, None, TWO_RUN]
    )
    assert "params_modifiers must have one entry per block list, 2 (blocks, more), got 3" in contradiction(adapter)


# Several transformers.


def test_both_transformers_of_wan_2_2_have_their_own_modifier():
    tiny = tiny_pipelines.PIPELINES["wan22"]
    pipe = tiny.build()
    uncached = tiny.run(pipe, num_steps=2)
    adapter = BlockAdapter(
        pipe=pipe,
        transformer=[pipe.transformer, pipe.transformer_2],
        blocks=[pipe.transformer.blocks, pipe.transformer_2.blocks],
        forward_pattern=[P2, P2],
        params_modifiers=[ParamsModifier(max_warmup_steps=2), ParamsModifier(max_cached_steps=1)],
        has_separate_cfg=True,
    )
    cachedit_fx.enable_cache(adapter, hybrid.config())
    assert_bitwise([tiny.run(pipe, num_steps=2)], [uncached])  # One step in each.
    tiny.run(pipe, num_steps=6)
    found = {(stats.module, stats.session): stats.cached_steps for stats in cachedit_fx.summary(pipe, logging=False)}
    guidance_branches = "cond", "uncond"
    assert found == {
        **{("transformer", guidance_branch): [2] for guidance_branch in guidance_branches},
        **{("transformer_2", guidance_branch): [1] for guidance_branch in guidance_branches},
    }


def test_each_transformer_may_have_several_lists():
    models = hybrid.build(), hybrid.build(TwoLists)
    adapter = BlockAdapter(
        transformer=[*models],
        blocks=[[models[0].blocks, models[0].single_blocks], models[1].more],
        forward_pattern=[[P1, P3], P2],
        params_modifiers=[[ONE_RUN, None], TWO_RUN],
    )
    assert [*adapter.transformers()] == ["transformer", "transformer_2"]
    cachedit_fx.enable_cache(adapter, hybrid.config())
    for model in models:
        generate(model)
    assert cached_steps(models[0]) == {"blocks[1:3]": [1, 3, 5, 7], "single_blocks[1:3]": ALL}
    assert cached_steps(models[1]) == {"more[1:3]": [1, 2, 4, 5, 7]}


def test_an_adapter_without_a_transformer_uses_those_of_the_pipeline():
    models = hybrid.build(), hybrid.build(TwoLists)
    adapter = BlockAdapter(
        pipe=pipe_of(transformer=models[0], transformer_2=models[1]),
        blocks=[models[0].blocks, models[1].blocks],
        forward_pattern=[P1, P2],
    )
    assert [declared.lists for declared in adapter.declarations().values()] == [("blocks",), ("blocks",)]


# The check against the graph.


def contradiction(adapter):
    """The whole message of the error at the first call."""
    cachedit_fx.enable_cache(adapter, hybrid.config())
    (model,) = adapter.transformers().values()
    with pytest.raises(PatternError) as caught:
        generate(model)
    assert str(caught.value).startswith("cachedit_fx: ")
    return str(caught.value)


def declared(kind: type[nn.Module], pattern, **others):
    model = hybrid.build(kind)
    return BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=pattern, **others)


def source_line(module, text):
    """`file.py:line` of the only line of a module that starts with `text`."""
    lines = Path(module.__file__).read_text(encoding="utf-8").splitlines()
    (number,) = (number for number, line in enumerate(lines, 1) if line.strip().startswith(text))
    return f"{Path(module.__file__).name}:{number}"


def test_a_pattern_that_the_dataflow_contradicts_is_reported_with_block_node_and_line():
    message = flat(contradiction(declared(Hybrid, P3)))
    assert "pattern 3 (hidden-only) was declared for blocks, but the captured graph contradicts it" in message
    assert (
        "expected: 1 stream (hidden_states) from block 0 to block 1 of blocks; found: 2 streams (hidden_states_"
        in message
    )
    assert f"float32[2, {tiny.TOKENS}, {tiny.WIDTH}], encoder_hidden_states_" in message
    assert "; at: `hidden_states_" in message
    assert source_line(tiny, "hidden_states = hidden_states + scale * watched") in message
    assert "blocks fits pattern 1 (dual-stream, encoder first). Declare a pattern that fits" in message
    assert "check_forward_pattern=False" in message


def test_the_error_names_the_first_block_that_does_not_fit():
    message = flat(contradiction(declared(LosesText, P1)))
    assert "expected: 2 streams (encoder_hidden_states, hidden_states) from block 1 to block 2 of blocks" in message
    assert "found: 1 stream (hidden_states_" in message


def test_a_pattern_that_only_the_return_statement_contradicts_is_reported():
    message = flat(contradiction(declared(Hybrid, P0)))
    assert "pattern 0 (dual-stream) was declared for blocks" in message
    assert "expected: a block that returns (hidden_states, encoder_hidden_states); found:" in message
    assert "`return encoder_hidden_states, hidden_states` in DualBlock.forward" in message
    assert source_line(hybrid, "return encoder_hidden_states, hidden_states") in message
    assert "blocks fits pattern 1 (dual-stream, encoder first)" in message


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        pytest.param(Transformer, P1, id="hidden-first-declared-as-1"),
        pytest.param(TwoLists, P3, id="a-context-declared-as-none"),
        pytest.param(TwoLists, ForwardPattern.Pattern_4, id="nothing-emitted-declared-as-4"),
    ],
)
def test_any_contradiction_is_an_error_at_the_first_call(kind, pattern):
    message = flat(contradiction(declared(kind, pattern)))
    assert f"{pattern.value} was declared for blocks, but the captured graph contradicts it" in message


def test_auto_raises_an_error_if_no_list_fits_the_pattern():
    adapter = BlockAdapter(pipe=pipe_of(transformer=hybrid.build()), auto=True, forward_pattern=P2)
    assert "pattern 2 (cross-attention) was declared for blocks" in contradiction(adapter)


@pytest.mark.parametrize("pattern", [P0, P3])
def test_a_wrong_pattern_is_ignored_if_it_is_not_checked(pattern):
    outputs, reused = enabled(declared(Hybrid, pattern, check_forward_pattern=False))
    assert reused == {"blocks[1:3]": ALL}
    expected, _ = reference(lambda m: spans(m, at_steps([0]), at_steps(range(8))))
    assert_bitwise(outputs, expected)
