"""`explain` describes what the backend does with a model, and leaves no trace."""

from __future__ import annotations

import ast
import functools
import json
import re
import textwrap
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import cachedit_fx
from cachedit_fx import BlockAdapter, CacheConfig, explain
from cachedit_fx.cache_factory.patch_functors import HiDreamPatchFunctor
from cachedit_fx.errors import ConfigError
from cachedit_fx.flops import FlopCounter
from cachedit_fx.inspect.explanation.diff import side_by_side
from cachedit_fx.inspect.explanation.result import Explanation
from cachedit_fx.inspect.pages.explained import _shares, apportion
from tests import hybrid
from tests.models import FAMILIES
from tests.tiny_pipelines import PIPELINES
from tests.traces import traces_of
from tests.zoo import VARIANTS

F1B1 = CacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=1, forecaster=None, inner_backend="eager")


def flux() -> tuple[nn.Module, dict[str, Any]]:
    family = FAMILIES["flux"]
    latents = family.latents(1)
    timestep = torch.full((latents.shape[0],), 0.9)
    return family.build(), dict(hidden_states=latents, timestep=timestep, return_dict=False, **family.prompt(1).cond)


@functools.cache
def explained() -> tuple[nn.Module, dict[str, Any], Explanation]:
    """FLUX, its call and its explanation, for tests that only read them."""
    model, call = flux()
    return model, call, explain(model, cache_config=F1B1, **call)


def small() -> tuple[nn.Module, dict[str, Any]]:
    return hybrid.build(), hybrid.calls()[0]


# The contents of an explanation.


def test_explain_shows_the_chain_its_parts_and_the_region():
    _, _, explanation = explained()
    (graph,) = explanation.graphs
    assert explanation.is_cached and graph.is_cached and not graph.is_estimated
    assert (explanation.title, explanation.modules[0].how) == ("FluxTransformer2DModel", "whole")
    assert [block.path for block in graph.blocks] == [
        *(f"transformer_blocks.{i}" for i in range(3)),
        *(f"single_transformer_blocks.{i}" for i in range(4)),
    ]
    assert [block.part for block in graph.blocks] == ["Fn", *["region"] * 5, "Bn"]
    assert {block.cls for block in graph.blocks} == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}
    assert [blocks.pattern for blocks in graph.lists] == ["pattern 1 (dual-stream, encoder first)"] * 2
    assert [(s.role, s.shape) for s in graph.lists[0].streams] == [
        ("hidden_states", ("2", "36", "32")),
        ("encoder_hidden_states", ("2", "7", "32")),
    ]
    assert "conditioning" in [value.label for value in graph.lists[0].invariants]
    (region,) = graph.regions
    assert region.name == "transformer_blocks[1:3]+single_transformer_blocks[0:3]"
    assert {cached.value.role for cached in region.cached} == {"hidden_states", "encoder_hidden_states"}
    assert (graph.timestep, graph.conditioning) == ("timestep", "encoder_hidden_states")


def test_the_flops_equal_those_of_a_run():
    model, call, explanation = explained()
    with torch.no_grad(), FlopCounter() as counter:
        model(**call)
    (graph,) = explanation.graphs
    assert graph.cost.flops == counter.total
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    assert graph.cost.weight_bytes == sum(weights.values())
    inside = sum(block.cost.flops for block in graph.blocks if block.part == "region")
    assert graph.saved_flops == pytest.approx(inside / graph.cost.flops)
    assert all(block.cost.moved_bytes > block.cost.weight_bytes > 0 for block in graph.blocks)


def test_the_pieces_and_the_state_equal_those_of_a_run():
    model, call = flux()
    compiled: list[int] = []

    def inner(gm, _example_inputs):
        compiled.append(len(gm.graph.nodes))
        return gm.forward

    torch._dynamo.register_backend(name="counting_inner", compiler_fn=inner)
    config = F1B1.override(inner_backend="counting_inner")
    (graph,) = explain(model, cache_config=config, **call).graphs
    assert not compiled
    with torch.no_grad():
        torch.compile(model, backend=cachedit_fx.Backend(config))(**call)
    assert [piece.num_nodes for piece in graph.pieces] == compiled
    (stats,) = cachedit_fx.summary(model, logging=False)
    assert stats.peak_state_bytes == graph.state_bytes == graph.regions[0].state_bytes
    shared = [piece for piece in graph.pieces if len(piece.blocks) > 1]
    assert sum(len(piece.blocks) for piece in shared) == 7  # Double blocks share one piece, single ones another.


