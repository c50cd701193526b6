"""The pass manager: the order of the passes, the checks after each one, and the calls of the observer."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import numpy_method_wrapper
from torch.fx.passes.infra.pass_base import PassResult

from cachedit_fx import CacheConfig
from cachedit_fx.errors import PassError, PatternError
from cachedit_fx.passes.extract import graph_module
from cachedit_fx.passes.graph_pass import GraphAnalysis, GraphPass, PassContext
from cachedit_fx.passes.manager import PASSES, Rewritten, rewrite, run_passes
from cachedit_fx.passes.observer import Observer
from cachedit_fx.passes.transforms.drop_numpy_calls import DropNumpyCalls
from cachedit_fx.passes.transforms.hoist_symbols import HoistSymbols
from cachedit_fx.passes.transforms.inline_checkpoints import InlineCheckpoints
from cachedit_fx.passes.transforms.insert_conditionals import InsertConditionals
from cachedit_fx.passes.transforms.narrow_contexts import NarrowContexts
from cachedit_fx.passes.transforms.split_pieces import SplitPieces, segments_of
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.declaration import Declaration
from cachedit_fx.patterns.mismatch import Mismatch, MismatchError
from cachedit_fx.patterns.nodes import value_of
from tests import tiny
from tests.synthetic import DualStream, SelfBlock, Transformer, capture, insert_conditionals, make_inputs
from tests.variants import Variant, planned

CONFIG = CacheConfig(Fn_compute_blocks=1)
REWRITES = [
    *("inline-checkpoints", "apply-functor", "drop-numpy-calls", "hoist-symbols", "narrow-contexts"),
    *("functionalize-writes", "insert-conditionals", "split-pieces"),
]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def small_graph() -> fx.GraphModule:
    """x -> x + 1"""
    graph = fx.Graph()
    graph.output(graph.call_function(operator.add, (graph.placeholder("x"), 1)))
    return fx.GraphModule(nn.Module(), graph)


class Recorder(Observer):
    def __init__(self) -> None:
        self.events: list[str] = []

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        self.events.append(name)

    def planned(self, plan: Any) -> None:
        self.events.append("planned")

    def refused(self, mismatches: Any) -> None:
        self.events.append("refused")

    def pieces(self, cached_graph: fx.GraphModule, pieces: Any) -> None:
        self.events.append(f"{len(pieces)} pieces")


def making(name: str, change: Callable[[fx.GraphModule], Any], *, modified: bool = True) -> type[GraphPass]:
    """A pass that applies `change` to every graph."""

    class Changes(GraphPass):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            change(graph_module)
            return PassResult(graph_module, modified)

    Changes.name = name
    return Changes


# The manager.


def test_one_list_holds_every_step_from_the_captured_graph_to_the_pieces():
    rewrites = [step.name for step in PASSES if issubclass(step, GraphPass)]
    analyses = [step.name for step in PASSES if issubclass(step, GraphAnalysis)]
    assert (rewrites, analyses) == (REWRITES, ["make-plan", "make-runtime-plan"])
    order = [step.name for step in PASSES]
    assert order[6:8] == analyses  # No pass rewrites the graph between the plan and the conditionals.


def test_every_step_is_in_the_folder_of_its_kind():
    for step in PASSES:
        if issubclass(step, GraphPass):
            name = step.name.replace("-", "_")
            assert step.__module__ == f"cachedit_fx.passes.transforms.{name}"


def test_the_observer_is_notified_of_every_rewrite_in_order():
    recorder = Recorder()
    found = capture(
        Transformer().eval(),
        make_inputs(Transformer()),
        lambda gm: rewrite(gm, CONFIG, Declaration(), exact=True, observer=recorder),
    ).found
    assert isinstance(found, Rewritten)
    before, after = REWRITES[:6], REWRITES[6:]
    assert recorder.events == ["captured", *before, "planned", *after, f"{len(found.pieces)} pieces"]


def test_a_mismatch_ends_the_run_and_is_observed():
    recorder = Recorder()
    found = capture(nn.Linear(3, 3), {"input": torch.ones(2, 3)}, lambda gm: rewrite(
        gm, CONFIG, Declaration(), exact=True, observer=recorder
    )).found  # fmt: skip
    assert [mismatch.cause for mismatch in found] == [Cause.NO_CHAIN]
    assert recorder.events == ["captured", *REWRITES[:6], "refused"]


def test_a_modified_graph_is_recompiled():
    def double(gm: fx.GraphModule) -> None:
        (add,) = gm.graph.find_nodes(op="call_function", target=operator.add)
        add.target = operator.mul
        add.args = (add.args[0], 2)

    assert run_passes(small_graph(), [making("double", double)], PassContext())(5) == 10


def test_a_pass_that_raises_is_named():
    def fail(_gm: fx.GraphModule) -> None:
        raise KeyError("a name that is not there")

    recorder = Recorder()
    steps = [making("first", lambda gm: None), making("second", fail)]
    with pytest.raises(PassError, match="the pass second failed") as raised:
        run_passes(small_graph(), steps, PassContext(observer=recorder))
    assert isinstance(raised.value.__cause__, KeyError)
    assert recorder.events == ["first"]


@pytest.mark.parametrize("modified", [True, False])
def test_a_pass_that_leaves_a_broken_graph_is_named(modified: bool):
    def read_too_early(gm: fx.GraphModule) -> None:
        (add,) = gm.graph.find_nodes(op="call_function", target=operator.add)
        with gm.graph.inserting_before(add):
            gm.graph.call_function(operator.neg, (add,))

    with pytest.raises(PassError, match="the pass breaks-it failed") as raised:
        run_passes(small_graph(), [making("breaks-it", read_too_early, modified=modified)], PassContext())
    assert "was used before it has been defined" in str(raised.value.__cause__)


def test_a_pass_that_breaks_a_segment_is_named():
    def break_a_segment(gm: fx.GraphModule) -> None:
        segment = small_graph()
        segment.graph.create_node("get_attr", "missing")
        gm.add_module("head", segment)

    with pytest.raises(PassError, match="the pass breaks-a-segment failed") as raised:
        run_passes(small_graph(), [making("breaks-a-segment", break_a_segment)], PassContext())
    assert "nonexistent attribute missing" in str(raised.value.__cause__)


@pytest.mark.parametrize(
    "error", [PatternError("declared"), MismatchError(Mismatch(None, Cause.NO_CHAIN, "a chain", "none"))]
)
def test_an_error_caused_by_the_model_or_the_user_is_not_a_pass_error(error: Exception):
    def refuse(_gm: fx.GraphModule) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        run_passes(small_graph(), [making("refuses", refuse)], PassContext())
    assert raised.value is error


def test_the_warning_about_a_bug_names_the_pass(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def fail(_self: HoistSymbols, _gm: fx.GraphModule) -> PassResult:
        raise ZeroDivisionError("no way")

    monkeypatch.setattr(HoistSymbols, "call", fail)
    model = tiny.frozen(tiny.build())
    expected = tiny.step(model, tiny.prompt(), 1.0, tiny.latents())
    with caplog.at_level(logging.WARNING):
        tiny.assert_bitwise([tiny.step(tiny.compiled(model), tiny.prompt(), 1.0, tiny.latents())], [expected])
    assert "What happened: the pass hoist-symbols failed (ZeroDivisionError: no way)." in caplog.text


# The conditions that the passes require and ensure. Each check gets a graph that it must reject.


def captured(model: nn.Module, *, dynamic: bool | None = None) -> fx.GraphModule:
    return capture(model.eval(), make_inputs(model), lambda gm: gm, dynamic=dynamic).found


def checkpoint_graph() -> fx.GraphModule:
    """A checkpoint whose tuple is returned instead of its parts."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    body = graph.get_attr("body")
    graph.output(graph.call_function(torch.ops.higher_order.tag_activation_checkpoint, (body, x)))
    root = nn.Module()
    root.body = small_graph()
    return graph_module(root, graph, "Checkpointed")


