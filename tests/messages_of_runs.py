"""The rows of `messages_table` that need a model that runs or is captured."""

from __future__ import annotations

import copy
import functools
import runpy
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, fx

import cachedit_fx
import cachedit_fx.testing.pattern_check
from cachedit_fx import BlockAdapter, BlockTemplate, ForwardPattern, ParamsModifier, figure
from cachedit_fx.frontend import fast_dispatch, torch_internals
from cachedit_fx.functors import PatchFunctor
from cachedit_fx.inspect import Explanation
from cachedit_fx.inspect.pages import render
from cachedit_fx.inspect.reproduce import run_saved
from cachedit_fx.integrations import comfyui
from cachedit_fx.integrations.comfyui.sampler_steps import StepLimits
from cachedit_fx.passes.transforms.insert_conditionals import InsertConditionals
from cachedit_fx.patterns import BUILT_IN, unregister_pattern
from cachedit_fx.patterns.blocks import ENCODER, HIDDEN
from cachedit_fx.testing import check_pattern, tiny_pipeline
from cachedit_fx.testing.template_reference import TemplateReference
from examples.custom_pattern import TwoScaleTransformer
from tests import hybrid, tiny
from tests.messages_export import ROWS as EXPORT
from tests.messages_forecasters import ROWS as FORECASTERS
from tests.messages_foreign import ROWS as FOREIGN
from tests.messages_policies import ROWS as POLICIES
from tests.messages_saving import ROWS as SAVING
from tests.messages_shell import ROWS as SHELL
from tests.messages_table import CHEAP, P3, Row
from tests.messages_tuning import ROWS as TUNING
from tests.synthetic import Transformer, make_inputs

BOTH = (HIDDEN, ENCODER)


# Runs.


def run(model: Any, **fields: Any) -> None:
    with torch.no_grad():
        tiny.step(tiny.compiled(model, **fields), tiny.prompt(), 1.0, tiny.latents())


def run_with_another_template() -> None:
    template = BlockTemplate("mine", takes=BOTH, returns=BOTH, streams={HIDDEN: "image"}, block_class="Block")
    cachedit_fx.register_pattern(template)
    try:
        run(tiny.build())
    finally:
        unregister_pattern(template.name)


def run_offloaded_by_layer() -> None:
    model, cpu = tiny.build(), torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    cachedit_fx.enable_cache(model, tiny.config())
    with torch.no_grad():
        tiny.step(model, tiny.prompt(), 1.0, tiny.latents())