def test_a_mismatch_is_explained_with_the_line_of_the_user_and_a_cure():
    model = hybrid.build(hybrid.LosesText)
    explanation = explain(model, **hybrid.calls()[0])
    (graph,) = explanation.graphs
    assert not explanation.is_cached and not graph.regions and not graph.pieces
    nearest, *others = graph.verdicts
    assert (nearest.cause, nearest.fitted, nearest.total) == ("stream-count", 1, 3)
    assert nearest.expected.startswith("2 streams (hidden_states, encoder_hidden_states) from block 1 to block 2")
    assert nearest.found.startswith("1 stream (hidden_states_")
    assert nearest.block == "blocks.1"
    assert nearest.where.split("/")[-1].startswith("tiny.py:")
    assert "hidden_states = hidden_states + scale" in nearest.line
    assert "register a template" in nearest.cure
    assert [verdict.fitted for verdict in others] == sorted((v.fitted for v in others), reverse=True)
    page = str(explanation)
    for words in ("runs without caching", nearest.expected, nearest.found, nearest.line, nearest.cure):
        assert words in page


def test_a_model_captured_in_parts_is_explained_with_its_breaks_and_the_cached_part():
    variant = VARIANTS["Lumina2"]
    explanation = explain(variant.build(), cache_config=F1B1, **variant.inputs())
    assert explanation.is_cached
    (captured,) = explanation.modules
    assert captured.how.startswith("in parts") and "transformer_lumina2.py:" in captured.why
    assert [graph.is_cached for graph in explanation.graphs].count(True) == 1
    assert any(graph.break_after is not None for graph in explanation.graphs)
    cached = next(graph for graph in explanation.graphs if graph.is_cached)
    assert explanation.graphs[explanation.index()] == cached
    assert (cached.timestep, cached.conditioning) != ("timestep", "")  # It has no timestep; `enable_cache` knows it.


@pytest.mark.slow
def test_a_model_without_a_cached_part_is_explained_with_a_functor_that_makes_it_one_graph():
    tiny = PIPELINES["hidream"]
    pipe = tiny.build(2)
    explanation = explain(pipe, num_inference_steps=4, cache_config=F1B1, **tiny.arguments(1))
    assert not explanation.is_cached
    assert "use HiDreamPatchFunctor, which makes it one graph" in explanation.modules[0].cure
    adapter = BlockAdapter(pipe=pipe, patch_functor=HiDreamPatchFunctor())
    assert explain(adapter, num_inference_steps=4, cache_config=F1B1, **tiny.arguments(1)).is_cached


def test_explain_shows_what_a_graph_is_specialized_on():
    (graph,) = explained()[2].graphs
    found = {risk.what: risk for risk in graph.risks}
    assert "dynamic afterwards" in found["hidden_states"].consequence
    assert found["hidden_states"].found == "float32[2, 36, 16]"
    assert (found["return_dict"].found, found["return_dict"].consequence) == (
        "False",
        "every new value triggers a recompilation",
    )
    assert not any("blocks" in what for what in found)  # Attributes of the model are no risks of the call.


def test_training_mode_is_reported_as_the_cause():
    model, call = small()
    (graph,) = explain(model.train(), cache_config=F1B1, **call).graphs
    assert [verdict.cause for verdict in graph.verdicts] == ["training"]
    assert not graph.is_cached and "call .eval()" in graph.verdicts[0].cure


def test_gradients_are_ignored_with_a_note():
    model, call = small()
    explanation = explain(model.requires_grad_(True), cache_config=F1B1, **call)
    assert explanation.is_cached
    assert any("torch.no_grad()" in note for note in explanation.notes)


def test_an_explanation_can_be_written_as_json():
    _, _, explanation = explained()
    data = json.loads(json.dumps(explanation.to_dict()))
    assert data["graphs"][0]["blocks"][0]["path"] == "transformer_blocks.0"
    assert data["modules"][0]["config"]["Fn_compute_blocks"] == 1


# Graphs.