def test_a_checkpoint_must_be_read_part_by_part():
    with pytest.raises(AssertionError, match="output reads the tuple"):
        InlineCheckpoints().requires(checkpoint_graph())


def test_no_checkpoint_may_remain():
    with pytest.raises(AssertionError, match="still calls a checkpoint"):
        InlineCheckpoints().ensures(checkpoint_graph())


def test_no_unused_numpy_number_may_remain():
    gm = small_graph()
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(numpy_method_wrapper("item"), (3,))
    with pytest.raises(AssertionError, match="still calls NumPy"):
        DropNumpyCalls().ensures(gm)
    DropNumpyCalls()(gm)
    assert len(gm.graph.nodes) == 3


def test_no_size_that_is_an_input_may_be_recomputed():
    gm = captured(DualStream(), dynamic=True)
    HoistSymbols()(gm)
    inputs = gm.graph.find_nodes(op="placeholder")
    size = next(n for n in inputs if n.users and isinstance(value_of(n), torch.SymInt))
    reader = next(iter(size.users))
    with gm.graph.inserting_before(reader):
        again = gm.graph.call_function(operator.add, (size, 0))
    again.meta["example_value"] = value_of(size)
    reader.replace_input_with(size, again)
    with pytest.raises(AssertionError, match="computes a size that is an input"):
        HoistSymbols().ensures(gm)
    HoistSymbols()(gm)
    assert not again.users