def run_with_a_bug(**fields: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("a name that is not there")

    with patch.object(InsertConditionals, "call", fail):
        run(tiny.build(), **fields)


def run_saved_uncached(folder: Path) -> None:
    hybrid_step(
        torch.compile(hybrid.build(hybrid.LosesText), backend=cachedit_fx.Backend(hybrid.config(debug_dir=folder)))
    )
    run_saved(next(folder.iterdir()))


def dump_into_a_file(folder: Path) -> None:
    (folder / "taken").write_text("", encoding="utf-8")
    run(tiny.build(), debug_dir=folder / "taken")


def run_where_dynamo_has_no_guards() -> None:
    model = hybrid.build()
    with (
        patch.object(fast_dispatch, "_logged", set()),
        patch.object(fast_dispatch, "find_guards", side_effect=AttributeError("no guards")),
    ):
        hybrid_step(cachedit_fx.enable_cache(model, hybrid.config()))


def import_without_a_private_name() -> None:
    with patch.object(torch._dynamo.convert_frame, "compile_lock"):
        del torch._dynamo.convert_frame.compile_lock
        runpy.run_path(str(torch_internals.__file__))


def trace_without_a_private_name() -> None:
    with patch.object(torch_internals, "_translator", object):
        torch_internals.traced_locals()


def run_two_that_do_not_fit() -> None:
    model = cachedit_fx.enable_cache(tiny.build(), tiny.config(max_state_bytes=0))
    with torch.no_grad():
        for timestep in (1.0, 0.9):
            for key in "ab":
                with cachedit_fx.session(key):
                    tiny.step(model, tiny.prompt(), timestep, tiny.latents())


def run_with_one_guidance_branch() -> None:
    model = cachedit_fx.enable_cache(tiny.frozen(tiny.TwoLists()), tiny.config(guidance_reuse="difference"))
    with torch.no_grad():
        tiny.generate(model, tiny.prompt(), tiny.latents(), (1.0, 0.9))


# Pipelines and adapters.


def hybrid_step(model: Any) -> None:
    with torch.no_grad():
        model(**hybrid.calls()[0])


def declared(**arguments: Any) -> None:
    model = hybrid.build()
    hybrid_step(cachedit_fx.enable_cache(BlockAdapter(transformer=model, **arguments), hybrid.config()).transformer)


def with_functor(change: Callable[[fx.GraphModule], object]) -> None:
    class Mine(PatchFunctor):
        def apply(self, gm: fx.GraphModule) -> fx.GraphModule:
            change(gm)
            return gm

    declared(patch_functor=Mine())


def look_up(gm: fx.GraphModule) -> None:
    raise LookupError("no node `joint`")


def add_input(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        gm.graph.placeholder("one_more")


def three_modifiers() -> None:
    modifiers = [ParamsModifier(), ParamsModifier(), ParamsModifier()]
    hybrid_step(cachedit_fx.enable_cache(hybrid.build(), hybrid.config(), params_modifiers=modifiers))


def cached_by_diffusers() -> None:
    model = hybrid.build()
    model.is_cache_enabled = True
    cachedit_fx.enable_cache(model)


def copied_with_a_lock() -> None:
    """A decider that cannot be copied."""
    copy.deepcopy(cachedit_fx.enable_cache(hybrid.build(), hybrid.config(decider=Locked())))


class Locked:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def decide(self, _step: Any) -> None:
        return None


class Idle:
    """A pipeline that calls no transformer."""

    def __init__(self) -> None:
        self.components = {"transformer": hybrid.build()}

    def __call__(self) -> None:
        return None


@functools.cache
def explanation() -> Explanation:
    return cachedit_fx.explain(hybrid.build(), cache_config=hybrid.config(), **hybrid.calls()[0])


# check_pattern.


def checked(number: int, model: Transformer) -> None:
    check_pattern(BUILT_IN[number], model, make_inputs(model))


def checked_with_another_output(step: int) -> None:
    original = cachedit_fx.testing.pattern_check._run_compiled

    def other(*args: Any) -> Any:
        outputs, stats = original(*args)
        outputs[step] = [tensor + 1 for tensor in outputs[step]]
        return outputs, stats

    with patch.object(cachedit_fx.testing.pattern_check, "_run_compiled", other):
        checked(3, Transformer())


def checked_that_cannot_be_copied() -> None:
    model = Transformer()
    model.lock = threading.Lock()
    checked(3, model)


class Flat(Transformer):
    """No blocks."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.proj_out(self.x_embedder(hidden_states) + self.embed_time(timestep)[:, None])


def follow(template: BlockTemplate, model: Any, inputs: dict[str, Any], *paths: str) -> None:
    with torch.no_grad():
        TemplateReference(template, model.eval(), paths, 1, 0).run(inputs, reuse=False)


def in_another_order() -> None:
    template = BlockTemplate("two-scale", BOTH, BOTH[::-1], streams={HIDDEN: "fine", ENCODER: "coarse"})
    latents = dict(latents=torch.randn(1, 16, 4), timestep=torch.tensor([0.9]))
    model = TwoScaleTransformer()
    follow(template, model, latents, *(f"layers.{i}" for i in range(len(model.layers))))


def without_package(name: str, needed_by: Callable[[], object]) -> None:
    with patch.dict("sys.modules", {name: None}):
        needed_by()


SEEN = SimpleNamespace(residual_diffs={1: 0.5}, cached_steps=[1])

RUNS = [
    Row("no-match", lambda _: run(tiny.build().train(), on_no_match="raise"), "found:    training", "call .eval()"),
    Row("uncached", lambda _: run(tiny.frozen(tiny.Plain())), "Plain", 'Make this an error: options={"on_no_match"'),
    Row("bug", lambda _: run_with_a_bug(), "KeyError", "What to do: please report it with the traceback"),
    Row("bug-raised", lambda _: run_with_a_bug(on_no_match="raise"), "KeyError", "options={\"debug_dir\": "),
    Row("taken-folder", dump_into_a_file, "taken'", "debug_dir must be a folder that can be written to"),
    Row("unknown-torch", lambda _: run_where_dynamo_has_no_guards(), "no guards", "What to do: use torch 2.13.x"),
    Row("missing-name", lambda _: import_without_a_private_name(), "'compile_lock'", "install a supported version"),
    Row("missing-attribute", lambda _: trace_without_a_private_name(), "'f_locals'", "the tests run on 2.13.x"),
    Row(
        "no-guidance",
        lambda _: run_with_one_guidance_branch(),
        "found:    the model is called once per step",
        "What to do: set guidance_reuse='off' for this model",
    ),
    Row("state-dropped", lambda _: run_two_that_do_not_fit(), "max_state_bytes=0", "What to do: raise max_state_bytes"),
    Row("offloaded-by-layer", lambda _: run_offloaded_by_layer(), "Transformer", "What to do: nothing if it fits"),
    Row("saved-uncached", run_saved_uncached, "stream-count", "See every verdict: the script without --run"),
]  # fmt: skip

PIPELINES = [
    Row(
        "functor-fails",
        lambda _: with_functor(look_up),
        "no node `joint`",
        "Mine` failed on the captured graph",
    ),
    Row(
        "functor-adds-an-input", lambda _: with_functor(add_input), "one_more", "must leave the graph's inputs as they"
    ),
    Row(
        "contradiction",
        lambda _: declared(blocks_name="blocks", forward_pattern=P3),
        "pattern 3 (hidden-only) was declared for blocks",
        "blocks fits pattern 1",
    ),
    Row("three-modifiers", lambda _: three_modifiers(), "got 3", "one entry per block list, 2 (blocks, single_blocks)"),
    Row("not-enabled", lambda _: cachedit_fx.refresh_context(hybrid.build()), "Hybrid", "call it first"),
    Row(
        "unknown-argument",
        lambda _: cachedit_fx.enable_cache(hybrid.build(), fullgrph=True),
        "(given True)",
        "Did you mean 'fullgraph'?\nAllowed: ",
    ),
    Row(
        "config-of-a-model",
        lambda _: cachedit_fx.enable_cache(hybrid.build(), hybrid.build()),
        "got Hybrid(",
        "cache_config must be a CacheConfig",
    ),
    Row(
        "compiled",
        lambda _: cachedit_fx.enable_cache(pipe_of_compiled()),
        "transformer is compiled already",
        "pass the module that torch.compile was given",
    ),
    Row(
        "not-of-comfyui",
        lambda _: comfyui.enable_cache(hybrid.build()),
        "got Hybrid(",
        "for a transformer or a pipeline, call cachedit_fx.enable_cache",
    ),
    Row(
        "no-mask-for-a-sampler",
        lambda _: StepLimits.of(cachedit_fx.CacheConfig(), "slow").decider_for(None, torch.linspace(1, 0, 6)),
        "5 steps",
        "give the sampler 4, 6, or at least 8 steps",
    ),
    Row("not-copied-settings", lambda _: copied_with_a_lock(), "_thread.lock", "What to do: call enable_cache for the"),
    Row(
        "unknown-method",
        lambda _: cachedit_fx.enable_cache(hybrid.build(), method="foward"),
        "got 'foward'",
        "Did you mean 'forward'?",
    ),
    Row("cached-by-diffusers", lambda _: cached_by_diffusers(), "Hybrid", "call its disable_cache() first"),
    Row("calls-none", lambda _: cachedit_fx.explain(Idle()), "got Idle", "must be a transformer or a pipeline"),
    Row("which", lambda _: explanation().graph("middle"), "got 'middle'", "must be one of 'before', 'after', "),
    Row("index", lambda _: explanation().graph("before", 3), "got 3", "must be below 1, the number of graphs"),
    Row("expand", lambda _: explanation().diff(expand=["blocks.9"]), "got 'blocks.9'", "there are 6 of them"),
    Row(
        "no-jinja2",
        lambda _: without_package("jinja2", render._environment.__wrapped__),
        "jinja2",
        "pip install cachedit_fx[report]",
    ),
    Row(
        "no-matplotlib",
        lambda _: without_package("matplotlib.figure", lambda: figure.new_figure(1, 1)),
        "matplotlib",
        "pip install cachedit_fx[report]",
    ),
]

CHECKS = [
    Row(
        "template",
        lambda _: check_pattern(ForwardPattern.Pattern_3, Transformer(), {}),
        "got ForwardPattern.Pattern_3",
        "give ForwardPattern.Pattern_3.value",
    ),
    Row("inputs", lambda _: check_pattern(BUILT_IN[3], Transformer(), ["latents"]), "got ['latents']", "as a dict"),
    Row("computed-step", lambda _: checked_with_another_output(2), "step 2", "expected: bitwise equal outputs"),
    Row("reused-step", lambda _: checked_with_another_output(1), "step 1", "differs by up to 1"),
    Row(
        "another-stream",
        lambda _: cachedit_fx.testing.pattern_check._check_decisions(BUILT_IN[0], SEEN, 0.1),
        "found:    0.5000",
        "expected: a change of 0.1000",
    ),
    Row("no-fit", lambda _: checked(2, Transformer()), "no-context", "remove the context from takes"),
    Row(
        "template-passed-over",
        lambda _: run_with_another_template(),
        "found:    streams with the names encoder_hidden_states, hidden_states",
        "or remove the template: cachedit_fx.patterns.unregister_pattern('mine')",
    ),
    Row("no-blocks-to-check", lambda _: checked(3, Flat()), "no-chain", "expected: a list of blocks"),
    Row("not-copied", lambda _: checked_that_cannot_be_copied(), "TypeError", "remove what copy.deepcopy"),
    Row("order", lambda _: in_another_order(), "`coarse`, which is", "expected: value 1 of what layers.0 returns"),
    Row(
        "too-few-values",
        lambda _: follow(BUILT_IN[4], model := Transformer(), make_inputs(model), *(f"blocks.{i}" for i in range(4))),
        "found:    1 from blocks.0",
        "expected: 2 values",
    ),
    Row(
        "cannot-tell", lambda _: follow(BUILT_IN[3], Transformer(), {}, "blocks.9"), "blocks.9", "there is no module at"
    ),
    Row("tiny-pipeline-name", lambda _: tiny_pipeline("fluxx"), "got 'fluxx'", "Did you mean 'flux'?"),
    Row("tiny-pipeline-blocks", lambda _: tiny_pipeline("flux", num_blocks=0), "got 0", "must be an int >= 1"),
    Row(
        "no-transformers",
        lambda _: without_package("transformers", lambda: tiny_pipeline("flux")),
        "transformers",
        "pip install cachedit_fx[diffusers]",
    ),
]


def pipe_of_compiled() -> Any:
    return hybrid.pipe_of(transformer=torch.compile(hybrid.build(), backend="eager"))


ROWS = [*CHEAP, *RUNS, *PIPELINES, *CHECKS, *EXPORT, *FOREIGN, *FORECASTERS, *POLICIES, *SAVING, *SHELL, *TUNING]