def test_the_graphs_can_be_printed_and_run(capsys):
    _, _, explanation = explained()
    for which in ("before", "after", "head", "compute", "reuse", "tail"):
        gm = explanation.graph(which)
        gm.print_readable()
        assert capsys.readouterr().out.startswith("class ")
        assert "def forward" in gm.code
    assert "step.decide(0" in explanation.graph("after").code
    weights = len([node for node in explanation.graph("before").graph.nodes if node.op == "placeholder"])
    assert weights > 50
    with pytest.raises(ConfigError, match=r"which must be one of 'before', 'after', .* got 'middle'"):
        explanation.graph("middle")
    with pytest.raises(ConfigError, match=r"index must be below 1, the number of graphs, got 3"):
        explanation.graph("before", 3)


def test_a_graph_can_be_shown_as_aten_operations():
    reuse = explained()[2].graph("reuse", aten=True)
    targets = {str(node.target) for node in reuse.graph.nodes if node.op == "call_function"}
    assert "aten.add.Tensor" in targets and all(target.startswith("aten.") for target in targets)


def test_the_diff_has_a_line_per_block():
    _, _, explanation = explained()
    lines = explanation.diff().splitlines()
    assert lines[:2] == ["--- before", "+++ after"]
    blocks = [line for line in lines if "# Flux" in line]
    assert len(blocks) == 7 and all(line.startswith(" ") for line in blocks)  # Blocks are unchanged.
    added = [line[1:] for line in lines if line.startswith("+")]
    assert "probe_before = step.before(0)" in added and any(line.startswith("if decide:") for line in added)
    removed = [line for line in lines[2:] if line.startswith("-")]
    assert removed == []
    expanded = explanation.diff(expand=["transformer_blocks.1"])
    code = explanation.graphs[0].blocks[1].code.splitlines()
    assert code[0].partition("  # ")[0] in expanded
    assert len(explanation.diff(expand=True)) > len(expanded)
    with pytest.raises(
        ConfigError, match=r"expand must name blocks of this graph, such as .*_blocks\.\d.* got 'blocks.9'; there are 7"
    ):
        explanation.diff(expand=["blocks.9"])


def test_the_diff_reads_as_code():
    """Every name is assigned once (in both branches, the same ones), before it is read."""
    _, _, explanation = explained()
    _, lines = side_by_side(explanation.graphs[0], explanation.graph_modules[0])
    code = re.sub(r"\.(\d+)", r"_\1", "\n".join(line.partition("  # ")[0] for line in lines))  # `blocks.0` is no name.
    statements = ast.parse(f"def forward(step):\n{textwrap.indent(code, '    ')}").body[0].body
    (conditional,) = [one for one in statements if isinstance(one, ast.If)]
    assigned = [assigned_in(branch) for branch in (conditional.body, conditional.orelse)]
    around = assigned_in([one for one in statements if one is not conditional])
    for found in (around + assigned[0], around + assigned[1]):
        assert max(Counter(found).values()) == 1
    after = statements[statements.index(conditional) + 1 :]
    read = {one.id for part in after for one in ast.walk(part) if isinstance(one, ast.Name)}
    assert {*assigned[0]} & read == {*assigned[1]} >= {"residual"}


def assigned_in(statements):
    found = [one for part in statements for one in ast.walk(part)]
    return [one.id for one in found if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]


def test_the_parts_make_up_the_graph():
    _, _, explanation = explained()
    (graph,) = explanation.graphs
    assert [part.name for part in graph.parts] == ["head", "Fn blocks", "region 0", "Bn blocks", "tail"]
    assert sum(part.flops for part in graph.parts) == graph.cost.flops
    assert all(part.flops > 0 for part in graph.parts)
    printed = [f"{share.percent:.1f}" for share in _shares(graph)]
    assert sum(map(Decimal, printed)) == 100
    assert printed[2] == f"{100 * graph.saved_flops:.1f}"


@pytest.mark.parametrize(
    ("counts", "expected"), [([1, 1, 1], [334, 333, 333]), ([0, 0], [0, 0]), ([2, 998000], [0, 1000]), ([5], [1000])]
)
def test_shares_sum_to_the_whole(counts, expected):
    assert apportion(counts, 1000) == expected


# No trace.