class OneContext(Variant):
    def loop(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for block in self.blocks:
                hidden_states = block(hidden_states, temb)
        return hidden_states


def test_no_context_may_contain_nodes_of_two_blocks():
    gm = captured(OneContext())
    with pytest.raises(AssertionError, match=r"_enter_autocast\w* enters contains nodes of 4 blocks"):
        NarrowContexts().ensures(gm)
    NarrowContexts()(gm)
    assert len([node for node in gm.graph.nodes if node.name.startswith("_enter_autocast")]) == 4


def test_conditionals_require_a_plan_of_the_same_graph():
    with pytest.raises(AssertionError, match="there is no plan"):
        InsertConditionals().requires(small_graph())
    plan = planned(Transformer())
    context = PassContext(CONFIG, plan=plan, runtime_plan=object())
    with pytest.raises(AssertionError, match="the plan is that of another graph"):
        InsertConditionals(context).requires(small_graph())
    InsertConditionals(context).requires(plan.gm)


def test_every_region_must_have_a_conditional_and_the_inputs_must_not_change():
    plan = planned(Transformer())
    cached = insert_conditionals(plan).gm
    inserted = InsertConditionals(PassContext(plan=plan))
    inserted.ensures(cached)
    with pytest.raises(AssertionError, match="0 conditionals for 1 regions"):
        inserted.ensures(plan.gm)
    cached.graph.find_nodes(op="placeholder")[0].target = "steps"
    with pytest.raises(AssertionError, match=r"the inputs are \['steps'"):
        inserted.ensures(cached)


def test_segments_are_split_once():
    cached = insert_conditionals(planned(Transformer(SelfBlock))).gm
    split = SplitPieces(PassContext(CONFIG))
    split(cached)
    with pytest.raises(AssertionError, match="a segment has been split before"):
        split.requires(cached)


def test_every_graph_that_a_segment_calls_must_be_a_piece_that_lints():
    cached = insert_conditionals(planned(Transformer(SelfBlock))).gm
    context = PassContext(CONFIG)
    split = SplitPieces(context)
    split(cached)
    assert segments_of(cached) and context.pieces
    pieces, context.pieces = context.pieces, context.pieces[1:]
    with pytest.raises(AssertionError, match="calls a graph that is no piece"):
        split.ensures(cached)
    context.pieces = pieces
    pieces[0].gm.graph.create_node("get_attr", "missing")
    with pytest.raises(RuntimeError, match="nonexistent attribute missing"):
        split.ensures(cached)