def test_explain_changes_neither_the_model_nor_its_compiled_graphs():
    model, call = small()
    compiled = torch.compile(model, backend=cachedit_fx.Backend(F1B1))
    with torch.no_grad():
        expected = compiled(**call)
        before = traces_of({"transformer": model})
        counters.clear()
        assert explain(compiled, **call).modules[0].config["Bn_compute_blocks"] == 1
        explain(model, cache_config=F1B1.override(Fn_compute_blocks=2), **call)
        assert traces_of({"transformer": model}) == before
        with torch._dynamo.config.patch(error_on_recompile=True):
            cachedit_fx.reset(model)
            torch.testing.assert_close(compiled(**call), expected, rtol=0, atol=0)
    assert cachedit_fx.summary(model, logging=False)[0].num_steps == 1


def test_explaining_another_size_does_not_make_sizes_dynamic():
    model, call = small()
    explain(model, cache_config=F1B1, **call)
    shorter = call | {"hidden_states": call["hidden_states"][:, :4]}
    (graph,) = explain(model, cache_config=F1B1, **shorter).graphs
    assert next(value.shape for value in graph.arguments if value.label == "hidden_states") == ("2", "4", "4")


def test_explain_does_not_count_towards_the_recompile_limit():
    model, call = small()
    for fn in range(1, 6):
        explain(model, cache_config=CacheConfig(Fn_compute_blocks=fn), **call)
    graphs = []

    def backend(gm, _example_inputs):
        graphs.append(gm)
        return gm.forward

    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        torch.compile(model, backend=backend)(**call)
    assert len(graphs) == 1


def test_a_model_that_is_one_graph_is_not_run():
    """The weights are on the meta device, so that the model cannot run."""
    model, call = flux()
    call = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    explanation = explain(model.to("meta"), cache_config=F1B1, **call)
    assert explanation.is_cached
    assert explanation.graphs[0].state_bytes > 0


# Pipelines.


def test_a_pipeline_runs_until_the_last_of_its_transformers_is_called():
    tiny = PIPELINES["wan22"]
    pipe = tiny.build(3)
    plain = tiny.run(pipe, num_steps=4)
    before = traces_of(pipe.components)
    explanation = explain(pipe, num_inference_steps=4, cache_config=F1B1, **tiny.arguments(1))
    assert traces_of(pipe.components) == before
    assert [captured.module for captured in explanation.modules] == ["transformer", "transformer_2"]
    assert [graph.module for graph in explanation.graphs] == ["transformer", "transformer_2"]
    assert explanation.is_cached
    torch.testing.assert_close(tiny.run(pipe, num_steps=4), plain, rtol=0, atol=0)


def test_explain_uses_the_configuration_of_an_enabled_cache():
    tiny = PIPELINES["wan22"]
    pipe = tiny.build(3)
    cachedit_fx.enable_cache(pipe, Fn_compute_blocks=2, inner_backend="eager")
    explanation = explain(pipe, num_inference_steps=4, **tiny.arguments(1))
    assert [graph.regions[0].name for graph in explanation.graphs] == ["blocks[2:3]", "blocks[2:3]"]
    assert cachedit_fx.summary(pipe, logging=False) == []
    tiny.run(pipe, num_steps=4)
    assert cachedit_fx.summary(pipe, logging=False)


def test_a_pipeline_may_hold_a_compiled_transformer():
    tiny = PIPELINES["wan"]
    pipe = tiny.build(3)
    tiny.run(pipe, num_steps=1)  # diffusers leaves a registry of hooks at the first call.
    pipe.transformer = torch.compile(pipe.transformer, backend="cachedit", options={"Fn_compute_blocks": 2})
    before = traces_of(pipe.components)
    explanation = explain(pipe, num_inference_steps=4, **tiny.arguments(1))
    assert [region.name for graph in explanation.graphs for region in graph.regions] == ["blocks[2:3]"]
    assert traces_of(pipe.components) == before


def test_a_transformer_that_is_not_called_is_named():
    tiny = PIPELINES["wan22"]
    pipe = tiny.build(3)
    pipe.register_to_config(boundary_ratio=0.0)  # The second transformer is never called.
    explanation = explain(pipe, num_inference_steps=4, cache_config=F1B1, **tiny.arguments(1))
    assert [captured.module for captured in explanation.modules] == ["transformer"]
    assert "transformer_2 was not called, so it is not explained." in explanation.notes


def test_an_object_without_a_transformer_raises_an_error():
    with pytest.raises(ConfigError, match="must be a pipeline with a diffusion transformer, a transformer"):
        explain(object())
